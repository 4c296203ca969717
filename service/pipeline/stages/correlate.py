"""trace-correlation: fold spans into the open traces of their tenant, and pass on what is due.

A trace is due early, when a count crosses a threshold at which a rule may become certain, and at
its end: when it is marked complete, is idle, or is too old
(:mod:`betrace.service.pipeline.stages.trace_clock`). All waiting batches are folded in one
worker-thread call. A tenant that uses up its CPU time there waits in the backlog
(:mod:`betrace.service.pipeline.stages.backlog`), which is folded in slices.

This file moves batches and due traces; the traces themselves are in
:mod:`betrace.service.pipeline.open_traces`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import trio

from betrace.channels import SendChannel, ThreadRunner
from betrace.service.otlp.columns import SpanBatch, join
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.stages.backlog import Backlog
from betrace.service.pipeline.stages.trace_clock import TraceClock
from betrace.service.traces.due import DueTraces
from betrace.service.traces.slices import CpuSlice, SliceOver

TICK_SECONDS = 0.25  # interval of the search for idle traces
# CPU seconds of a tenant in one call of the handler, which ordinary batches do not reach, and of
# all tenants together before each has only the least.
FIRST_SLICE = 0.05
ALL_SLICES = 0.25
LEAST_SLICE = 0.005
# After so many CPU seconds, what is due is passed on before more is folded.
CALL_SECONDS = 0.02
FEW_SPANS = 500  # are folded in about a millisecond
# A search that may take longer is done without the lock of the traces, before it is needed.
LONGEST_STEP = 0.02


class CorrelateStage:
    """The handler of the trace-correlation stage, its timer, and its backlog.

    ``threads`` run what takes the lock of ``traces``, ``search_threads`` long searches; ``onward``
    receives what is due.
    """

    def __init__(
        self,
        traces: OpenTraces,
        threads: ThreadRunner,
        onward: SendChannel[DueTraces],
        search_threads: ThreadRunner | None = None,
    ) -> None:
        self.traces = traces
        self._threads = threads
        self._onward = onward
        self.backlog = Backlog()
        """Batches of tenants that used up their CPU time."""
        self.clock = TraceClock(traces, self.backlog)
        self.waiting = trio.Event()
        """Set when a batch is put into the backlog."""
        self.last_failure: Exception | None = None
        """Why the last slice of the backlog failed."""
        self.passed_by = 0
        """Spans that were put into the backlog without the channel."""
        self._handling = False
        self._handled = 0.0  # CPU seconds of the handler, without the backlog
        self._handled_tenants = 1  # in the last call
        self._slice_seconds = 0.0  # CPU seconds of the last slice of the backlog
        self._work: tuple[str, Callable[[], object]] | None = None  # of a tenant, before its slice
        self._search_threads = search_threads or threads
        self.caught_up = trio.Event()
        """Set when the log is replayed after a restart."""

    # Batches from the channel.

    async def handle(self, batches: list[SpanBatch]) -> list[SpanBatch]:
        """Fold batches and pass on what is due; returns those that are folded. The others are in
        :attr:`backlog`. A batch that was folded before is skipped."""
        used: dict[str, float] = {}
        left = batches
        while left:
            self._handling = True
            try:
                due, error, left = await self._threads.run(self._fold, left, used)
            finally:
                self._handling = False
            if len(self.backlog):
                self.waiting.set()
            await self._send(due, error)
        if not len(self.backlog):
            return batches
        return [batch for batch in batches if self.traces.has(batch)]

    def _fold(
        self, batches: list[SpanBatch], used: dict[str, float]
    ) -> tuple[list[DueTraces], Exception | None, list[SpanBatch]]:
        """Fold batches, those of tenants with few spans first. Returns what is due, the error that
        ended the fold early, and the batches that are left because it took long. ``used`` are the
        CPU seconds of each tenant in this call of the handler."""
        traces = self.traces
        due: list[DueTraces] = []
        left_over: list[list[SpanBatch]] = []
        spent = sum(used.values())
        groups = _small_first(_by_tenant(batches))
        started = time.thread_time()
        until = time.perf_counter() + CALL_SECONDS
        with traces.lock:
            try:
                traces.pass_on(due)
                for done, group in enumerate(groups):
                    if done and time.perf_counter() > until:
                        left_over = groups[done:]
                        break
                    together = [batch for batch in group if not traces.has(batch)]
                    if not together:
                        continue  # a redelivery
                    tenant = together[0].tenant
                    if tenant in self.backlog:
                        self._put_back(together)
                        continue
                    before = used.get(tenant, 0.0)
                    left = min(FIRST_SLICE, ALL_SLICES - spent)
                    cpu = CpuSlice(max(left, LEAST_SLICE) - before)
                    try:
                        traces.fold(join(together), cpu)
                    except SliceOver:
                        self._put_back(together)
                        self.backlog.used(tenant, cpu.used)
                    used[tenant] = before + cpu.used
                    spent += used[tenant] - before
                    traces.pass_on(due)
                if not self.caught_up.is_set():  # the timer does not run while the log is read
                    self.clock.enforce_limits(traces.time(), due)
            except Exception as error:
                with suppress(Exception):  # what fails here is passed on by the next call
                    traces.pass_on(due)
                return traces.ticketed(due), error, []
            finally:
                self._handled += time.thread_time() - started
                self._handled_tenants = len(used) or 1
            return traces.ticketed(due), None, [batch for group in left_over for batch in group]

    def _put_back(self, batches: list[SpanBatch]) -> None:
        """Let batches wait. Of those that were folded together, each is folded later by itself; the
        traces know how far they came."""
        for batch in batches:
            self.backlog.add(batch)

    async def set_aside(self, batch: SpanBatch) -> None:
        """Put a batch of very many spans into the backlog, so that it keeps no others out of the
        channel."""

        def add() -> None:
            with self.traces.lock:
                self.backlog.add(batch)

        await self._threads.run(add)
        self.passed_by += len(batch)
        self.waiting.set()

    async def _send(self, due: list[DueTraces], error: Exception | None) -> None:
        await self._onward.send_each(due)
        if error is not None:
            raise error

    # Batches in the backlog.

    async def fold_waiting(self) -> tuple[SpanBatch, int] | None:
        """Fold a slice of the batch in the backlog whose turn it is, and pass on what is due.

        Returns a batch that is finished and 0, or one that failed and how often it has; the latter
        stays in the backlog until :meth:`drop_waiting`."""
        await self._give_way()
        with trio.CancelScope(shield=True):  # what left the traces must be passed on
            due, error, batch, failed = await self._threads.run(self._fold_slice)
            work, self._work = self._work, None
            if work is not None:
                await self._search_threads.run(self._search, *work)
            if not len(self.backlog):
                self.waiting = trio.Event()
            try:
                await self._send(due, None)
            except trio.BrokenResourceError:
                return None  # stopped without draining: it is read again after a restart
        self.last_failure = error
        return None if batch is None else (batch, failed)

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

    def _fold_slice(
        self,
    ) -> tuple[list[DueTraces], Exception | None, SpanBatch | None, int]:
        """What is due, an error, the batch that is finished or failed, and how often it failed."""
        traces = self.traces
        due: list[DueTraces] = []
        with traces.lock:
            found = self.backlog.next()
            if found is None:
                return due, None, None, 0
            batch, seconds = found
            cpu = CpuSlice(seconds, certain=True, longest=LONGEST_STEP)
            finished, failed, error = False, 0, None
            try:
                traces.pass_on(due)
                if not traces.has(batch):
                    traces.fold(batch, cpu)
                finished = True
            except SliceOver as over:
                if over.work is not None:
                    self._work = batch.tenant, over.work
            except Exception as failure:
                error, failed = failure, self.backlog.failed(batch)
            try:
                traces.pass_on(due)
            except Exception as failure:  # the next call passes it on
                error = error or failure
            self._slice_seconds = cpu.used
            self.backlog.used(batch.tenant, cpu.used)
            if finished:
                self._remove_waiting(batch)
            return traces.ticketed(due), error, batch if finished or failed else None, failed

    def _search(self, tenant: str, work: Callable[[], object]) -> None:
        """Do a long search that the tenant's next slice needs. Nobody else folds for the tenant
        meanwhile, because its batches wait."""
        started = time.thread_time()
        with suppress(Exception):  # the fold meets it again
            work()
        used = time.thread_time() - started
        with self.traces.lock:
            self.backlog.used(tenant, used)
            self._slice_seconds += used

    def _remove_waiting(self, batch: SpanBatch) -> None:
        if self.backlog.done(batch):
            self.clock.rested(batch.tenant)

    def drop_waiting(self, batch: SpanBatch) -> None:
        """Remove a batch that is kept elsewhere from the backlog."""
        with self.traces.lock:
            self._remove_waiting(batch)

    def discard_waiting(self, tenant: str) -> None:
        """Drop what a tenant that is deleted has in the backlog; call in a worker thread."""
        with self.traces.lock:
            for batch in self.backlog.batches(tenant):
                self.traces.progress.folded(tenant, batch.positions.tolist())
            self.backlog.forget(tenant)

    async def worked_off(self) -> None:
        """Return when the backlog is empty."""
        while len(self.backlog):  # noqa: ASYNC110
            await trio.sleep(0.01)

    # The timer.

    async def tick(self) -> None:
        """Close traces that are due by the clock, forever. Starts at :attr:`caught_up`: no trace
        may be closed before the log is replayed, because the replay may contain its next span."""
        await self.caught_up.wait()
        while True:
            await trio.sleep(TICK_SECONDS)
            if self.traces.idle and not (self.clock.survey.open or self.clock.survey.closed):
                continue
            with trio.CancelScope(shield=True):  # what was closed must be passed on
                found, error = await self._threads.run(self._close_due)
                try:
                    await self._onward.send_each(found)
                except trio.BrokenResourceError:
                    return  # stopped without draining: they are closed again after a restart
                if error is not None:
                    raise error

    def _close_due(self) -> tuple[list[DueTraces], Exception | None]:
        """What is due by the clock, and the error that ended the search early."""
        found: list[DueTraces] = []
        with self.traces.lock:
            try:
                self.clock.close_due(found)
            except Exception as error:
                return self.traces.ticketed(found), error
            return self.traces.ticketed(found), None

    # For recovery and removal; call in a worker thread.

    def replayed(self) -> None:
        """The log was read and folded. Idle times start now, because clients could not send while
        the service was down."""
        with self.traces.lock:
            self.clock.resumed()

    def settled(self) -> None:
        """No span from before the restart can reopen a trace any more, except those in the
        backlog."""
        with self.traces.lock:
            if not len(self.backlog):
                self.traces.forget_history()

    def forget(self, tenant: str) -> int:
        """Drop all traces of a tenant that has no waiting frames. Work that has left the traces has
        tickets below the returned one."""
        with self.traces.lock:
            self.traces.forget(tenant)
            self.backlog.forget(tenant)
            self.clock.forget(tenant)
            return self.traces.in_flight.mark()


def _small_first(groups: list[list[SpanBatch]]) -> list[list[SpanBatch]]:
    """The groups, those of tenants with few spans first if there are many spans; groups of a tenant
    keep their order."""
    if len(groups) <= 1:
        return groups
    spans: dict[str, int] = {}
    for group in groups:
        tenant = group[0].tenant
        spans[tenant] = spans.get(tenant, 0) + sum(map(len, group))
    if sum(spans.values()) <= FEW_SPANS:
        return groups
    return sorted(groups, key=lambda group: spans[group[0].tenant])


def _by_tenant(batches: list[SpanBatch]) -> list[list[SpanBatch]]:
    """The batches in lists that can be folded together: those of a tenant between two changes of
    its rules, except batches without positions, those that are read from the log, and
    redeliveries."""
    found: list[list[SpanBatch]] = []
    latest: dict[str, list[SpanBatch]] = {}
    seen: set[tuple[str, int]] = set()
    for batch in batches:
        frames = {(batch.tenant, position) for position in batch.positions.tolist()}
        alone = (
            batch.replayed or not batch.positions.all() or not frames or not seen.isdisjoint(frames)
        )
        seen |= frames
        together = None if alone else latest.get(batch.tenant)
        if together is not None and together[0].rules is batch.rules:
            together.append(batch)
            continue
        found.append([batch])
        if not alone:
            latest[batch.tenant] = found[-1]
    return found
