"""trace-correlation: fold spans into the open traces of their tenant, and find traces that are due.

A trace is due early, when a count crosses a threshold at which a rule may become certain, and at
its end: when it is marked complete, is idle, or is too old. All waiting batches are folded in one
worker-thread call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import trio

from betrace.channels import SendChannel, ThreadRunner, TransientError
from betrace.service.config.settings import Settings
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.stages.backlog import Backlog
from betrace.service.rules.compile import CompiledRules
from betrace.service.signals import Signal
from betrace.service.traces.checkpoint import Snapshot
from betrace.service.traces.due import DueTraces
from betrace.service.traces.eviction import forget_closed, idle_longest
from betrace.service.traces.folding import Folded
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import CLOSED, NEVER, STATE, TraceTotals
from betrace.service.traces.partial_folds import PartialFolds
from betrace.service.traces.signal_history import LedgerHistory
from betrace.service.traces.slices import CpuSlice, SliceOver
from betrace.service.traces.table import TraceTable
from betrace.service.traces.tenant_traces import INDEX_LAG_NS, History, TenantTraces
from betrace.service.traces.window import Windows

SECOND = 1_000_000_000
SURVEY_NS = SECOND
MOST_KEPT = 10  # multiple of the configured closed traces that is kept while stores are behind
TICK_SECONDS = 0.25  # interval of the search for idle traces
# CPU seconds of a tenant in one call of the handler, which ordinary batches do not reach, and of
# all tenants together before each has only the least.
FIRST_SLICE = 0.05
ALL_SLICES = 0.25
LEAST_SLICE = 0.005
LOOKED_AT = 128  # tables searched in one tick: each due piece costs as much as ten traces


class NotNow(TransientError):  # noqa: N818
    """The traces cannot be copied now; try again a little later."""


@dataclass(slots=True)
class CorrelateCounts:
    """What the stage has done, in spans or traces."""

    folded: int = 0
    """Spans folded into traces, repeated ones included."""
    replayed: int = 0
    """Spans folded again from the log after a restart."""
    repeated: int = 0
    """Spans that arrived a second time and were not counted."""
    matched: int = 0
    """How often a span satisfied a check."""
    opened: int = 0
    """Traces."""
    reopened: int = 0
    """Closed traces that were reopened by late spans."""
    closed: int = 0
    """Traces."""
    closed_for_room: int = 0
    """Traces closed early because too many were open."""
    unknown: int = 0
    """Spans that were not counted for a check, because a text was too long for a pattern."""


@dataclass(frozen=True, slots=True)
class MemorySurvey:
    """The traces in memory at one time (nanoseconds), updated once a second."""

    taken_ns: int = 0
    open: int = 0
    closed: int = 0
    """Closed traces kept for late spans."""
    long_lived: int = 0
    """Open traces long enough to have windows."""
    spans: int = 0
    """Span ids of open traces, kept to recognize repeated spans."""
    nbytes: int = 0
    oldest_ns: int = NEVER
    """When the first span of the oldest open trace arrived; ``NEVER`` without open traces."""


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """When traces close, how long closed ones are kept (nanoseconds), how many of both there may
    be, and the windows of long traces."""

    idle_ns: int
    max_age_ns: int
    sweep_ns: int
    keep_ns: int
    keep: int
    most_open: int
    windows: Windows = field(default_factory=Windows)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The limits in the settings."""
        traces, caches = settings.traces, settings.caches
        return cls(
            idle_ns=int(traces.idle_seconds * SECOND),
            max_age_ns=int(traces.max_age_seconds * SECOND),
            sweep_ns=int(traces.sweep_seconds * SECOND),
            keep_ns=int(caches.trace_metadata_ttl_seconds * SECOND),
            keep=caches.trace_metadata,
            most_open=traces.max_open,
            windows=Windows(traces.long_lived_spans, traces.window_spans, traces.window_overlap),
        )


@dataclass(frozen=True, slots=True)
class LateSpans:
    """What late spans need: a filter of closed traces, what the stores know of them, and whether
    the stores are behind, so that closed traces must stay in memory longer."""

    closed: ClosedTraces
    history: History
    behind: Callable[[], bool] = lambda: False


class CorrelateStage:
    """The handler of the trace-correlation stage, and its clock.

    ``rules_of(tenant)`` returns a tenant's compiled rules and is called in worker threads;
    ``clock_ns`` is the wall clock in nanoseconds.
    """

    def __init__(
        self,
        rules_of: Callable[[str], CompiledRules],
        threads: ThreadRunner,
        onward: SendChannel[DueTraces],
        progress: LogProgress,
        in_flight: InFlight,
        limits: TraceLimits,
        late: LateSpans,
        clock_ns: Callable[[], int],
    ) -> None:
        self._rules_of = rules_of
        self._threads = threads
        self._onward = onward
        self._progress = progress
        self._in_flight = in_flight
        self._limits = limits
        self._late = late
        self._clock_ns = clock_ns
        self._now_ns = 0
        self._last_sweep_ns = 0
        self._next_table = 0  # where the search for idle traces continues
        self._resumed_ns = 0
        self._lock = threading.Lock()  # guards the tenants and the counts
        self.tenants: dict[str, TenantTraces] = {}
        self._totals = TraceTotals()  # totals of all tenants
        self._ledger_history = LedgerHistory()
        self._partial_folds = PartialFolds()
        self._owing: dict[str, TenantTraces] = {}  # tenants with results that are not passed on
        self.backlog = Backlog()
        """Batches of tenants that used up their CPU time."""
        self.waiting = trio.Event()
        """Set when a batch is put into the backlog."""
        self.last_failure: Exception | None = None
        """Why the last slice of the backlog failed."""
        self._rested_ns: dict[str, int] = {}  # when the backlog of a tenant ended
        self._handling = False
        self._handled = 0.0  # CPU seconds of the handler, without the backlog
        self._handled_tenants = 1  # in the last call
        self._slice_seconds = 0.0  # CPU seconds of the last slice of the backlog
        self.survey = MemorySurvey()
        self.counts = CorrelateCounts()
        self.caught_up = trio.Event()
        self.rules_changed = trio.Event()
        """Set when new traces of a tenant are opened under new rules."""
        self._changed = False

    async def handle(self, batches: list[SpanBatch]) -> list[SpanBatch]:
        """Fold batches and pass on what is due; returns those that are folded. The others are in
        :attr:`backlog`. A batch that was folded before is skipped."""
        self._handling = True
        try:
            due, error = await self._threads.run(self._fold, batches)
        finally:
            self._handling = False
        if len(self.backlog):
            self.waiting.set()
        await self._send(due, error)
        return [batch for batch in batches if self.has(batch)] if len(self.backlog) else batches

    async def fold_waiting(self) -> tuple[SpanBatch, int] | None:
        """Fold a slice of the batch in the backlog whose turn it is, and pass on what is due.

        Returns a batch that is finished and 0, or one that failed and how often it has; the latter
        stays in the backlog until :meth:`drop_waiting`."""
        await self._give_way()
        with trio.CancelScope(shield=True):  # what left the traces must be passed on
            due, error, batch, failed = await self._threads.run(self._fold_slice)
            if not len(self.backlog):
                self.waiting = trio.Event()
            try:
                await self._send(due, None)
            except trio.BrokenResourceError:
                return None  # stopped without draining: it is read again after a restart
        self.last_failure = error
        return None if batch is None else (batch, failed)

    async def worked_off(self) -> None:
        """Return when the backlog is empty."""
        while len(self.backlog):  # noqa: ASYNC110
            await trio.sleep(0.01)

    def discard_waiting(self, tenant: str) -> None:
        """Drop what a tenant that is deleted has in the backlog; call in a worker thread."""
        with self._lock:
            for batch in self.backlog.batches(tenant):
                self._progress.folded(tenant, batch.positions.tolist())
            self.backlog.forget(tenant)

    def drop_waiting(self, batch: SpanBatch) -> None:
        """Remove a batch that is kept elsewhere from the backlog."""
        with self._lock:
            self._remove_waiting(batch)

    async def _give_way(self) -> None:
        """Wait until the handler had as much CPU time for each of its tenants as the last slice of
        the backlog took, or has nothing to do."""
        tenants = max(1.0, self._handled_tenants / max(1, len(self.backlog)))
        entitled = self._handled + self._slice_seconds * tenants
        idle = 0
        while self._handled < entitled and idle < 2:
            idle = 0 if self._handling else idle + 1
            await trio.sleep(0.001)
        await trio.lowlevel.checkpoint()

    async def _send(self, due: list[DueTraces], error: Exception | None) -> None:
        if self._changed:
            self._changed = False
            self.rules_changed.set()
        await self._onward.send_each(due)
        if error is not None:
            raise error

    def has(self, batch: SpanBatch) -> bool:
        """Whether all of a batch is in its traces. It may be even if its delivery failed, because a
        later step failed."""
        positions = batch.positions[batch.positions > 0].tolist()
        return bool(positions) and not self._progress.any_pending(batch.tenant, positions)

    def look_up(self, tenant: str, trace_id: str) -> DueTraces | None:
        """A copy of one trace (32 hex digits) in memory, or None. ``closed`` says whether it was
        closed and is kept for late spans. May be called from any thread; waits while a batch is
        folded."""
        hi, lo = (int(half) for half in np.frombuffer(bytes.fromhex(trace_id), ">i8"))
        with self._lock:
            traces = self.tenants.get(tenant)
            for table in traces.tables if traces is not None else ():
                slot = table.find(hi, lo)
                if slot >= 0:
                    closed = int(table.arrays.slots[slot, STATE]) == CLOSED
                    return table.copy(np.array([slot], np.int64), closed=closed, now=0)
        return None

    async def tick(self) -> None:
        """Close traces that are due by the clock, forever. Starts at :attr:`caught_up`: no trace
        may be closed before the log is replayed, because the replay may contain its next span."""
        await self.caught_up.wait()
        while True:
            await trio.sleep(TICK_SECONDS)
            if self._is_empty():
                continue
            with trio.CancelScope(shield=True):  # what was closed must be passed on
                found, error = await self._threads.run(self._close_due)
                try:
                    await self._onward.send_each(found)
                except trio.BrokenResourceError:
                    return  # stopped without draining: they are closed again after a restart
                if error is not None:
                    raise error

    def _is_empty(self) -> bool:
        """Whether there is nothing to close, forget, pass on or report."""
        return not (self.tenants or self._owing or self.survey.open or self.survey.closed)

    def snapshot(self) -> Snapshot:
        """The state of all traces and the log positions they contain; call in a worker thread.
        Raises :exc:`NotNow` while results of a failed fold are not passed on."""
        with self._lock:
            if self._owing:
                raise NotNow("the results of a failed batch are not passed on yet; try again")
            return Snapshot(
                self._clock_ns(),
                self._progress.snapshot(),
                [traces.snapshot() for traces in self.tenants.values()],
                self._in_flight.mark(),
                ledger_history=self._ledger_history.saved(),
                partial_folds=self._partial_folds.saved(),
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot; call in a worker thread before anything is folded. Raises what
        :meth:`TenantTraces.restored` raises, and then changes nothing."""
        raised = LedgerHistory()
        raised.restore(snapshot.ledger_history)
        unfinished = PartialFolds()
        unfinished.restore(snapshot.partial_folds)
        held = TraceTotals()
        tenants = {
            saved.tenant: TenantTraces.restored(
                saved,
                self._limits.windows,
                raised.of(saved.tenant),
                held,
                unfinished.of(saved.tenant),
            )
            for saved in snapshot.tenants
        }
        with self._lock:
            for tenant, (last, pending) in snapshot.progress.items():
                self._progress.restore(tenant, last, pending)
            self.tenants = tenants
            self._totals = held
            self._ledger_history = raised
            self._partial_folds = unfinished
            self._now_ns = snapshot.taken_ns

    def note_raised(self, signals: Iterable[Signal]) -> None:
        """Take into account signals that were stored after the snapshot, in the order in which they
        were stored; call before anything is folded."""
        with self._lock:
            self._ledger_history.note(signals)

    def forget(self, tenant: str) -> int:
        """Drop all traces of a tenant that has no waiting frames; call in a worker thread. Work
        that has left the traces has tickets below the returned one."""
        with self._lock:
            traces = self.tenants.pop(tenant, None)
            for table in traces.tables if traces is not None else ():
                table.leave()
            self.backlog.forget(tenant)
            self._rested_ns.pop(tenant, None)
            self._ledger_history.forget(tenant)
            self._partial_folds.forget(tenant)
            self._owing.pop(tenant, None)
            return self._in_flight.mark()

    def replayed(self) -> None:
        """The log was read and folded. Idle times start now, because clients could not send while
        the service was down."""
        with self._lock:
            self._resumed_ns = self._time()

    def settled(self) -> None:
        """No span from before the restart can reopen a trace any more, so earlier signals of traces
        that are not in memory are forgotten here; the stores know them."""
        with self._lock:
            if len(self._ledger_history) and not len(self.backlog):
                self._ledger_history.keep(self._is_here)

    def _is_here(self, tenant: str, trace_id: str) -> bool:
        hi, lo = (int(half) for half in np.frombuffer(bytes.fromhex(trace_id), ">i8"))
        traces = self.tenants.get(tenant)
        return traces is not None and any(table.find(hi, lo) >= 0 for table in traces.tables)

    def _fold(self, batches: list[SpanBatch]) -> tuple[list[DueTraces], Exception | None]:
        """What is due, and the error that ended the fold early."""
        due: list[DueTraces] = []
        used: dict[str, float] = {}
        started = time.thread_time()
        with self._lock:
            try:
                self._pass_on(due)
                for batch in batches:
                    if self.has(batch):
                        continue  # a redelivery
                    if batch.tenant in self.backlog:
                        self.backlog.add(batch)
                        continue
                    left = min(FIRST_SLICE, ALL_SLICES + started - time.thread_time())
                    before = used.get(batch.tenant, 0.0)
                    cpu = CpuSlice(max(left, LEAST_SLICE) - before)
                    try:
                        self._fold_one(batch, cpu)
                    except SliceOver:
                        self.backlog.add(batch)
                        self.backlog.used(batch.tenant, cpu.used)
                    used[batch.tenant] = before + cpu.used
                    self._pass_on(due)
                if not self.caught_up.is_set():  # the clock does not run while the log is read
                    self._enforce_limits(self._time(), due)
            except Exception as error:
                with suppress(Exception):  # what fails here stays in _owing and is tried again
                    self._pass_on(due)
                return self._ticketed(due), error
            finally:
                self._handled += time.thread_time() - started
                self._handled_tenants = len(used) or 1
            return self._ticketed(due), None

    def _fold_slice(
        self,
    ) -> tuple[list[DueTraces], Exception | None, SpanBatch | None, int]:
        """What is due, an error, the batch that is finished or failed, and how often it failed."""
        due: list[DueTraces] = []
        with self._lock:
            found = self.backlog.next()
            if found is None:
                return due, None, None, 0
            batch, seconds = found
            cpu = CpuSlice(seconds, certain=True)
            finished, failed, error = False, 0, None
            try:
                self._pass_on(due)
                if not self.has(batch):
                    self._fold_one(batch, cpu)
                finished = True
            except SliceOver:
                pass
            except Exception as failure:
                error, failed = failure, self.backlog.failed(batch)
            try:
                self._pass_on(due)
            except Exception as failure:  # it stays in _owing and is tried again
                error = error or failure
            self._slice_seconds = cpu.used
            self.backlog.used(batch.tenant, cpu.used)
            if finished:
                self._remove_waiting(batch)
            return self._ticketed(due), error, batch if finished or failed else None, failed

    def _remove_waiting(self, batch: SpanBatch) -> None:
        if self.backlog.done(batch):
            self._rested_ns[batch.tenant] = self._time()

    def _ticketed(self, due: list[DueTraces]) -> list[DueTraces]:
        for traces in due:
            traces.ticket = self._in_flight.enter()
        return due

    def _fold_one(self, batch: SpanBatch, cpu: CpuSlice) -> None:
        """Fold a batch. Even if it fails, or ``cpu`` is used up, its results so far are added to
        what must be passed on."""
        traces = self._traces(batch.tenant)
        self._owing[batch.tenant] = traces
        now = batch.received_ns if batch.replayed else self._time()
        # A fold can stop only between frames and rows that the log knows.
        cut = cpu if (batch.positions > 0).all() and len(batch.positions) else None
        traces.owed += traces.fold(batch, now, self._late.closed, self._late.history, cut)
        self._progress.folded(batch.tenant, batch.positions.tolist())
        if batch.replayed:
            self.counts.replayed += len(batch)
        else:
            self.counts.folded += len(batch)

    def _pass_on(self, due: list[DueTraces]) -> None:
        """Add the results of folding to ``due``, and close complete traces. What an error leaves
        behind stays in ``_owing``; no trace is touched before it is passed on."""
        while self._owing:
            tenant, traces = next(iter(self._owing.items()))
            while traces.owed:
                self._settle(*traces.owed[0], due)
                del traces.owed[0]
            del self._owing[tenant]

    def _settle(self, table: TraceTable, folded: Folded, due: list[DueTraces]) -> None:
        if len(folded.dirty):
            folded.early = table.early(folded.dirty, self._time())
            folded.dirty = folded.dirty[:0]
        if folded.early is not None:
            folded.early.received_ns = folded.received_ns
            due.append(folded.early)
            folded.early = None
        counts = self.counts
        complete = folded.completed
        if folded.replayed:  # the log may contain more of it: decided at the end
            complete = table.without_history(complete)
        if len(complete) or len(folded.spilled):
            closed = table.close(complete, self._time())
            closed.spilled = folded.spilled
            counts.closed += len(closed)
            due.append(closed)
        counts.repeated += folded.repeated
        counts.matched += folded.matched
        counts.opened += folded.opened
        counts.reopened += folded.reopened
        counts.unknown += folded.unknown

    def _traces(self, tenant: str) -> TenantTraces:
        rules = self._rules_of(tenant)
        traces = self.tenants.get(tenant)
        if traces is None:
            before = self._ledger_history.of(tenant)
            unfinished = self._partial_folds.of(tenant)
            traces = TenantTraces(
                tenant, rules, self._limits.windows, before, self._totals, unfinished
            )
            self.tenants[tenant] = traces
        elif traces.rules is not rules:
            self._changed |= traces.rules.version != rules.version
            traces.rules = rules
        return traces

    def _close_due(self) -> tuple[list[DueTraces], Exception | None]:
        """What is due by the clock, and the error that ended the search early."""
        found: list[DueTraces] = []
        with self._lock:
            try:
                self._look_for_due(self._time(), found)
            except Exception as error:
                return self._ticketed(found), error
            return self._ticketed(found), None

    def _look_for_due(self, now: int, found: list[DueTraces]) -> None:
        limits = self._limits
        self._pass_on(found)
        before = len(found)
        sweep = now - self._last_sweep_ns >= limits.sweep_ns
        if sweep:
            self._last_sweep_ns = now
        if not 0 <= now - self._resumed_ns < limits.idle_ns:
            tables = [table for table in self._tables() if not self._is_waiting(table, now)]
            for table in self._in_turn(tables):
                table.close_idle(now - limits.idle_ns, now, found)
            for table in tables if sweep else ():
                table.close_old(now - limits.max_age_ns, now, found)
        self.counts.closed += sum(len(due) for due in found[before:])
        self._enforce_limits(now, found)
        for tenant, traces in list(self.tenants.items()) if sweep else ():
            if not traces.open_count and not traces.closed_count:
                del self.tenants[tenant]
        self._update_survey(now)

    def _is_waiting(self, table: TraceTable, now: int) -> bool:
        """Whether spans of the table's traces may be in the backlog, or were until now: such traces
        are not idle."""
        if table.tenant in self.backlog:
            return True
        rested = self._rested_ns.get(table.tenant)
        if rested is None:
            return False
        if not 0 <= now - rested < self._limits.idle_ns:
            del self._rested_ns[table.tenant]
            return False
        return True

    def _in_turn(self, tables: list[TraceTable]) -> list[TraceTable]:
        """The tables to search in this tick: all if there are few, each once in two seconds if
        there are thousands."""
        start = self._next_table if self._next_table < len(tables) else 0
        self._next_table = start + max(LOOKED_AT, len(tables) // 8)
        return tables[start : self._next_table]

    def _enforce_limits(self, now: int, found: list[DueTraces]) -> None:
        """Close open traces above the limit; forget traces closed long ago, and the oldest closed
        ones above the limit."""
        limits = self._limits
        tables = self._tables()
        excess = self._totals.open - limits.most_open
        for table, slots in idle_longest(tables, excess) if excess > 0 else ():
            found.append(table.close(slots, now))
            self.counts.closed_for_room += len(slots)
            self.counts.closed += len(slots)
        excess = self._totals.closed - limits.keep
        lag_ns = INDEX_LAG_NS
        # Above MOST_KEPT even closed traces that are not in the index yet may be forgotten.
        if self._totals.closed <= MOST_KEPT * limits.keep:
            lag_ns += self._in_flight.oldest_ns()
            if self._late.behind():
                excess, lag_ns = 0, now
        long_ago = now - max(limits.keep_ns, lag_ns)
        forget_closed(tables, long_ago, now - lag_ns, excess, self._late.closed)
        for traces in self.tenants.values() if len(tables) > len(self.tenants) else ():
            traces.drop_empty()

    def _tables(self) -> list[TraceTable]:
        return [table for traces in self.tenants.values() for table in traces.tables]

    def _time(self) -> int:
        """The wall clock. If it was set back, all times of the traces are moved back as well."""
        now = self._clock_ns()
        by = now - self._now_ns
        if self._now_ns and by < 0:
            for traces in self.tenants.values():
                traces.shift(by)
            self._last_sweep_ns += by
            self._rested_ns = {tenant: at + by for tenant, at in self._rested_ns.items()}
            self._resumed_ns += by
        self._now_ns = now
        return now

    def _update_survey(self, now: int) -> None:
        """Update the survey once a second."""
        if 0 <= now - self.survey.taken_ns < SURVEY_NS:
            return
        found = [table.survey() for table in self._tables()]
        self.survey = MemorySurvey(
            now,
            open=self._totals.open,
            closed=self._totals.closed,
            long_lived=sum(each.long_lived for each in found),
            spans=sum(each.spans for each in found),
            nbytes=sum(each.nbytes for each in found),
            oldest_ns=min((each.oldest_ns for each in found), default=NEVER),
        )
