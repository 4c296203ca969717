"""A tenant's traces, under as many versions of its rules as open traces need.

A trace is decided by the rules that it was opened under. When rules change, a new table takes
the traces that begin from then on; the old ones go on until their last trace has closed and is
forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
from betrace.service.traces.eviction import Held
from betrace.service.traces.folding import Folded
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.partial_folds import Ask, UnfinishedFrames
from betrace.service.traces.signal_history import Told
from betrace.service.traces.table import TraceTable
from betrace.service.traces.window import Windows

MOST_SERVICES = 4096  # numbered service names of a tenant; further ones share OTHER_SERVICES
OTHER_SERVICES = "(other services)"

INDEX_LAG_NS = 2_000_000_000  # a trace closed before the oldest one on its way is in the index


@dataclass(frozen=True, slots=True, eq=False)
class Recalled:
    """Closed traces read from the log: their ids, rows of (hi, lo); for each whether all of it
    could be read, and what was told of it; and the spans of the frames that hold them, among
    others. ``lost`` are ids of traces of which nothing could be read, though there may be
    something."""

    ids: Rows
    whole: list[bool]
    batch: SpanBatch | None
    lost: Rows
    told: Sequence[Told] = ()


History = Callable[[str, Rows], Iterable[Recalled]]
"""Given a tenant and trace ids, rows of (hi, lo), what the index and the log have of
them, in rounds: each trace is in one of them at most."""


Part = tuple[TraceTable, Folded]
"""What came of folding a batch into one of the tables."""


class TenantTraces:
    """Open and recently closed traces of one tenant. Not thread-safe: one thread at a time."""

    def __init__(
        self,
        tenant: str,
        rules: CompiledRules,
        windows: Windows | None = None,
        before: dict[str, Told] | None = None,
        held: Held | None = None,
        unfinished: UnfinishedFrames | None = None,
    ) -> None:
        self.tenant = tenant
        self._unfinished = UnfinishedFrames() if unfinished is None else unfinished
        self.owed: list[Part] = []
        """What came of folds that failed later on, and is yet to be passed on."""
        self._windows = windows or Windows()
        self._before = {} if before is None else before
        self._held = Held() if held is None else held
        self.services = [""]  # by number; 0 is none
        self._numbers: dict[bytes, int] = {}
        self.tables = [self._table(rules)]

    @classmethod
    def restored(
        cls,
        saved: TenantSnapshot,
        windows: Windows | None = None,
        before: dict[str, Told] | None = None,
        held: Held | None = None,
        unfinished: UnfinishedFrames | None = None,
    ) -> TenantTraces:
        """A tenant's traces as a snapshot has them.

        Raises ValueError where its rules do not compile to the checks they had, as a snapshot of
        another version of this program may.
        """
        compiled = []
        for table in saved.tables:
            rules = compile_definitions(table.definitions, table.version)
            if list(rules.check_names) != table.check_names:
                raise ValueError(f"the rules of {saved.tenant} compile to other checks now")
            compiled.append(rules)
        traces = cls(saved.tenant, compiled[-1], windows, before, held, unfinished)
        for service in saved.services[1:]:
            traces._number(service.encode())
        traces.tables = [traces._table(rules) for rules in compiled]
        for restored, table in zip(traces.tables, saved.tables, strict=True):
            restored.restore(table)
        return traces

    def snapshot(self) -> TenantSnapshot:
        """Copies of everything, for a checkpoint."""
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
        for i, table in enumerate(self.tables):  # changed back while old traces are still open
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
    ) -> list[Part]:
        """Add the spans of a batch, received at ``now`` (nanoseconds), to their traces.

        Spans that may belong to a trace which was closed and forgotten (``closed`` says so) are
        added to what ``history`` reads of it from the log. Where it fails, what has come of it is
        added to :attr:`owed`, and folding the same frames again folds the rest of them.
        """
        done: list[Part] = []
        skip, asks = self._unfinished.rest(batch)
        try:
            services = self._service_numbers(batch)
            newest = self.tables[-1]
            for table in self.tables[:-1]:
                _add(done, table, table.fold(batch, services, now, skip, asks, known_only=True))
            first = newest.fold(batch, services, now, skip, asks, closed=closed)
            _add(done, newest, first)
            if len(first.late) or asks:
                lost = self._recall(batch, skip, asks, history)
                second = newest.fold(batch, services, now, skip, asks)
                newest.mark_partial(lost)
                _add(done, newest, second)
        except Exception:
            self.owed += done
            self._unfinished.note(batch, skip, asks)
            raise
        self._unfinished.done(batch)
        return done

    def _recall(
        self, batch: SpanBatch, skip: Bytes, asks: list[Ask], history: History | None
    ) -> Rows:
        """Fold closed traces again from the log into the newest table: those of the rows that are
        left. Returns the ids of those of which nothing could be read."""
        rows = np.flatnonzero(skip == 0).tolist() + [row for row, _ in asks]
        ids = np.unique(batch.spans[rows][:, [TRACE_HI, TRACE_LO]], axis=0)
        lost = [ids[:0]]
        for recalled in history(self.tenant, ids) if history is not None else ():
            lost.append(recalled.lost)
            if recalled.batch is None:
                continue
            self._take_back(recalled.batch, recalled)
            if len(batch.positions):  # of this batch it may have read some, left from before
                read = np.isin(batch.positions, recalled.batch.positions)[batch.spans[:, BODY]]
                taken = read & _of_traces(batch, recalled.ids)
                skip[taken] = 1
                asks[:] = [ask for ask in asks if not taken[ask[0]]]
        return np.concatenate(lost)

    def _take_back(self, batch: SpanBatch, recalled: Recalled) -> None:
        """Fold what was read of closed traces; where that fails, nothing of them."""
        newest = self.tables[-1]
        wanted = _of_traces(batch, recalled.ids)
        skip = (~wanted).astype(np.uint8)
        services = self._service_numbers(batch)
        try:
            folded = newest.fold(batch, services, batch.received_ns, skip, [])
            if folded.error is not None:
                raise folded.error
            newest.recall(recalled.ids, recalled.told)
            newest.mark_partial(recalled.ids[~np.array(recalled.whole, bool)])
        except Exception:
            newest.drop(recalled.ids)
            raise
        self._unfinished.took(batch, wanted)

    def close_due(self, now: int, idle_ns: int, oldest_ns: int | None = None) -> list[DueTraces]:
        """Close traces that were idle for ``idle_ns``, or began ``oldest_ns`` ago; all times in
        nanoseconds. Looks for old ones only where ``oldest_ns`` is given."""
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
        closed within ``lag_ns``, which the trace index may not have; ``closed`` remembers their
        ids."""
        freed = 0
        for table in self.tables:
            most = table.closed_count - keep
            freed += table.evict(now - max(keep_ns, lag_ns), now - lag_ns, most, closed)
        self.drop_empty()
        return freed

    def shift(self, by: int) -> None:
        """Count all times of receipt and closing as ``by`` nanoseconds later."""
        for table in self.tables:
            table.shift(by)

    def _table(self, rules: CompiledRules) -> TraceTable:
        return TraceTable(
            self.tenant, rules, self.services, self._windows, self._before, self._held
        )

    def drop_empty(self) -> None:
        """Drop the tables of former rules that hold nothing any more."""
        if len(self.tables) == 1:
            return
        self.tables = [
            table for table in self.tables[:-1] if table.open_count or table.closed_count
        ] + self.tables[-1:]

    def _service_numbers(self, batch: SpanBatch) -> Rows:
        """The number of each resource's service, 0 without one."""
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
    """Which rows of a batch are of these traces."""
    of = batch.spans[:, [TRACE_HI, TRACE_LO]]
    wanted = np.zeros(len(batch), bool)
    for pair in ids:
        wanted |= (of == pair).all(axis=1)
    return wanted
