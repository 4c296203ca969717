"""The open and recently closed traces of all tenants: the state behind trace-correlation.

Spans are folded into the traces of their tenant (:meth:`OpenTraces.fold`), and what became due is
collected afterwards (:meth:`OpenTraces.pass_on`). The two steps are separate because a fold that
fails cannot be undone: its results stay here until they are collected, and no checkpoint is made
before.

One lock, :attr:`OpenTraces.lock`, guards everything. Methods that are part of a larger step say
that the caller holds it; the others take it themselves and may be called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from betrace.channels import TransientError
from betrace.service.otlp.columns import Rows, SpanBatch
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.rules.compile import CompiledRules
from betrace.service.signals import Signal
from betrace.service.traces.checkpoint import Snapshot
from betrace.service.traces.due import DueTraces
from betrace.service.traces.folding import Folded
from betrace.service.traces.layout import CLOSED, STATE, TraceTotals
from betrace.service.traces.limits import LateSpans, TraceLimits
from betrace.service.traces.partial_folds import PartialFolds
from betrace.service.traces.signal_history import LedgerHistory
from betrace.service.traces.slices import CpuSlice
from betrace.service.traces.table import TraceTable
from betrace.service.traces.tenant_traces import TenantTraces


class NotNow(TransientError):  # noqa: N818
    """The traces cannot be copied now; try again a little later."""


@dataclass(slots=True)
class TraceCounts:
    """What happened to the traces, in spans or traces."""

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


class OpenTraces:
    """The traces of all tenants.

    ``rules_of(tenant)`` returns the rules for batches that do not say theirs, and is called in
    worker threads;
    ``clock_ns`` is the wall clock in nanoseconds.
    """

    def __init__(
        self,
        rules_of: Callable[[str], CompiledRules],
        limits: TraceLimits,
        late: LateSpans,
        progress: LogProgress,
        in_flight: InFlight,
        clock_ns: Callable[[], int],
    ) -> None:
        self.limits = limits
        self.late = late
        self.progress = progress
        self.in_flight = in_flight
        self._rules_of = rules_of
        self._clock_ns = clock_ns
        self._now_ns = 0
        self.on_set_back: Callable[[int], object] = lambda by: None
        """Called with the (negative) nanoseconds by which the wall clock was set back."""
        self.lock = threading.Lock()
        self.tenants: dict[str, TenantTraces] = {}
        self.totals = TraceTotals()
        """Of all tenants."""
        self.counts = TraceCounts()
        self._ledger_history = LedgerHistory()
        self._partial_folds = PartialFolds()
        self._owing: dict[str, TenantTraces] = {}  # tenants with results that are not passed on

    # Steps of the stage. The caller holds the lock.

    def fold(self, batch: SpanBatch, cpu: CpuSlice | None) -> None:
        """Fold a batch. Even if it fails, or ``cpu`` (None: unlimited) is used up, its results so
        far are kept for :meth:`pass_on`."""
        traces = self._of(batch)
        self._owing[batch.tenant] = traces
        now = batch.received_ns if batch.replayed else self.time()
        # A fold can stop only between frames and rows that the log knows.
        cut = cpu if (batch.positions > 0).all() and len(batch.positions) else None
        traces.owed += traces.fold(batch, now, self.late.closed, self.late.history, cut)
        self.progress.folded(batch.tenant, batch.positions.tolist())
        if batch.replayed:
            self.counts.replayed += len(batch)
        else:
            self.counts.folded += len(batch)

    def pass_on(self, due: list[DueTraces]) -> None:
        """Add the results of folding to ``due``, and close complete traces. What an error leaves
        behind is passed on by the next call; no trace is touched before."""
        while self._owing:
            tenant, traces = next(iter(self._owing.items()))
            while traces.owed:
                self._settle(*traces.owed[0], due)
                del traces.owed[0]
            del self._owing[tenant]

    def ticketed(self, due: list[DueTraces]) -> list[DueTraces]:
        """Register due traces as work in flight, in the same step in which they left the traces, so
        that a checkpoint waits for them."""
        for traces in due:
            traces.ticket = self.in_flight.enter()
        return due

    def tables(self) -> list[TraceTable]:
        """The tables of all tenants."""
        return [table for traces in self.tenants.values() for table in traces.tables]

    def time(self) -> int:
        """The wall clock. If it was set back, all times of the traces are moved back as well."""
        now = self._clock_ns()
        by = now - self._now_ns
        if self._now_ns and by < 0:
            for traces in self.tenants.values():
                traces.shift(by)
            self.on_set_back(by)
        self._now_ns = now
        return now

    def forget(self, tenant: str) -> None:
        """Drop all traces of a tenant."""
        traces = self.tenants.pop(tenant, None)
        for table in traces.tables if traces is not None else ():
            table.leave()
        self._ledger_history.forget(tenant)
        self._partial_folds.forget(tenant)
        self._owing.pop(tenant, None)

    def keep(self, wanted: Callable[[str, Rows], npt.NDArray[np.bool_]]) -> None:
        """Drop all traces but those that are wanted: ``wanted`` returns for rows (hi, lo) of a
        tenant which of them are."""
        for tenant in list(self.tenants):
            traces = self.tenants[tenant]
            for table in traces.tables:
                table.keep(partial(wanted, tenant))
            traces.drop_empty()

        def is_wanted(tenant: str, trace_id: str) -> bool:
            ids = np.frombuffer(bytes.fromhex(trace_id), ">i8").astype(np.int64).reshape(1, 2)
            return bool(wanted(tenant, ids)[0])

        self._ledger_history.keep(is_wanted)

    def forget_history(self) -> None:
        """Forget the signals from before the restart of traces that are not in memory. Call this
        once no earlier span can reopen such a trace any more; the stores know them."""
        if len(self._ledger_history):
            self._ledger_history.keep(self._is_here)

    # For any thread.

    def has(self, batch: SpanBatch) -> bool:
        """Whether all of a batch is in its traces. It may be even if its delivery failed, because a
        later step failed. Needs no lock."""
        positions = batch.positions[batch.positions > 0].tolist()
        return bool(positions) and not self.progress.any_pending(batch.tenant, positions)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to close, forget or pass on. Needs no lock."""
        return not (self.tenants or self._owing)

    def look_up(self, tenant: str, trace_id: str) -> DueTraces | None:
        """A copy of one trace (32 hex digits) in memory, or None. ``closed`` says whether it was
        closed and is kept for late spans. Waits while a batch is folded."""
        with self.lock:
            found = self.find(tenant, trace_id)
            if found is None:
                return None
            table, slot = found
            closed = int(table.arrays.slots[slot, STATE]) == CLOSED
            return table.copy(np.array([slot], np.int64), closed=closed, now=0)

    def snapshot(self) -> Snapshot:
        """The state of all traces and the log positions they contain. Raises :exc:`NotNow` while
        results of a failed fold are not passed on."""
        with self.lock:
            if self._owing:
                raise NotNow("the results of a failed batch are not passed on yet; try again")
            return Snapshot(
                self._clock_ns(),
                self.progress.snapshot(),
                [traces.snapshot() for traces in self.tenants.values()],
                self.in_flight.mark(),
                ledger_history=self._ledger_history.saved(),
                partial_folds=self._partial_folds.saved(),
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot; call this before anything is folded. Raises what
        :meth:`TenantTraces.restored` raises, and then changes nothing."""
        history = LedgerHistory()
        history.restore(snapshot.ledger_history)
        partial = PartialFolds()
        partial.restore(snapshot.partial_folds)
        totals = TraceTotals()
        windows = self.limits.windows
        tenants = {
            saved.tenant: TenantTraces.restored(
                saved, windows, history.of(saved.tenant), totals, partial.of(saved.tenant)
            )
            for saved in snapshot.tenants
        }
        with self.lock:
            for tenant, (last, pending) in snapshot.progress.items():
                self.progress.restore(tenant, last, pending)
            self.tenants = tenants
            self.totals = totals
            self._ledger_history = history
            self._partial_folds = partial
            self._now_ns = snapshot.taken_ns

    def note_raised(self, signals: Iterable[Signal]) -> None:
        """Take into account signals that were stored after the snapshot, in the order in which they
        were stored; call this before anything is folded."""
        with self.lock:
            self._ledger_history.note(signals)

    def _of(self, batch: SpanBatch) -> TenantTraces:
        """The traces of a batch's tenant, under the batch's rules."""
        tenant, rules = batch.tenant, batch.rules
        if not isinstance(rules, CompiledRules):
            rules = self._rules_of(tenant)
        traces = self.tenants.get(tenant)
        if traces is None:
            before = self._ledger_history.of(tenant)
            partial = self._partial_folds.of(tenant)
            traces = TenantTraces(tenant, rules, self.limits.windows, before, self.totals, partial)
            self.tenants[tenant] = traces
        elif traces.rules is not rules:
            traces.rules = rules
        return traces

    def _settle(self, table: TraceTable, folded: Folded, due: list[DueTraces]) -> None:
        if len(folded.dirty):
            folded.early = table.early(folded.dirty, self.time())
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
            closed = table.close(complete, self.time())
            closed.spilled = folded.spilled
            counts.closed += len(closed)
            due.append(closed)
        counts.repeated += folded.repeated
        counts.matched += folded.matched
        counts.opened += folded.opened
        counts.reopened += folded.reopened
        counts.unknown += folded.unknown

    def find(self, tenant: str, trace_id: str) -> tuple[TraceTable, int] | None:
        """The table and slot of a trace in memory. The caller holds the lock."""
        hi, lo = (int(half) for half in np.frombuffer(bytes.fromhex(trace_id), ">i8"))
        traces = self.tenants.get(tenant)
        for table in traces.tables if traces is not None else ():
            slot = table.find(hi, lo)
            if slot >= 0:
                return table, slot
        return None

    def _is_here(self, tenant: str, trace_id: str) -> bool:
        return self.find(tenant, trace_id) is not None
