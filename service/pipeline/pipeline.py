"""The stages and the channels between them: built from the settings, run, drained in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from betrace.channels import (
    PeakReader,
    ReceiveChannel,
    SendChannel,
    Stage,
    ThreadRunner,
    open_channel,
)
from betrace.service.config.edge import Tracing
from betrace.service.config.settings import Settings
from betrace.service.export.destinations import destinations
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.batch_audit import BatchAudit
from betrace.service.pipeline.breakers import Breakers
from betrace.service.pipeline.dead_letters import DeadLetters
from betrace.service.pipeline.fallback import Fallback
from betrace.service.pipeline.log_sync import GroupSync
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.recovery.history import TraceHistory
from betrace.service.pipeline.request import Request
from betrace.service.pipeline.stages.correlate import CorrelateStage, TraceLimits
from betrace.service.pipeline.stages.evaluate import Decided, EvaluateStage
from betrace.service.pipeline.stages.ingest import IngestStage
from betrace.service.pipeline.stages.pacing import CommitPace
from betrace.service.pipeline.stages.record import ProjectStage, StoreCounts, StoreStage
from betrace.service.rules.registry import RuleRegistry
from betrace.service.signals import Signal
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import Ledger
from betrace.service.storage.local_stores import Reserves
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.telemetry.latencies import Latencies
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.window import Windows

if TYPE_CHECKING:
    from betrace.service.telemetry.tracing import SlowBatches, StageTraces

T = TypeVar("T")
SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Queue:
    """A channel as the API and the metrics see it, each with a peak of its own."""

    send: SendChannel[Any]
    receive: ReceiveChannel[Any]
    api_peak: PeakReader
    metrics_peak: PeakReader
    unit: str


class Pipeline:
    """span-ingestion, trace-correlation, rule-evaluation, storage-write and its projection.

    ``reserves`` keep what a stage failed on and what a store did not take. ``stored`` is told of
    signals that are new in the ledger.
    """

    sync: GroupSync
    ingest: IngestStage
    correlate: CorrelateStage
    evaluate: EvaluateStage
    store_counts: StoreCounts
    history: TraceHistory
    breakers: Breakers
    letters: DeadLetters
    fallbacks: dict[str, Fallback[Any]]

    def __init__(
        self,
        settings: Settings,
        log: SpanLog,
        registry: RuleRegistry,
        ledger: Ledger,
        store: DuckStore,
        reserves: Reserves,
        stored: Callable[[list[Signal]], None],
        latencies: Latencies,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.slow_batches = _slow_batches(settings.tracing)
        self._stage_traces: dict[str, StageTraces] = {}
        self.queues: dict[str, Queue] = {}
        self.stages: dict[str, Stage[Any]] = {}
        self.threads = {
            name: ThreadRunner(name, threads)
            for name, threads in (
                ("ingest", settings.pipeline.ingest_workers),
                ("sync", 1),
                ("correlate", settings.pipeline.correlate_workers),
                ("evaluate", settings.pipeline.evaluate_workers),
                ("ledger", settings.pipeline.store_workers),
                ("duckdb", settings.pipeline.store_workers),
            )
        }
        p, t = settings.pipeline, settings.traces
        self.requests, requests = self._channel(
            "span-ingestion", p.ingest_capacity_spans, lambda r: r.weight, "spans", Request
        )
        batch_send, batches = self._channel(
            "trace-correlation", p.correlate_capacity_spans, len, "spans", SpanBatch
        )
        due_send, due = self._channel(
            "rule-evaluation",
            p.evaluate_capacity_traces,
            lambda d: len(d) or 1,
            "traces",
            DueTraces,
        )
        decided_send, decided = self._channel(
            "storage-write", p.store_capacity_signals, lambda d: d.weight, "rows", Decided
        )
        rows_send, rows = self._channel(
            "projection", settings.duckdb.waiting_rows, lambda d: d.weight, "rows", Decided
        )
        self.batches = batch_send
        self._onward: dict[str, SendChannel[Any]] = {
            "span-ingestion": batch_send,
            "trace-correlation": due_send,
            "rule-evaluation": decided_send,
            "storage-write": rows_send,
        }

        self.finished = trio.Event()
        self.folded_all_the_same = 0
        """Spans of batches that trace-correlation gave up though they were in their traces."""
        self._retrying = trio.CancelScope()
        self.progress = LogProgress()
        self.in_flight = InFlight()
        self.breakers = Breakers(settings.breakers, destinations(settings.export))
        self.letters = DeadLetters(
            reserves.letters,
            log,
            self.progress,
            self.in_flight,
            settings.ingest.max_body_bytes,
            settings.redelivery.transient_retry_seconds,
            clock_ns,
        )
        self.in_flight.left = self.letters.left
        self.closed = ClosedTraces(t.late_filter_bytes)
        self.history = TraceHistory(
            store, log, settings.ingest.max_body_bytes, lambda: self.project.fallback.pending
        )
        self.sync = GroupSync(log, self.threads["sync"])
        self._flush_seconds = settings.log.flush_seconds
        self.batch_audit: BatchAudit | None = None
        if settings.audit.batches:
            self.batch_audit = BatchAudit(
                settings.storage.path / "batches.jsonl",
                settings.audit.max_bytes,
                settings.audit.files,
            )
        self.ingest = IngestStage(
            log,
            self.threads["ingest"],
            batch_send,
            self.progress,
            settings.ingest.max_body_bytes,
            self.sync if settings.log.ack == "synced" else None,
            self.batch_audit,
        )
        self.correlate = CorrelateStage(
            registry.compiled,
            self.threads["correlate"],
            due_send,
            self.progress,
            self.in_flight,
            TraceLimits(
                idle_ns=int(t.idle_seconds * SECOND),
                max_age_ns=int(t.max_age_seconds * SECOND),
                sweep_ns=int(t.sweep_seconds * SECOND),
                keep_ns=int(settings.caches.trace_metadata_ttl_seconds * SECOND),
                keep=settings.caches.trace_metadata,
                most_open=t.max_open,
            ),
            self.closed,
            self.history.load,
            Windows(t.long_lived_spans, t.window_spans, t.window_overlap),
            clock_ns,
            lambda: self.project.fallback.pending,
        )
        self.evaluate = EvaluateStage(
            self.threads["evaluate"],
            decided_send,
            self.in_flight,
            clock_ns,
            self.breakers.evaluation,
            self.letters.bury_all,
            latencies.early_lead.observe,
            latencies.evaluation.observe,
        )
        self.store_counts = StoreCounts()
        self.store = StoreStage(
            ledger,
            self.threads["ledger"],
            rows_send,
            stored,
            settings.ledger.batch_signals,
            self.store_counts,
            latencies,
            clock_ns,
            self.breakers.ledger,
            reserves.ledger,
            self.letters.bury_all,
        )
        self.project = ProjectStage(
            store,
            self.threads["duckdb"],
            self.store_counts,
            self.in_flight,
            latencies,
            self.breakers.duckdb,
            reserves.duckdb,
            self.letters.bury_all,
            CommitPace(settings.duckdb.commit_cores),
        )
        self.fallbacks = {each.name: each for each in (self.store.fallback, self.project.fallback)}

        def on_dead(stage: str) -> Callable[[Any, Exception, int], Any]:
            async def bury(item: Any, error: Exception, attempts: int) -> None:
                await self.letters.bury(stage, item, error, attempts)

            return bury

        def add(name: str, receive: ReceiveChannel[Any], handler: Any, **options: Any) -> None:
            options.setdefault("attempts", settings.redelivery.attempts + 1)
            options.setdefault("retry_delay", settings.redelivery.delay_seconds)
            options.setdefault("on_dead", on_dead(name))
            observe = latencies.stage(name).observe
            traces = self._stage_traces.get(name)
            if traces is not None:
                options |= {"on_slow": traces.slow, "slow_after": traces.slow_seconds}

            def done(seconds: float, _: int) -> None:
                observe(seconds)
                if traces is not None:
                    traces.done()

            self.stages[name] = Stage(name, receive, handler, on_done=done, **options)

        # A request that makes the stage fail is refused: its client still has it.
        add(
            "span-ingestion",
            requests,
            self.ingest.handle,
            workers=p.ingest_workers,
            max_batch_weight=p.ingest_batch_spans,
            attempts=2,
            retry_delay=0.01,
            on_dead=self.ingest.refuse,
        )
        add(
            "trace-correlation",
            batches,
            self._correlate,
            on_dead=self._bury_spans,
            workers=p.correlate_workers,
            max_batch_weight=p.correlate_batch_spans,
        )
        add(
            "rule-evaluation",
            due,
            self.evaluate.handle,
            workers=p.evaluate_workers,
            max_batch_weight=p.evaluate_batch_traces,
        )
        add("storage-write", decided, self.store.handle, workers=p.store_workers)
        add(
            "projection",
            rows,
            self.project.handle,
            workers=p.store_workers,
            max_batch_weight=settings.duckdb.batch_rows,
            max_batch_wait=settings.duckdb.flush_ms / 1000,
            batch_key=lambda d: d.tenant,
            max_batch_keys=1024,
            pace=self.project.pace,
            urgent=lambda d: bool(d.signals),
            most_batch_wait=settings.duckdb.flush_most_seconds,
        )

    def _channel(
        self, name: str, capacity: int, weigh: Callable[[T], int], unit: str, _: type[T]
    ) -> tuple[SendChannel[T], ReceiveChannel[T]]:
        on_wait = None
        if self.slow_batches is not None:
            traces = self.slow_batches.stage(name, unit, weigh)
            self._stage_traces[name] = traces
            on_wait = traces.waited
        send, receive = open_channel(name, capacity, weigh, hold=True, on_wait=on_wait)
        self.queues[name] = Queue(send, receive, send.peak_reader(), send.peak_reader(), unit)
        return send, receive

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run all stages until :meth:`close` and everything in them is finished, which sets
        ``finished``."""
        async with trio.open_nursery() as background:
            background.start_soon(self.sync.every, self._flush_seconds)
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
        async with trio.open_nursery() as nursery:
            if name == "trace-correlation":
                nursery.start_soon(self.correlate.tick)
            await self.stages[name].run()
            nursery.cancel_scope.cancel()
        onward = self._onward.get(name)
        if onward is not None:
            onward.close()
        if name == "span-ingestion" and self.batch_audit is not None:
            self.batch_audit.close()

    async def _correlate(self, batches: list[SpanBatch]) -> None:
        await self.correlate.handle(batches)
        self.letters.finished(batches)

    async def _bury_spans(self, batch: SpanBatch, error: Exception, attempts: int) -> None:
        """Keep a batch as a dead letter, unless what failed came after it."""
        if not self.correlate.has(batch):
            await self.letters.bury("trace-correlation", batch, error, attempts)
            return
        await trio.lowlevel.checkpoint()
        # From here to the return nothing waits: the stage lets go of it at the same time.
        self.letters.finished([batch])
        self.folded_all_the_same += len(batch)

    async def _retry_letters(self) -> None:
        """Give dead letters to their stages again, once the log has been read after a restart."""
        with self._retrying, ExitStack() as stack:
            channels = {
                name: stack.enter_context(self.queues[name].send.clone())
                for name in self.stages
                if name != "span-ingestion"
            }
            await self.correlate.caught_up.wait()
            self.project.pace.held = True
            await self.letters.run(channels)

    def close(self) -> None:
        """Take no more requests; :meth:`run` then ends when what is there is done."""
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


def _slow_batches(settings: Tracing) -> SlowBatches | None:
    """None while they are not traced: the SDK takes long to import."""
    if not settings.endpoint:
        return None
    from betrace.service.telemetry.tracing import SlowBatches

    return SlowBatches(settings)
