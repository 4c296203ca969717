"""Builds the pipeline from the settings and the opened stores. Nothing runs yet."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from betrace.channels import ReceiveChannel, Stage, StageOptions, ThreadRunner, open_channel
from betrace.service.config.edge import Tracing
from betrace.service.config.settings import Settings
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.batch_audit import BatchAudit
from betrace.service.pipeline.breakers import Breakers
from betrace.service.pipeline.dead_letters import DeadLetters
from betrace.service.pipeline.fallback import GuardedStore
from betrace.service.pipeline.history import TraceHistory
from betrace.service.pipeline.log_sync import GroupSync
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.pipeline import MeasuredChannel, Pipeline
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.read_back import ReadBack
from betrace.service.pipeline.request import Request
from betrace.service.pipeline.rule_evaluations import RuleEvaluations
from betrace.service.pipeline.rules_in_force import LogWriter, RulesOfFrames
from betrace.service.pipeline.stages.correlate import CorrelateStage
from betrace.service.pipeline.stages.evaluate import EvaluateStage, JudgingStores
from betrace.service.pipeline.stages.ingest import IngestStage
from betrace.service.pipeline.stages.pacing import CommitPace
from betrace.service.pipeline.stages.project import ProjectStage
from betrace.service.pipeline.stages.record import RecordStage
from betrace.service.rules.registry import RuleRegistry
from betrace.service.signals import Signal
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import Ledger
from betrace.service.storage.local_stores import LocalStores
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.telemetry.latencies import Latencies
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.limits import LateSpans, TraceLimits
from betrace.service.traces.verdicts import Decided

if TYPE_CHECKING:
    from betrace.service.telemetry.tracing import SlowBatches, StageTraces

T = TypeVar("T")

# Stages wait for company when there is little to do (decision 21).
INGEST_INTERVAL = 0.005  # seconds
INGEST_ENOUGH = 500  # spans
FOLD_INTERVAL = 0.1  # seconds; early signals are delayed by this at most


@dataclass(frozen=True, slots=True)
class Stores:
    """The opened stores: the span log, the rules, the ledger, DuckDB, and the local files for dead
    letters and for what a store does not accept."""

    log: SpanLog
    registry: RuleRegistry
    ledger: Ledger
    duckdb: DuckStore
    local: LocalStores


def build_pipeline(
    settings: Settings,
    stores: Stores,
    breakers: Breakers,
    recorded: Callable[[list[Signal]], None],
    latencies: Latencies,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Pipeline:
    """The pipeline. ``recorded`` is called with signals that are new in the ledger."""
    builder = _PipelineBuilder(settings, stores, breakers, latencies, clock_ns)
    pipeline = builder.pipeline(recorded)
    builder.add_stages(pipeline)
    return pipeline


class _PipelineBuilder:
    def __init__(
        self,
        settings: Settings,
        stores: Stores,
        breakers: Breakers,
        latencies: Latencies,
        clock_ns: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._stores = stores
        self._breakers = breakers
        self._latencies = latencies
        self._clock_ns = clock_ns
        self._slow_batches = _slow_batches(settings.tracing)
        self._progress, self._in_flight = LogProgress(), InFlight()
        self._rules = RulesOfFrames(stores.log, stores.registry)
        self._letters = self._dead_letters()
        self._closed = ClosedTraces(settings.traces.late_filter_bytes)
        self._stage_traces: dict[str, StageTraces] = {}
        self._channels: dict[str, MeasuredChannel[Any]] = {}
        p = settings.pipeline
        self._threads = {
            name: ThreadRunner(name, threads)
            for name, threads in (
                ("ingest", p.ingest_workers),
                ("heavy", 1),
                ("search", 1),
                ("sync", 1),
                ("correlate", p.correlate_workers),
                ("evaluate", p.evaluate_workers),
                ("ledger", p.store_workers),
                ("duckdb", p.store_workers),
            )
        }
        self._requests: MeasuredChannel[Request] = self._channel(
            "span-ingestion", p.ingest_capacity_spans, lambda r: r.weight, "spans"
        )
        self._batches: MeasuredChannel[SpanBatch] = self._channel(
            "trace-correlation", p.correlate_capacity_spans, len, "spans"
        )
        self._due: MeasuredChannel[DueTraces] = self._channel(
            "rule-evaluation", p.evaluate_capacity_traces, lambda d: len(d) or 1, "traces"
        )
        self._decided: MeasuredChannel[Decided] = self._channel(
            "storage-write", p.store_capacity_signals, lambda d: d.weight, "rows"
        )
        self._rows: MeasuredChannel[Decided] = self._channel(
            "projection", settings.duckdb.waiting_rows, lambda d: d.weight, "rows"
        )

    def pipeline(self, recorded: Callable[[list[Signal]], None]) -> Pipeline:
        """The pipeline without its stages, which need it. The projection is built first, because
        trace-correlation asks whether it is behind."""
        settings, stores = self._settings, self._stores
        project = self._project()

        def behind() -> bool:
            return project.fallback.pending

        max_body = settings.ingest.max_body_bytes
        history = TraceHistory(
            stores.duckdb,
            stores.log,
            max_body,
            lambda tenant: behind() or tenant in stores.duckdb.incomplete,
            self._rules.at,
        )
        open_traces = self._open_traces(LateSpans(self._closed, history.load, behind))
        sync, audit = GroupSync(stores.log, self._threads["sync"]), open_batch_audit(settings)
        correlate = CorrelateStage(
            open_traces, self._threads["correlate"], self._due.send, self._threads["search"]
        )
        ingest = self._ingest(sync, audit)
        ingest.pass_on_many = correlate.set_aside
        return Pipeline(
            queues=self._channels,
            requests=self._requests.send,
            batches=self._batches.send,
            ingest=ingest,
            open_traces=open_traces,
            correlate=correlate,
            evaluate=self._evaluate(),
            record=self._record(recorded),
            project=project,
            threads=self._threads,
            progress=self._progress,
            in_flight=self._in_flight,
            breakers=self._breakers,
            letters=self._letters,
            closed=self._closed,
            history=history,
            rules=self._rules,
            sync=sync,
            flush_seconds=settings.log.flush_seconds,
            attempts=settings.redelivery.attempts + 1,
            retry_seconds=settings.redelivery.delay_seconds,
            finish_seconds=settings.shutdown.grace_seconds / 3,
            batch_audit=audit,
            slow_batches=self._slow_batches,
        )

    def _project(self) -> ProjectStage:
        return ProjectStage(
            GuardedStore(
                self._stores.duckdb,
                self._threads["duckdb"],
                self._breakers.duckdb,
                self._stores.local.duckdb,
                self._letters.bury_all,
            ),
            self._in_flight,
            CommitPace(self._settings.duckdb.commit_cores),
            self._latencies,
        )

    def _record(self, recorded: Callable[[list[Signal]], None]) -> RecordStage:
        return RecordStage(
            GuardedStore(
                self._stores.ledger,
                self._threads["ledger"],
                self._breakers.ledger,
                self._stores.local.ledger,
                self._letters.bury_all,
            ),
            self._settings.ledger.batch_signals,
            self._rows.send,
            recorded,
            self._latencies,
            self._clock_ns,
        )

    def _evaluate(self) -> EvaluateStage:
        stage = EvaluateStage(
            self._threads["evaluate"],
            self._decided.send,
            self._in_flight,
            self._clock_ns,
            self._breakers.evaluation,
            self._letters.bury_all,
            self._latencies,
            JudgingStores(
                ReadBack(
                    self._stores.log,
                    self._settings.ingest.max_body_bytes,
                    self._stores.duckdb,
                    self._settings.traces.relational_spans_max,
                ),
                self._stores.local.undecided,
            ),
        )
        stage.evaluations = RuleEvaluations(self._settings.metrics.max_rule_series)
        return stage

    def _open_traces(self, late: LateSpans) -> OpenTraces:
        return OpenTraces(
            self._stores.registry.compiled,
            TraceLimits.of(self._settings),
            late,
            self._progress,
            self._in_flight,
            self._clock_ns,
        )

    def _ingest(self, sync: GroupSync, audit: BatchAudit | None) -> IngestStage:
        return IngestStage(
            LogWriter(self._stores.log, self._progress, self._stores.registry),
            self._threads["ingest"],
            self._batches.send,
            self._settings.ingest.max_body_bytes,
            sync,
            self._settings.log.ack == "synced",
            audit,
            self._threads["heavy"],
        )

    def add_stages(self, pipeline: Pipeline) -> None:
        """Connect each channel to its handler."""
        p, duckdb = self._settings.pipeline, self._settings.duckdb
        pipeline.stages = {
            "span-ingestion": self._stage(
                "span-ingestion",
                pipeline.ingest.handle,
                workers=p.ingest_workers,
                max_batch_weight=p.ingest_batch_spans,
                # A request that fails is refused: its client still has it.
                on_dead=pipeline.ingest.refuse,
                attempts=2,
                retry_delay=0.01,
                interval=INGEST_INTERVAL,
                enough=INGEST_ENOUGH,
                adapts=True,
                direct=pipeline.ingest.handle_now,
            ),
            "trace-correlation": self._stage(
                "trace-correlation",
                pipeline.correlate_batches,
                workers=p.correlate_workers,
                max_batch_weight=p.correlate_batch_spans,
                interval=FOLD_INTERVAL,
                enough=p.correlate_capacity_spans // 4,
                on_dead=pipeline.bury_spans,
            ),
            "rule-evaluation": self._stage(
                "rule-evaluation",
                pipeline.evaluate.handle,
                workers=p.evaluate_workers,
                max_batch_weight=p.evaluate_batch_traces,
                on_dead=_bury_in(pipeline.letters, "rule-evaluation"),
            ),
            "storage-write": self._stage(
                "storage-write",
                pipeline.record.handle,
                workers=p.store_workers,
                on_dead=_bury_in(pipeline.letters, "storage-write"),
            ),
            "projection": self._stage(
                "projection",
                pipeline.project.handle,
                workers=p.store_workers,
                max_batch_weight=duckdb.batch_rows,
                max_batch_wait=duckdb.flush_ms / 1000,
                batch_key=lambda d: d.tenant,
                max_batch_keys=1024,
                pace=pipeline.project.pace,
                urgent=lambda d: bool(d.signals),
                most_batch_wait=duckdb.flush_most_seconds,
                on_dead=_bury_in(pipeline.letters, "projection"),
            ),
        }

    def _channel(
        self, name: str, capacity: int, weigh: Callable[[T], int], unit: str
    ) -> MeasuredChannel[T]:
        on_wait = None
        if self._slow_batches is not None:
            traces = self._slow_batches.stage(name, unit, weigh)
            self._stage_traces[name] = traces
            on_wait = traces.waited
        send, receive = open_channel(name, capacity, weigh, hold=True, on_wait=on_wait)
        found = MeasuredChannel(send, receive, send.peak_reader(), send.peak_reader(), unit)
        self._channels[name] = found
        return found

    def _stage(
        self, name: str, handler: Callable[[list[T]], Awaitable[None]], **options: Any
    ) -> Stage[T]:
        redelivery = self._settings.redelivery
        options.setdefault("attempts", redelivery.attempts + 1)
        options.setdefault("retry_delay", redelivery.delay_seconds)
        observe = self._latencies.stage(name).observe
        traces = self._stage_traces.get(name)
        if traces is not None:
            options |= {"on_slow": traces.slow, "slow_after": traces.slow_seconds}

        def done(seconds: float, _: int) -> None:
            observe(seconds)
            if traces is not None:
                traces.done()

        receive: ReceiveChannel[T] = self._channels[name].receive
        return Stage(name, receive, handler, StageOptions(on_done=done, **options))

    def _dead_letters(self) -> DeadLetters:
        letters = DeadLetters(
            self._stores.local.letters,
            self._stores.log,
            self._progress,
            self._in_flight,
            self._settings.ingest.max_body_bytes,
            self._settings.redelivery.transient_retry_seconds,
            self._clock_ns,
            self._rules.at,
        )
        self._in_flight.left = letters.book.left
        return letters


def open_batch_audit(settings: Settings) -> BatchAudit | None:
    """The record of accepted requests; None if it is off."""
    audit = settings.audit
    if not audit.batches:
        return None
    return BatchAudit(settings.storage.path / "batches.jsonl", audit.max_bytes, audit.files)


def _bury_in(letters: DeadLetters, stage: str) -> Callable[[Any, Exception, int], Awaitable[None]]:
    async def bury(item: Any, error: Exception, attempts: int) -> None:
        await letters.bury(stage, item, error, attempts)

    return bury


def _slow_batches(settings: Tracing) -> SlowBatches | None:
    """None unless slow batches are traced, because importing the SDK takes long."""
    if not settings.endpoint:
        return None
    from betrace.service.telemetry.tracing import SlowBatches

    return SlowBatches(settings)
