"""trace-correlation: fold spans into the open traces of their tenant, and find what is due.

A trace is due early, when a count crossed a threshold at which a rule may become certain, and
at its end: when it says so itself, is idle, or is too old. Folding is one worker-thread call for
all batches that wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import trio

from betrace.channels import SendChannel, ThreadRunner, TransientError
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.progress import InFlight, LogProgress
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
from betrace.service.traces.table import TraceTable
from betrace.service.traces.tenant_traces import INDEX_LAG_NS, History, TenantTraces
from betrace.service.traces.window import Windows

SURVEY_NS = 1_000_000_000
MOST_KEPT = 10  # times as many closed traces as are asked for, while stores are behind
TICK_SECONDS = 0.25  # idle traces are looked for this often
LOOKED_AT = 128  # tenants' traces in one tick: each piece that is due costs as much as ten traces


class NotNow(TransientError):  # noqa: N818
    """The traces cannot be copied at this moment; a little later they can."""


@dataclass(slots=True)
class CorrelateCounts:
    """What the stage has done, in spans or traces."""

    folded: int = 0
    """Spans taken into traces, repeated ones included."""
    replayed: int = 0
    """Spans taken into traces again from the log, after a restart."""
    repeated: int = 0
    """Spans that came a second time and were not counted."""
    matched: int = 0
    """Times that a span satisfied a check."""
    opened: int = 0
    """Traces."""
    reopened: int = 0
    """Closed traces to which spans came late."""
    closed: int = 0
    """Traces."""
    closed_for_room: int = 0
    """Traces closed early because too many were open."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The traces in memory at one time (nanoseconds), renewed once a second."""

    taken_ns: int = 0
    open: int = 0
    closed: int = 0
    """Closed traces kept for late spans."""
    long_lived: int = 0
    """Open traces long enough to have windows."""
    spans: int = 0
    """Span ids held for open traces, to tell repeated ones."""
    nbytes: int = 0
    oldest_ns: int = NEVER
    """When the first span of the oldest open trace came; ``NEVER`` without one."""


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """When traces close, how long closed ones are kept (nanoseconds), and how many there may be."""

    idle_ns: int
    max_age_ns: int
    sweep_ns: int
    keep_ns: int
    keep: int
    most_open: int


class CorrelateStage:
    """The handler of the trace-correlation stage, and its clock.

    ``rules_of(tenant)`` gives a tenant's compiled rules and is called in worker threads;
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
        closed: ClosedTraces,
        history: History,
        windows: Windows,
        clock_ns: Callable[[], int],
        behind: Callable[[], bool] = lambda: False,
    ) -> None:
        self._rules_of = rules_of
        self._threads = threads
        self._onward = onward
        self._progress = progress
        self._in_flight = in_flight
        self._limits = limits
        self._closed = closed
        self._history = history
        self._windows = windows
        self.survey = Survey()
        self._clock_ns = clock_ns
        self._lock = threading.Lock()  # of the tenants and the counts
        self._behind = behind
        self._now_ns = 0
        self._last_sweep_ns = 0
        self._looked_at = 0  # how many of the tables, in this round
        self._resumed_ns = 0
        self.tenants: dict[str, TenantTraces] = {}
        self._held = TraceTotals()  # by all of them
        self.counts = CorrelateCounts()
        self._raised = LedgerHistory()
        self._unfinished = PartialFolds()
        self._owing: dict[str, TenantTraces] = {}  # that have something to pass on of a failure
        self.caught_up = trio.Event()
        self.rules_changed = trio.Event()
        """A tenant's new traces are opened under other rules from now on."""
        self._changed = False

    async def handle(self, batches: list[SpanBatch]) -> None:
        """Fold batches and pass on what is due. A batch that was folded before is passed over."""
        due, error = await self._threads.run(self._fold, batches)
        if self._changed:
            self._changed = False
            self.rules_changed.set()
        for traces in due:
            await self._onward.send(traces)
        if error is not None:
            raise error

    def has(self, batch: SpanBatch) -> bool:
        """Whether all of a batch is in its traces, though its delivery may have failed: by what
        came after it."""
        positions = batch.positions[batch.positions > 0].tolist()
        return bool(positions) and not self._progress.any_pending(batch.tenant, positions)

    def look_up(self, tenant: str, trace_id: str) -> DueTraces | None:
        """A copy of one trace (32 hex digits) that is in memory, None where there is none.
        ``closed`` says whether it was closed and is kept for late spans. May be called from any
        thread; waits while a batch is folded."""
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
        """Close the traces whose time has come, for ever, from :attr:`caught_up` on: until
        the log is replayed no trace may be closed, since the replay may hold its next span."""
        await self.caught_up.wait()
        while True:
            await trio.sleep(TICK_SECONDS)
            with trio.CancelScope(shield=True):  # what was closed must be passed on
                found, error = await self._threads.run(self._close_due)
                try:
                    for due in found:
                        await self._onward.send(due)
                except trio.BrokenResourceError:
                    return  # stopped without draining: a restart closes them again
                if error is not None:
                    raise error

    def snapshot(self) -> Snapshot:
        """The state of all traces, and of the log as far as they go; in a worker thread. Raises
        :exc:`NotNow` while something that left the traces when a fold failed is not passed on."""
        with self._lock:
            if self._owing:
                raise NotNow("what came of a batch that failed is not passed on yet")
            return Snapshot(
                self._clock_ns(),
                self._progress.snapshot(),
                [traces.snapshot() for traces in self.tenants.values()],
                self._in_flight.mark(),
                ledger_history=self._raised.saved(),
                partial_folds=self._unfinished.saved(),
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; before anything is folded, in a worker thread. Where it cannot be
        used, which raises what :meth:`TenantTraces.restored` does, nothing is changed."""
        raised = LedgerHistory()
        raised.restore(snapshot.ledger_history)
        unfinished = PartialFolds()
        unfinished.restore(snapshot.partial_folds)
        held = TraceTotals()
        tenants = {
            saved.tenant: TenantTraces.restored(
                saved, self._windows, raised.of(saved.tenant), held, unfinished.of(saved.tenant)
            )
            for saved in snapshot.tenants
        }
        with self._lock:
            for tenant, (last, pending) in snapshot.progress.items():
                self._progress.restore(tenant, last, pending)
            self.tenants = tenants
            self._held = held
            self._raised = raised
            self._unfinished = unfinished
            self._now_ns = snapshot.taken_ns

    def note_raised(self, signals: Iterable[Signal]) -> None:
        """Take signals into account that were stored after the snapshot, in the order in which they
        were; before anything is folded."""
        with self._lock:
            self._raised.note(signals)

    def forget(self, tenant: str) -> int:
        """Drop all traces of a tenant of whom no frame is waiting; in a worker thread. What had
        left them has tickets below the one that is returned."""
        with self._lock:
            traces = self.tenants.pop(tenant, None)
            for table in traces.tables if traces is not None else ():
                table.leave()
            self._raised.forget(tenant)
            self._unfinished.forget(tenant)
            self._owing.pop(tenant, None)
            return self._in_flight.mark()

    def replayed(self) -> None:
        """The log is read, and what could be folded is. Clients had nobody to send to: traces are
        idle from now on."""
        with self._lock:
            self._resumed_ns = self._time()

    def settled(self) -> None:
        """No span from before the restart is left that might open a trace again: what was raised of
        traces that are not in memory is known by other ways."""
        with self._lock:
            if len(self._raised):
                self._raised.keep(self._is_here)

    def _is_here(self, tenant: str, trace_id: str) -> bool:
        hi, lo = (int(half) for half in np.frombuffer(bytes.fromhex(trace_id), ">i8"))
        traces = self.tenants.get(tenant)
        return traces is not None and any(table.find(hi, lo) >= 0 for table in traces.tables)

    def _fold(self, batches: list[SpanBatch]) -> tuple[list[DueTraces], Exception | None]:
        """What is due, and the error that stopped before the end."""
        due: list[DueTraces] = []
        with self._lock:
            try:
                self._pass_on(due)
                for batch in batches:
                    if self.has(batch):
                        continue  # a redelivery
                    self._fold_one(batch)
                    self._progress.folded(batch.tenant, batch.positions.tolist())
                    self._pass_on(due)
                if not self.caught_up.is_set():  # while the log is read nothing else makes room
                    self._make_room(self._time(), due)
            except Exception as error:
                with suppress(Exception):  # what cannot be passed on now will be, or holds up more
                    self._pass_on(due)
                return self._ticketed(due), error
            return self._ticketed(due), None

    def _ticketed(self, due: list[DueTraces]) -> list[DueTraces]:
        for traces in due:
            traces.ticket = self._in_flight.enter()
        return due

    def _fold_one(self, batch: SpanBatch) -> None:
        """Fold a batch. Whether it fails or not, what came of it is then owed."""
        traces = self._traces(batch.tenant)
        self._owing[batch.tenant] = traces
        now = batch.received_ns if batch.replayed else self._time()
        traces.owed += traces.fold(batch, now, self._closed, self._history)
        if batch.replayed:
            self.counts.replayed += len(batch)
        else:
            self.counts.folded += len(batch)

    def _pass_on(self, due: list[DueTraces]) -> None:
        """Add to ``due`` what came of folding, and close what is complete. What an error leaves is
        still owed; no trace is touched before that is settled."""
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
        if folded.replayed:  # more of it may be read: decided at the end
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

    def _traces(self, tenant: str) -> TenantTraces:
        rules = self._rules_of(tenant)
        traces = self.tenants.get(tenant)
        if traces is None:
            before = self._raised.of(tenant)
            unfinished = self._unfinished.of(tenant)
            traces = TenantTraces(tenant, rules, self._windows, before, self._held, unfinished)
            self.tenants[tenant] = traces
        elif traces.rules is not rules:
            self._changed |= traces.rules.version != rules.version
            traces.rules = rules
        return traces

    def _close_due(self) -> tuple[list[DueTraces], Exception | None]:
        """What is due by the clock, and the error that stopped before the end."""
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
            tables = self._tables()
            for table in self._in_turn(tables):
                table.close_idle(now - limits.idle_ns, now, found)
            for table in tables if sweep else ():
                table.close_old(now - limits.max_age_ns, now, found)
        self.counts.closed += sum(len(due) for due in found[before:])
        self._make_room(now, found)
        for tenant, traces in list(self.tenants.items()) if sweep else ():
            if not traces.open_count and not traces.closed_count:
                del self.tenants[tenant]
        self._look_over(now)

    def _in_turn(self, tables: list[TraceTable]) -> list[TraceTable]:
        """Those that are looked at in this tick: all where they are few, each once in two seconds
        where they are thousands."""
        start = self._looked_at if self._looked_at < len(tables) else 0
        self._looked_at = start + max(LOOKED_AT, len(tables) // 8)
        return tables[start : self._looked_at]

    def _make_room(self, now: int, found: list[DueTraces]) -> None:
        """Close traces beyond the number that may be open; forget those closed long ago, and the
        oldest beyond the number that is kept."""
        limits = self._limits
        tables = self._tables()
        excess = self._held.open - limits.most_open
        for table, slots in idle_longest(tables, excess) if excess > 0 else ():
            found.append(table.close(slots, now))
            self.counts.closed_for_room += len(slots)
            self.counts.closed += len(slots)
        excess = self._held.closed - limits.keep
        lag_ns = INDEX_LAG_NS
        if self._held.closed <= MOST_KEPT * limits.keep:  # beyond it, what the index lacks may be
            lag_ns += self._in_flight.oldest_ns()  # forgotten
            if self._behind():
                excess, lag_ns = 0, now
        long_ago = now - max(limits.keep_ns, lag_ns)
        forget_closed(tables, long_ago, now - lag_ns, excess, self._closed)
        for traces in self.tenants.values() if len(tables) > len(self.tenants) else ():
            traces.drop_empty()

    def _tables(self) -> list[TraceTable]:
        return [table for traces in self.tenants.values() for table in traces.tables]

    def _time(self) -> int:
        """The wall clock. Where it was set back, so is every time that traces are measured by."""
        now = self._clock_ns()
        by = now - self._now_ns
        if self._now_ns and by < 0:
            for traces in self.tenants.values():
                traces.shift(by)
            self._last_sweep_ns += by
            self._resumed_ns += by
        self._now_ns = now
        return now

    def _look_over(self, now: int) -> None:
        """Renew the survey once a second."""
        if 0 <= now - self.survey.taken_ns < SURVEY_NS:
            return
        found = [table.survey() for table in self._tables()]
        self.survey = Survey(
            now,
            open=self._held.open,
            closed=self._held.closed,
            long_lived=sum(each.long_lived for each in found),
            spans=sum(each.spans for each in found),
            nbytes=sum(each.nbytes for each in found),
            oldest_ns=min((each.oldest_ns for each in found), default=NEVER),
        )
