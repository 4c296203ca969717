"""Folds a batch into one table: the calls of the kernel, and the work between them.

A run always knows how far it has come. If it fails, its results so far are returned together with
the error, and the remainder can be folded later (:mod:`betrace.service.traces.partial_folds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from betrace.service.otlp.columns import MSG_LEN, TRACE_HI, TRACE_LO, Bytes, Rows, SpanBatch
from betrace.service.rules.match import SpanValues, evaluate
from betrace.service.traces import fold_kernels
from betrace.service.traces.arrays import doubled
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import (
    ASKED,
    CLOSED,
    COMPLETIONS,
    COUNTS_SIZE,
    DIRTIED,
    DONE,
    LATE,
    LATENESS,
    MATCHED,
    NAMES_FULL,
    NEED_ASK,
    NEED_ENTRIES,
    NEED_SET,
    NEED_SPILL,
    OPENED,
    POSITIONS,
    REPEATS,
    SPILLS,
    STATE,
    STOPPED_SLOT,
    BatchArrays,
    FoldOutputs,
)
from betrace.service.traces.partial_folds import Ask
from betrace.service.traces.slices import CpuSlice, SliceOver
from betrace.service.traces.table import TraceTable

# A call of the kernel takes rows of at most these products, so that it returns soon, and so that
# few comparisons are left over when the fold stops.
_CELLS = 1 << 18  # rows and checks
_PATTERN_CELLS = 1 << 11  # rows and patterns
_CELL_BYTES = 1 << 25  # bytes of spans and checks

_NO_FILTER = np.zeros((2, 0), np.int64)


@dataclass(slots=True, eq=False)
class Folded:
    """The results of folding a batch, which was received at ``received_ns`` and perhaps
    ``replayed`` from the log.

    ``early`` are traces for which a rule may have become certain, ``completed`` the slots with a
    span that says ``trace.complete``, ``spilled`` rows (hi, lo, log positions) of long traces, and
    ``late`` the rows of the batch that were not folded because their trace may have been closed and
    forgotten. With an ``error`` the fold stopped there; ``dirty`` are then the slots that could not
    be copied to ``early``.
    """

    early: DueTraces | None
    completed: Rows
    spilled: Rows
    late: Rows
    dirty: Rows
    opened: int
    repeated: int
    matched: int
    reopened: int
    unknown: int
    """Spans that were not counted for a check, because a text was too long for a pattern."""
    received_ns: int
    replayed: bool
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class Delivery:
    """A batch to be folded into the tables of its tenant, and what is left of it."""

    batch: SpanBatch
    services: Rows
    """The service number of each resource row."""
    now: int
    """When it was received (nanoseconds)."""
    skip: Bytes
    """1 for each row that is in a trace, or must not be folded; the fold sets it."""
    asks: list[Ask]
    """Comparisons left over from an earlier fold; the fold makes them, and adds those that fail."""
    slice: CpuSlice | None = None
    """What the fold may take; beyond it, it stops with :exc:`SliceOver`."""


class FoldRun:
    """Folds a batch into one table.

    With ``known_only``, only spans of traces that are in the table are folded. With ``closed``, new
    traces that it may contain are not opened but reported as late.
    """

    __slots__ = (
        "_arrays",
        "_asks",
        "_batch",
        "_filters",
        "_known_only",
        "_now",
        "_outputs",
        "_reopened",
        "_resumed",
        "_row",
        "_salt",
        "_slice",
        "_table",
        "_unknown",
        "_values",
    )

    def __init__(
        self,
        table: TraceTable,
        delivery: Delivery,
        *,
        known_only: bool = False,
        closed: ClosedTraces | None = None,
    ) -> None:
        batch = delivery.batch
        n = len(batch)
        positions = batch.positions
        self._table = table
        self._batch = batch
        self._now = delivery.now
        self._known_only = known_only
        self._asks = delivery.asks
        self._arrays = BatchArrays(
            batch.buf,
            batch.spans,
            batch.resources,
            batch.scopes,
            delivery.services,
            positions if len(positions) else np.zeros(len(batch.bodies), np.int64),
            delivery.skip,
        )
        self._outputs = FoldOutputs(
            table.ask,
            np.empty(n, np.int64),
            np.empty(n, np.int64),
            np.empty((16, 2 + POSITIONS), np.int64),
            np.empty(n if closed is not None else 0, np.int64),
            np.zeros(COUNTS_SIZE, np.int64),
        )
        self._filters = _NO_FILTER if closed is None else closed.filters
        self._salt = 0 if closed is None else closed.salt(table.tenant)
        self._row = 0
        self._reopened = 0
        self._resumed: list[tuple[int, int, int]] = []  # of asks: row, check, slot
        self._unknown = 0
        self._slice = delivery.slice
        pay = None if delivery.slice is None else delivery.slice.pay
        self._values = SpanValues(batch, table.rules.patterns, pay)

    def run(self) -> Folded:
        """Fold the batch as far as possible; an error is returned, not raised."""
        table = self._table
        table.touch(self._now, self._now)  # first, because a fold that fails may have opened traces
        early, error = None, None
        try:
            with np.errstate(over="ignore"):
                if self._asks:
                    self._resume()
                    self._answer()
                for end in self._pieces():
                    if self._slice is not None:
                        self._slice.pay()
                    self._take_rows(end)
                    if self._outputs.counts[ASKED]:
                        self._answer()
            if dirtied := self._outputs.counts[DIRTIED]:
                early = table.early(self._outputs.dirty[:dirtied], self._now)
        except Exception as failure:
            error = failure
        if error is not None:
            known = set(self._asks)
            self._asks += [ask for ask, *_ in self._asked() if ask not in known]
        outputs, counts = self._outputs, self._outputs.counts.tolist()
        late = outputs.late[: counts[LATENESS]]
        if not self._known_only:  # otherwise the kernel has done this
            self._arrays.skip[: self._row] = 1
            if len(late):
                self._arrays.skip[late] = 0
        table.count()
        return Folded(
            early,
            outputs.completed[: counts[COMPLETIONS]],
            outputs.spilled[: counts[SPILLS]],
            late,
            outputs.dirty[: counts[DIRTIED] if early is None else 0],
            opened=counts[OPENED],
            repeated=counts[REPEATS],
            matched=counts[MATCHED] - self._unknown,
            reopened=self._reopened,
            unknown=self._unknown,
            received_ns=self._batch.received_ns,
            replayed=self._batch.replayed,
            error=error,
        )

    def _pieces(self) -> Iterator[int]:
        """The rows after the last of each call of the kernel. All rows are one piece unless there
        are many of them, or many checks. Rows that are skipped belong to no piece."""
        n, rules = len(self._batch), self._table.rules
        checks = max(len(rules.checks), 1) * (8 if len(rules.names.arrays.globs) else 1)
        rows = max(1, min(_CELLS // checks, _PATTERN_CELLS // max(rules.patterns.count, 1)))
        most = _CELL_BYTES // checks
        sizes = None
        if len(self._batch.buf) > most:
            sizes = np.cumsum(self._batch.spans[:, MSG_LEN])
        left = np.flatnonzero(self._arrays.skip == 0)
        end = at = 0
        while at < len(left):
            start = int(left[at])
            end = min(n, start + rows)
            if sizes is not None:
                before = int(sizes[start - 1]) if start else 0
                full = int(np.searchsorted(sizes, before + most, "right"))
                end = min(end, max(start + 1, full))
            yield end
            at = int(np.searchsorted(left, end))
        if end < n:
            yield n

    def _take_rows(self, end: int) -> None:
        """Fold the rows up to ``end``."""
        table = self._table
        arrays = self._arrays
        if end < len(self._batch):
            arrays = arrays._replace(spans=self._batch.spans[:end])
        scratch = np.zeros(4, np.int64)
        ahead = np.empty((2, fold_kernels.AHEAD), np.int64)
        names = table.rules.names
        while True:
            self._row, reason = fold_kernels.fold(
                arrays,
                self._row,
                self._known_only,
                self._filters,
                self._salt,
                self._now,
                names.arrays,
                table.rule_arrays,
                table.arrays,
                self._outputs,
                scratch,
                ahead,
            )
            if reason == DONE:
                return
            if reason == LATE:
                self._reopen(int(self._outputs.counts[STOPPED_SLOT]))
            elif reason == NAMES_FULL:
                names.forget()
            elif reason == NEED_ASK:
                ask = doubled(self._outputs.ask, len(table.rules.checks))
                self._outputs = self._outputs._replace(ask=ask)
                table.ask = ask
            elif reason == NEED_SET:
                table.grow_set(int(self._outputs.counts[STOPPED_SLOT]))
            elif reason == NEED_SPILL:
                spilled = doubled(self._outputs.spilled)
                self._outputs = self._outputs._replace(spilled=spilled)
            else:
                table.grow(reason)

    def _reopen(self, slot: int) -> None:
        self._table.reopen(slot, self._now)
        self._reopened += 1

    def _resume(self) -> None:
        """Find the traces of the comparisons left over from an earlier fold."""
        table = self._table
        checks = {name: number for number, name in enumerate(table.rules.check_names)}
        other: set[Ask] = set()  # not among the rules of their traces
        slots: dict[int, int] = {}
        for row, check in self._asks:
            slot = slots.get(row, -2)
            if slot == -2:
                hi, lo = self._batch.spans[row, [TRACE_HI, TRACE_LO]].tolist()
                slot = slots[row] = table.find(hi, lo)
            if slot < 0:
                continue
            if check is not None and check not in checks:
                other.add((row, check))
                continue
            if table.arrays.slots[slot, STATE] == CLOSED:
                self._reopen(slot)
            self._resumed.append((row, -1 if check is None else checks[check], slot))
        self._asks[:] = [ask for ask in self._asks if ask not in other]

    def _asked(self) -> list[tuple[Ask, int, int]]:
        """The comparisons for Python, each with its check's number and its slot."""
        names = self._table.rules.check_names
        new = self._outputs.ask[: self._outputs.counts[ASKED]].tolist()
        return [
            ((row, None if check < 0 else names[check]), check, slot)
            for row, check, slot in [*self._resumed, *new]
        ]

    def _answer(self) -> None:
        """Evaluate in Python what the kernel asked for, and count the matches: all of them, or none
        if the entries cannot grow."""
        table = self._table
        asked = self._asked()
        matched: list[tuple[int, int, int]] = []
        failed: list[Ask] = []
        error: Exception | None = None
        for number, (ask, check, slot) in enumerate(asked):
            try:
                if self._slice is not None:
                    self._slice.pay()
                matched += [(ask[0], c, slot) for c in self._matches(ask[0], check)]
            except SliceOver as over:
                failed += [ask for ask, *_ in asked[number:]]
                error = over
                break
            except Exception as failure:  # the other comparisons are still made
                failed.append(ask)
                error = failure
        while table.spare_entries() < len(matched):
            table.grow(NEED_ENTRIES)
        if matched:
            rows = np.array(matched, np.int64)
            fold_kernels.add_asked(
                self._arrays, rows, table.rule_arrays, table.arrays, self._outputs
            )
        known = {ask for ask, *_ in asked}
        self._asks[:] = [ask for ask in self._asks if ask not in known] + failed
        self._outputs.counts[ASKED] = 0
        self._resumed.clear()
        if error is not None:
            raise error

    def _matches(self, row: int, check: int) -> list[int]:
        """The numbers under which a row is counted, of the checks that were asked for: those that
        it satisfies, and ``unknown_of`` of those of which nobody can tell."""
        rules = self._table.rules
        wanted: Sequence[int] = (check,)
        if check < 0:
            wanted = rules.names.glob_checks(self._batch.name(row).encode())
        found = []
        unknown = 0
        for c in wanted:
            predicate = rules.checks[c].where
            verdict = predicate is None or evaluate(predicate, self._values, row)
            if verdict:
                found.append(c)
            elif verdict is None:
                found.append(int(rules.unknown_of[c]))
                unknown += 1
        self._unknown += unknown
        return found
