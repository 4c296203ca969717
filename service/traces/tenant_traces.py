"""A tenant's traces, with a table for each version of its rules that open traces need.

A trace is decided by the rules it was opened under. When rules change, traces that begin afterwards
go into a new table; an old table stays until its last trace has closed and is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from betrace.service.otlp.columns import (
    BODY,
    SERVICE_LEN,
    SERVICE_OFF,
    TRACE_HI,
    TRACE_LO,
    Bytes,
    Rows,
    SpanBatch,
)
from betrace.service.rules.compile import CompiledRules, compile_definitions
from betrace.service.traces.checkpoint import TenantSnapshot
from betrace.service.traces.due import DueTraces
from betrace.service.traces.folding import Delivery, Folded, FoldRun
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import TraceTotals
from betrace.service.traces.partial_folds import Ask, TenantPartialFolds
from betrace.service.traces.signal_history import SignalHistory
from betrace.service.traces.slices import CpuSlice
from betrace.service.traces.table import TraceTable
from betrace.service.traces.window import Windows

MOST_SERVICES = 4096  # service names with a number of their own; others share OTHER_SERVICES
OTHER_SERVICES = "(other services)"

INDEX_LAG_NS = 2_000_000_000  # after it, closed traces are in the index, unless stores are behind


@dataclass(frozen=True, slots=True, eq=False)
class Recalled:
    """Closed traces read back from the log."""

    ids: Rows
    """Rows (hi, lo)."""
    whole: list[bool]
    """For each of the ids, whether all spans of the trace could be read; known once all batches
    are read."""
    batch: SpanBatch | None
    """The spans of the frames that contain the traces, and of other traces in those frames."""
    lost: Rows
    """Ids of traces that may exist, but could not be read."""
    signal_history: Sequence[SignalHistory] = ()
    """For each of the ids, the signals of the trace."""
    more: Iterable[SpanBatch] = ()
    """Further batches, if there are too many spans for one. They are read when they are needed."""
    rules: CompiledRules | None = None
    """The rules the traces were opened under; None for those of new traces."""


History = Callable[[str, Rows], Iterable[Recalled]]
"""Reads closed traces of a tenant from the index and the log, given rows (hi, lo). A trace is in at
most one of the results."""

Part = tuple[TraceTable, Folded]
"""A table, and the results of folding a batch into it."""


class TenantTraces:
    """Open and recently closed traces of one tenant. Not thread-safe: use one thread at a time.

    ``ledger_history`` are the signals from before a restart, by trace id; ``totals`` are updated
    with the numbers of traces; ``partial_folds`` are the frames that were folded in part.
    """

    def __init__(
        self,
        tenant: str,
        rules: CompiledRules,
        windows: Windows | None = None,
        ledger_history: dict[str, SignalHistory] | None = None,
        totals: TraceTotals | None = None,
        partial_folds: TenantPartialFolds | None = None,
    ) -> None:
        self.tenant = tenant
        self._partial_folds = TenantPartialFolds() if partial_folds is None else partial_folds
        self.owed: list[Part] = []
        """Results of folds that failed afterwards; they have not been passed on yet."""
        self._windows = windows or Windows()
        self._ledger_history = {} if ledger_history is None else ledger_history
        self._totals = TraceTotals() if totals is None else totals
        self.services = [""]  # by number; 0 stands for no service
        self._numbered: tuple[SpanBatch, Rows] | None = None  # of the batch whose fold stopped
        self._numbers: dict[bytes, int] = {}
        self.tables = [self._table(rules)]

    @classmethod
    def restored(
        cls,
        saved: TenantSnapshot,
        windows: Windows | None = None,
        ledger_history: dict[str, SignalHistory] | None = None,
        totals: TraceTotals | None = None,
        partial_folds: TenantPartialFolds | None = None,
    ) -> TenantTraces:
        """A tenant's traces from a snapshot.

        Raises ValueError if its rules no longer compile to the same checks, which can happen with a
        snapshot of another version of this program.
        """
        compiled = []
        for table in saved.tables:
            rules = compile_definitions(table.definitions, table.version)
            if list(rules.check_names) != table.check_names:
                raise ValueError(f"the rules of {saved.tenant} now compile to other checks")
            compiled.append(rules)
        traces = cls(saved.tenant, compiled[-1], windows, ledger_history, totals, partial_folds)
        for service in saved.services[1:]:
            traces._number(service.encode())
        traces.tables = [traces._table(rules) for rules in compiled]
        for restored, table in zip(traces.tables, saved.tables, strict=True):
            restored.restore(table)
        return traces

    def snapshot(self) -> TenantSnapshot:
        """A copy of all traces, for a checkpoint."""
        tables = [table.snapshot() for table in self.tables]
        return TenantSnapshot(self.tenant, list(self.services), tables)

    @property
    def rules(self) -> CompiledRules:
        """The rules that new traces are opened under."""
        return self.tables[-1].rules

    @rules.setter
    def rules(self, rules: CompiledRules) -> None:
        if rules.version == self.rules.version:
            return
        for i, table in enumerate(self.tables):  # changed back while old traces are open
            if table.rules.version == rules.version:
                self.tables.append(self.tables.pop(i))
                return
        self.tables.append(self._table(rules))
        self.drop_empty()

    @property
    def open_count(self) -> int:
        """Open traces."""
        return sum(table.open_count for table in self.tables)

    @property
    def closed_count(self) -> int:
        """Closed traces kept for late spans."""
        return sum(table.closed_count for table in self.tables)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(table.nbytes for table in self.tables)

    def fold(
        self,
        batch: SpanBatch,
        now: int,
        closed: ClosedTraces | None = None,
        history: History | None = None,
        slice: CpuSlice | None = None,
    ) -> list[Part]:
        """Add the spans of a batch, received at ``now`` (nanoseconds), to their traces.

        If a trace may have been closed and forgotten (it is in ``closed``), ``history`` first reads
        it back from the log. If the fold fails, its results so far are added to :attr:`owed`, and
        folding the same frames again folds their remainder. The same happens if ``slice`` is over
        (:exc:`~betrace.service.traces.slices.SliceOver`).
        """
        done: list[Part] = []
        skip, asks = self._partial_folds.remainder(batch)
        try:
            if self._numbered is None or self._numbered[0] is not batch:
                self._numbered = batch, self._service_numbers(batch)
            delivery = Delivery(batch, self._numbered[1], now, skip, asks, slice)
            newest = self.tables[-1]
            for table in self.tables[:-1]:
                _add(done, table, FoldRun(table, delivery, known_only=True).run())
            first = FoldRun(newest, delivery, closed=closed).run()
            _add(done, newest, first)
            if len(first.late) or asks:
                lost, former = self._recall(batch, skip, asks, history)
                for table in former:
                    _add(done, table, FoldRun(table, delivery, known_only=True).run())
                second = FoldRun(newest, delivery).run()
                newest.mark_partial(lost)
                _add(done, newest, second)
        except Exception:
            self.owed += done
            self._partial_folds.stopped(batch, skip, asks)
            raise
        self._numbered = None
        self._partial_folds.done(batch)
        return done

    def _recall(
        self, batch: SpanBatch, skip: Bytes, asks: list[Ask], history: History | None
    ) -> tuple[Rows, list[TraceTable]]:
        """Fold the closed traces of the remaining rows again from the log, each into the table of
        its rules. Returns the ids of traces that could not be read, and the tables of former rules
        that were used."""
        rows = np.flatnonzero(skip == 0).tolist() + [row for row, _ in asks]
        ids = np.unique(batch.spans[rows][:, [TRACE_HI, TRACE_LO]], axis=0)
        lost = [ids[:0]]
        former: list[TraceTable] = []
        for recalled in history(self.tenant, ids) if history is not None else ():
            lost.append(recalled.lost)
            if recalled.batch is None:
                continue
            table = self._table_of(recalled.rules)
            if table is not self.tables[-1] and table not in former:
                former.append(table)
            positions = self._take_back(table, chain([recalled.batch], recalled.more), recalled)
            if len(batch.positions):  # the history may include spans of this very batch
                read = np.isin(batch.positions, positions)[batch.spans[:, BODY]]
                taken = read & _of_traces(batch, recalled.ids)
                skip[taken] = 1
                asks[:] = [ask for ask in asks if not taken[ask[0]]]
        return np.concatenate(lost), former

    def _table_of(self, rules: CompiledRules | None) -> TraceTable:
        """The table of traces that were opened under these rules; None stands for the newest."""
        for table in self.tables:
            if rules is not None and table.rules.version == rules.version:
                return table
        if rules is None:
            return self.tables[-1]
        table = self._table(rules)
        self.tables.insert(0, table)
        return table

    def _take_back(
        self, table: TraceTable, batches: Iterable[SpanBatch], recalled: Recalled
    ) -> Rows:
        """Fold the spans read of closed traces; if that fails, none of them. Returns the positions
        of their frames."""
        positions: list[Rows] = []
        folded: list[tuple[SpanBatch, npt.NDArray[np.bool_]]] = []
        try:
            for batch in batches:
                wanted = _of_traces(batch, recalled.ids)
                skip = (~wanted).astype(np.uint8)
                numbers = self._service_numbers(batch)
                result = FoldRun(table, Delivery(batch, numbers, batch.received_ns, skip, [])).run()
                if result.error is not None:
                    raise result.error
                positions.append(batch.positions)
                if len(self._partial_folds):
                    folded.append((batch, wanted))
            table.recall(recalled.ids, recalled.signal_history)
            table.mark_partial(recalled.ids[~np.array(recalled.whole, bool)])
        except Exception:
            table.drop(recalled.ids)
            raise
        for batch, wanted in folded:
            self._partial_folds.folded(batch, wanted)
        return np.concatenate(positions)

    def close_due(self, now: int, idle_ns: int, oldest_ns: int | None = None) -> list[DueTraces]:
        """Close traces that were idle for ``idle_ns`` and, if given, those that began ``oldest_ns``
        ago; all times in nanoseconds."""
        due: list[DueTraces] = []
        for table in self.tables:
            table.close_idle(now - idle_ns, now, due)
            if oldest_ns is not None:
                table.close_old(now - oldest_ns, now, due)
        return due

    def evict(
        self,
        now: int,
        keep_ns: int,
        keep: int,
        closed: ClosedTraces,
        lag_ns: int = INDEX_LAG_NS,
    ) -> int:
        """Forget traces closed more than ``keep_ns`` ago and the oldest beyond ``keep``, but none
        closed within ``lag_ns``, because the trace index may not have them yet. Their ids are added
        to ``closed``. Returns how many were forgotten."""
        freed = 0
        for table in self.tables:
            most = table.closed_count - keep
            freed += table.evict(now - max(keep_ns, lag_ns), now - lag_ns, most, closed)
        self.drop_empty()
        return freed

    def shift(self, by: int) -> None:
        """Move all times of receipt and closing ``by`` nanoseconds later."""
        for table in self.tables:
            table.shift(by)

    def _table(self, rules: CompiledRules) -> TraceTable:
        return TraceTable(
            self.tenant, rules, self.services, self._windows, self._ledger_history, self._totals
        )

    def drop_empty(self) -> None:
        """Drop the empty tables of former rules."""
        if len(self.tables) == 1:
            return
        self.tables = [
            table for table in self.tables[:-1] if table.open_count or table.closed_count
        ] + self.tables[-1:]

    def _service_numbers(self, batch: SpanBatch) -> Rows:
        """The service number of each resource, 0 without a service."""
        numbers = np.zeros(len(batch.resources), np.int64)
        for i, (offset, length) in enumerate(
            batch.resources[:, [SERVICE_OFF, SERVICE_LEN]].tolist()
        ):
            if length > 0:
                numbers[i] = self._number(batch.buf[offset : offset + length].tobytes())
        return numbers

    def _number(self, service: bytes) -> int:
        number = self._numbers.get(service)
        if number is None:
            if len(self.services) > MOST_SERVICES:
                return len(self.services) - 1
            full = len(self.services) == MOST_SERVICES
            self.services.append(OTHER_SERVICES if full else service.decode())
            number = len(self.services) - 1
            if not full:
                self._numbers[service] = number
        return number


def _add(done: list[Part], table: TraceTable, folded: Folded) -> None:
    done.append((table, folded))
    if folded.error is not None:
        raise folded.error


def _of_traces(batch: SpanBatch, ids: Rows) -> npt.NDArray[np.bool_]:
    """Which rows of a batch belong to these traces."""
    wanted = np.zeros(len(batch), bool)
    rows = np.flatnonzero(np.isin(batch.spans[:, TRACE_LO], ids[:, 1]))
    of = batch.spans[rows][:, [TRACE_HI, TRACE_LO]]
    for pair in ids:
        wanted[rows] |= (of == pair).all(axis=1)
    return wanted
