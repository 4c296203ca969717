"""The pipeline: five stages with a channel before each, run and drained in order.

::

    Request -> span-ingestion -> SpanBatch -> trace-correlation -> DueTraces -> rule-evaluation
            -> Decided -> storage-write -> Decided -> projection

Each stage (:mod:`betrace.service.pipeline.stages`) takes what waits in its channel as one batch and
sends its results to the next channel. A full channel makes the stage before it wait, up to the
receiver, which refuses requests. :mod:`betrace.service.pipeline.build` builds all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import trio

from betrace.channels import PeakReader, ReceiveChannel, SendChannel, Stage, ThreadRunner
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.batch_audit import BatchAudit
from betrace.service.pipeline.breakers import Breakers
from betrace.service.pipeline.dead_letters import DeadLetters
from betrace.service.pipeline.fallback import Fallback
from betrace.service.pipeline.history import TraceHistory
from betrace.service.pipeline.log_sync import GroupSync
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.request import Request
from betrace.service.pipeline.rules_in_force import RulesOfFrames
from betrace.service.pipeline.stages.correlate import CorrelateStage
from betrace.service.pipeline.stages.evaluate import EvaluateStage
from betrace.service.pipeline.stages.ingest import IngestStage
from betrace.service.pipeline.stages.project import ProjectStage
from betrace.service.pipeline.stages.record import RecordStage
from betrace.service.traces.late_filter import ClosedTraces

if TYPE_CHECKING:
    from betrace.service.telemetry.tracing import SlowBatches

_log = logging.getLogger("service.pipeline")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MeasuredChannel(Generic[T]):
    """A channel and its statistics: the API and the metrics each read a peak of their own."""

    send: SendChannel[T]
    receive: ReceiveChannel[T]
    api_peak: PeakReader
    metrics_peak: PeakReader
    unit: str


@dataclass(kw_only=True, eq=False)
class Pipeline:
    """The parts of the pipeline, and what runs them. ``queues`` and ``stages`` are by stage name,
    in order."""

    queues: dict[str, MeasuredChannel[Any]]
    stages: dict[str, Stage[Any]] = field(default_factory=dict)
    requests: SendChannel[Request]
    batches: SendChannel[SpanBatch]

    open_traces: OpenTraces
    ingest: IngestStage
    correlate: CorrelateStage
    evaluate: EvaluateStage
    record: RecordStage
    project: ProjectStage

    threads: dict[str, ThreadRunner]
    progress: LogProgress
    in_flight: InFlight
    breakers: Breakers
    letters: DeadLetters
    closed: ClosedTraces
    history: TraceHistory
    rules: RulesOfFrames
    sync: GroupSync
    flush_seconds: float
    """Interval of syncing the log."""
    attempts: int
    """How often a batch is folded before it becomes a dead letter."""
    retry_seconds: float
    """Pause before it is folded again."""
    finish_seconds: float
    """How long the stop waits for the backlog; the rest is read from the log after a restart."""
    batch_audit: BatchAudit | None
    slow_batches: SlowBatches | None

    finished: trio.Event = field(default_factory=trio.Event, init=False)
    """Set when :meth:`run` has processed everything after :meth:`close`."""
    failed_after_folding: int = field(default=0, init=False)
    """Spans of batches whose delivery to trace-correlation failed although they were folded."""
    buried_waiting: int = field(default=0, init=False)
    """Spans that became dead letters while they waited in the backlog of trace-correlation."""
    _heavy_done: trio.Event = field(default_factory=trio.Event, init=False)
    _retrying: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)

    @property
    def fallbacks(self) -> dict[str, Fallback[Any]]:
        """The fallback files, by store."""
        return {each.name: each for each in (self.record.fallback, self.project.fallback)}

    def must_wait(self, tenant: str) -> bool:
        """Whether the tenant should send later, because enough of its spans or requests wait."""
        return self.correlate.backlog.full(tenant) or self.ingest.heavy.full(tenant)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run all stages until :meth:`close` is called and everything in them is processed."""
        async with trio.open_nursery() as background:
            background.start_soon(self.sync.every, self.flush_seconds)
            background.start_soon(self._retry_letters)
            for fallback in self.fallbacks.values():
                background.start_soon(fallback.write_back)
            async with trio.open_nursery() as nursery:
                for name in self.stages:
                    nursery.start_soon(self._run_stage, name)
                if self.batch_audit is not None:
                    nursery.start_soon(self.batch_audit.run)
                task_status.started()
            background.cancel_scope.cancel()
        self.finished.set()

    async def _run_stage(self, name: str) -> None:
        """Run a stage until its channel is closed and empty, then close the next channel."""
        async with trio.open_nursery() as nursery:
            if name == "trace-correlation":
                nursery.start_soon(self.correlate.tick)
                nursery.start_soon(self._work_off)
            if name == "span-ingestion":
                stage = self.stages[name]
                nursery.start_soon(self._handle_heavy, lambda: not stage.paused)
            await self.stages[name].run()
            if name == "span-ingestion":
                self.ingest.heavy.close()
                await self._heavy_done.wait()
            if name == "trace-correlation":
                with trio.move_on_after(self.finish_seconds):
                    await self.correlate.worked_off()
            nursery.cancel_scope.cancel()
        names = list(self.queues)
        for following in names[names.index(name) + 1 :][:1]:
            self.queues[following].send.close()
        if name == "span-ingestion" and self.batch_audit is not None:
            self.batch_audit.close()

    async def _handle_heavy(self, may_run: Callable[[], bool]) -> None:
        try:
            await self.ingest.heavy.run(may_run)
        finally:
            self._heavy_done.set()

    async def correlate_batches(self, batches: list[SpanBatch]) -> None:
        """The handler of trace-correlation: fold batches and complete their dead letters."""
        self.letters.book.finished(await self.correlate.handle(batches))

    async def _work_off(self) -> None:
        """Fold the backlog of trace-correlation, forever. A batch that fails as often as the stage
        would try it becomes a dead letter."""
        correlate = self.correlate
        while True:
            await correlate.waiting.wait()
            if self.stages["trace-correlation"].paused:
                await trio.sleep(self.retry_seconds)
                continue
            try:
                found = await correlate.fold_waiting()
            except Exception:  # a bug; what waits stays where it is
                _log.exception("spans that wait cannot be folded now")
                await trio.sleep(1)
                continue
            if found is None:
                continue
            batch, failures = found
            if not failures:
                self.letters.book.finished([batch])
            elif failures >= self.attempts:
                await self._bury_waiting(batch, failures)
            else:
                await trio.sleep(self.retry_seconds)

    async def _bury_waiting(self, batch: SpanBatch, failures: int) -> None:
        error = self.correlate.last_failure or RuntimeError("the batch cannot be folded")
        if self.open_traces.has(batch):
            self.letters.book.finished([batch])
        else:
            try:
                await self.letters.bury("trace-correlation", batch, error, failures)
            except Exception as failure:  # it stays in the backlog and is tried again
                _log.warning("spans of %s cannot be kept now: %s", batch.tenant, failure)
                await trio.sleep(1)
                return
            self.buried_waiting += len(batch)
        self.correlate.drop_waiting(batch)

    async def bury_spans(self, batch: SpanBatch, error: Exception, attempts: int) -> None:
        """Keep a batch that trace-correlation failed on as a dead letter. A batch that was folded
        is not kept: only a later step failed."""
        if not self.open_traces.has(batch):
            await self.letters.bury("trace-correlation", batch, error, attempts)
            return
        await trio.lowlevel.checkpoint()
        # No checkpoint from here to the return: the stage drops the batch in the same step.
        self.letters.book.finished([batch])
        self.failed_after_folding += len(batch)

    async def _retry_letters(self) -> None:
        """Send due dead letters to their stages, once the log has been read after a restart."""
        with self._retrying, ExitStack() as stack:
            channels = {
                name: stack.enter_context(self.queues[name].send.clone())
                for name in self.stages
                if name != "span-ingestion"
            }
            await self.correlate.caught_up.wait()
            self.project.pace.active = True
            await self.letters.retries.run(channels)

    def close(self) -> None:
        """Accept no more requests; :meth:`run` ends when everything is processed."""
        self._retrying.cancel()
        self.requests.close()

    def close_threads(self) -> None:
        """End the worker threads, after :meth:`run`."""
        if self.slow_batches is not None:
            self.slow_batches.close()
        for threads in self.threads.values():
            threads.close()
        if self.batch_audit is not None:
            self.batch_audit.close_threads()
        self.letters.close()
        for fallback in self.fallbacks.values():
            fallback.close()
