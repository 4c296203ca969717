"""The metrics: declared here once, with help and labels, and read when they are scraped.

Stages know nothing of metrics: counters and gauges are read from the statistics that the parts keep
anyway. Only latencies are observed as they happen, once a batch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from channels import BreakerState
from service import breakers

if TYPE_CHECKING:
    from service.app import Service

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LEADS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)

Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Observed:
    """What a histogram says of itself."""

    name: str
    text: str
    labels: tuple[str, ...]


class Latencies:
    """The histograms, in seconds; ``declared`` lists them."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.declared: list[Observed] = []

        def histogram(
            name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
        ) -> Histogram:
            self.declared.append(Observed(name, text, labels))
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        self.stage = histogram(
            "betrace_stage_latency_seconds", "Time a stage worked on a batch.", "stage"
        )
        ledger = histogram(
            "betrace_ledger_write_latency_seconds",
            "Time to record a batch of signals in the ledger.",
            "ledger",
        )
        self.ledger_family = ledger
        self.ledger = ledger.labels("sqlite")
        self.duckdb = histogram(
            "betrace_duckdb_insert_latency_seconds", "Time to write a batch of rows to DuckDB."
        )
        self.fallback = histogram(
            "betrace_fallback_write_latency_seconds",
            "Time to write what a store did not take to local files, the disk's sync included.",
            "store",
        )
        for store in ("ledger", "duckdb"):
            self.fallback.labels(store)
        self.end_to_end = histogram(
            "betrace_end_to_end_latency_seconds",
            "From the receipt of the last span that mattered, or the trace's close, to the signal "
            "in the ledger.",
        )
        self.early_lead = histogram(
            "betrace_early_lead_seconds",
            "How long before its close a trace was signalled early.",
            buckets=_LEADS,
        )
        self.evaluation = histogram(
            "betrace_rule_evaluation_latency_seconds", "Time to decide the rules of a batch."
        )


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric that is read from the service when scraped."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...]
    read: Callable[[Service], Samples]

    def family(self, service: Service) -> Metric:
        """The metric with its present values."""
        family = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        metric = family(self.name, self.text, labels=self.labels)
        for labels, value in self.read(service):
            metric.add_metric(list(labels), value)
        return metric


def _one(value: float) -> Samples:
    return [((), value)]


def _signals(service: Service) -> Samples:
    seen = service.pipeline.evaluate.counts.by_severity
    for severity in ("critical", "high", "medium", "low", "info"):
        for kind in ("raised", "retracted"):
            yield (severity, kind), seen.get((severity, kind), 0)


def _stage_items(service: Service) -> Samples:
    for name, stage in service.pipeline.stages.items():
        stats = stage.statistics()
        yield (name, "done"), stats.items_out
        yield (name, "failed"), stats.failed
        yield (name, "redelivered"), stats.redelivered
        yield (name, "dead"), stats.dead


def _progress(service: Service) -> Samples:
    for name, stage in service.pipeline.stages.items():
        last = stage.statistics().last_progress
        yield (name,), 0.0 if last is None else service.wall_time(last)


def _breaker_states(service: Service) -> Samples:
    for breaker in service.pipeline.breakers:
        for state in BreakerState:
            yield (breaker.name, str(state)), float(breaker.state is state)


def _breaker_calls(service: Service) -> Samples:
    for breaker in service.pipeline.breakers:
        for kind, number in breakers.calls(breaker).items():
            yield (breaker.name, kind), number


def _stalled(service: Service) -> Samples:
    seconds = service.settings.pipeline.stall_seconds
    for name, stage in service.pipeline.stages.items():
        yield (name,), float(stage.stalled(seconds))


def _cache_requests(service: Service) -> Samples:
    for name, stats in service.cache_stats().items():
        yield (name, "hit"), stats["hitCount"]
        yield (name, "miss"), stats["missCount"]


def _cache_ratios(service: Service) -> Samples:
    for name, stats in service.cache_stats().items():
        yield (name,), stats["hitRate"]


def _checkpoint_time(service: Service) -> Samples:
    return _one(service.recovery.saved_at or 0.0)


def _checkpoint_bytes(service: Service) -> Samples:
    return _one(service.recovery.saved_bytes)


def _checkpoint_failures(service: Service) -> Samples:
    return _one(service.recovery.failures)


def _disk(service: Service) -> Samples:
    try:
        usage = shutil.disk_usage(service.settings.storage.path)
    except OSError:  # the rest of the scrape is wanted then more than ever
        return
    yield ("free",), usage.free
    yield ("used",), usage.used


def _dead_letters(service: Service) -> Samples:
    held = service.pipeline.letters.held
    for name in service.pipeline.stages:
        if name != "span-ingestion":  # what it fails on is refused
            yield (name,), held[name].letters if name in held else 0


DECLARED = (
    Declared(
        "betrace_span_ingestion",
        "counter",
        "Spans accepted: in the span log and acknowledged.",
        (),
        lambda s: _one(s.pipeline.ingest.counts.accepted),
    ),
    Declared(
        "betrace_spans_rejected",
        "counter",
        "Spans left out of accepted requests: a trace or span id that is none.",
        (),
        lambda s: _one(s.pipeline.ingest.counts.rejected),
    ),
    Declared(
        "betrace_spans_refused",
        "counter",
        "Spans (estimated) of requests that were not accepted, by reason.",
        ("reason",),
        lambda s: [((reason,), n) for reason, n in s.edge.refused_spans.items()],
    ),
    Declared(
        "betrace_requests_refused",
        "counter",
        "Export requests that were not accepted, by reason.",
        ("reason",),
        lambda s: [((reason,), n) for reason, n in s.edge.refused_requests.items()],
    ),
    Declared(
        "betrace_spans_evaluated",
        "counter",
        "Spans folded into their traces, repeated and replayed ones included.",
        (),
        lambda s: _one(s.account().evaluated),
    ),
    Declared(
        "betrace_spans_replayed",
        "counter",
        "Spans read back from the span log at the start.",
        (),
        lambda s: _one(s.account().replayed),
    ),
    Declared(
        "betrace_spans_dead_lettered",
        "gauge",
        "Spans in dead letters, not folded into their traces.",
        (),
        lambda s: _one(s.account().dead_lettered),
    ),
    Declared(
        "betrace_spans_discarded",
        "counter",
        "Spans in dead letters that were discarded, or moved to files.",
        (),
        lambda s: _one(s.account().discarded),
    ),
    Declared(
        "betrace_spans_repeated",
        "counter",
        "Spans that came a second time and were not counted.",
        (),
        lambda s: _one(s.pipeline.correlate.counts.repeated),
    ),
    Declared(
        "betrace_spans_in_flight",
        "gauge",
        "Spans accepted and not yet evaluated.",
        (),
        lambda s: _one(s.spans_in_flight()),
    ),
    Declared(
        "betrace_signals",
        "counter",
        "Signals, by severity and kind.",
        ("severity", "kind"),
        _signals,
    ),
    Declared(
        "betrace_signals_early",
        "counter",
        "Signals raised before their trace had closed.",
        (),
        lambda s: _one(s.pipeline.evaluate.counts.early),
    ),
    Declared(
        "betrace_open_traces",
        "gauge",
        "Traces that may still get spans.",
        (),
        lambda s: _one(s.pipeline.correlate.survey.open),
    ),
    Declared(
        "betrace_traces_closed",
        "counter",
        "Traces closed.",
        (),
        lambda s: _one(s.pipeline.correlate.counts.closed),
    ),
    Declared(
        "betrace_traces_reopened",
        "counter",
        "Closed traces to which spans came late.",
        (),
        lambda s: _one(s.pipeline.correlate.counts.reopened),
    ),
    Declared(
        "betrace_traces_recalled",
        "counter",
        "Closed and forgotten traces reopened from the index and the log.",
        (),
        lambda s: _one(s.pipeline.history.recalled),
    ),
    Declared(
        "betrace_traces_partial",
        "counter",
        "Traces reopened without all the spans that came before.",
        (),
        lambda s: _one(s.pipeline.history.partial),
    ),
    Declared(
        "betrace_traces_closed_for_room",
        "counter",
        "Traces closed early because more than traces.max_open were open.",
        (),
        lambda s: _one(s.pipeline.correlate.counts.closed_for_room),
    ),
    Declared(
        "betrace_long_lived_traces",
        "gauge",
        "Open traces with more than traces.long_lived_spans spans.",
        (),
        lambda s: _one(s.pipeline.correlate.survey.long_lived),
    ),
    Declared(
        "betrace_trace_window_bytes",
        "gauge",
        "Memory of open and recently closed traces.",
        (),
        lambda s: _one(s.pipeline.correlate.survey.nbytes),
    ),
    Declared(
        "betrace_active_tenants",
        "gauge",
        "Tenants with open or recently closed traces.",
        (),
        lambda s: _one(len(s.traces())),
    ),
    Declared(
        "betrace_seda_queue_size",
        "gauge",
        "What is in a channel, being worked on included; in spans, traces or rows.",
        ("queue",),
        lambda s: [((n,), q.send.statistics().size) for n, q in s.pipeline.queues.items()],
    ),
    Declared(
        "betrace_seda_queue_capacity",
        "gauge",
        "What a channel holds at most.",
        ("queue",),
        lambda s: [((n,), q.send.capacity) for n, q in s.pipeline.queues.items()],
    ),
    Declared(
        "betrace_seda_queue_peak",
        "gauge",
        "The most that was in a channel since the last scrape.",
        ("queue",),
        lambda s: [((n,), q.metrics_peak.take()) for n, q in s.pipeline.queues.items()],
    ),
    Declared(
        "betrace_stage_items",
        "counter",
        "Items of a stage, by outcome.",
        ("stage", "outcome"),
        _stage_items,
    ),
    Declared(
        "betrace_stage_last_progress_timestamp_seconds",
        "gauge",
        "When a stage last finished an item; 0 before.",
        ("stage",),
        _progress,
    ),
    Declared(
        "betrace_stage_stalled",
        "gauge",
        "1 while a stage has input and has finished nothing for pipeline.stall_seconds.",
        ("stage",),
        _stalled,
    ),
    Declared(
        "betrace_span_log_bytes",
        "counter",
        "Bytes written to the span log.",
        (),
        lambda s: _one(s.log.statistics().bytes),
    ),
    Declared(
        "betrace_span_log_unsynced_bytes",
        "gauge",
        "Bytes of the span log that would be lost if the machine died now.",
        (),
        lambda s: _one(s.log.statistics().unsynced_bytes),
    ),
    Declared(
        "betrace_span_log_sync_seconds",
        "gauge",
        "How long the last sync of the span log took.",
        (),
        lambda s: _one(s.pipeline.sync.last_seconds),
    ),
    Declared(
        "betrace_span_log_sync_failures",
        "counter",
        "Syncs of the span log that the disk failed.",
        (),
        lambda s: _one(s.pipeline.sync.failures),
    ),
    Declared(
        "betrace_checkpoint_timestamp_seconds",
        "gauge",
        "When the last checkpoint was complete; 0 before the first.",
        (),
        _checkpoint_time,
    ),
    Declared(
        "betrace_checkpoint_bytes",
        "gauge",
        "Size of the last checkpoint that was written.",
        (),
        _checkpoint_bytes,
    ),
    Declared(
        "betrace_checkpoint_failures",
        "counter",
        "Checkpoints that could not be written.",
        (),
        _checkpoint_failures,
    ),
    Declared(
        "betrace_data_disk_bytes",
        "gauge",
        "The file system of the data directory: what BeTrace may still write, and what is used.",
        ("state",),
        _disk,
    ),
    Declared(
        "betrace_cache_requests",
        "counter",
        "Look-ups in a cache, by result.",
        ("cache", "result"),
        _cache_requests,
    ),
    Declared(
        "betrace_cache_hit_ratio",
        "gauge",
        "Part of the look-ups since the start that were answered from the cache; 0 before any.",
        ("cache",),
        _cache_ratios,
    ),
    Declared(
        "betrace_circuit_breaker_state",
        "gauge",
        "1 for the state that the breaker has, 0 for the others.",
        ("name", "state"),
        _breaker_states,
    ),
    Declared(
        "betrace_circuit_breaker_calls",
        "counter",
        "Calls under a breaker, by how they ended; a slow one counts once more as slow.",
        ("name", "kind"),
        _breaker_calls,
    ),
    Declared(
        "betrace_dead_letters",
        "gauge",
        "Dead letters, by the stage that failed.",
        ("stage",),
        _dead_letters,
    ),
    Declared(
        "betrace_dead_letters_exported",
        "counter",
        "Dead letters moved to files, since they no longer fitted.",
        (),
        lambda s: _one(s.pipeline.letters.exported),
    ),
    Declared(
        "betrace_fallback_pending",
        "gauge",
        "Records in local files that wait for their store.",
        ("store",),
        lambda s: [((n,), f.statistics().lines) for n, f in s.pipeline.fallbacks.items()],
    ),
    Declared(
        "betrace_duckdb_rows",
        "counter",
        "Rows written to DuckDB.",
        (),
        lambda s: _one(s.pipeline.store_counts.rows),
    ),
    Declared(
        "betrace_start_time_seconds",
        "gauge",
        "When the service started.",
        (),
        lambda s: _one(s.started_at),
    ),
)


class ServiceCollector:
    """Reads the declared metrics of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """All declared metrics."""
        for declared in DECLARED:
            yield declared.family(self._service)


def register(service: Service, latencies: Latencies) -> CollectorRegistry:
    """The registry of everything that a scrape gives."""
    registry = latencies.registry
    registry.register(ServiceCollector(service))  # type: ignore[arg-type]
    register_process(registry)
    return registry


def register_process(registry: CollectorRegistry) -> None:
    """What prometheus_client knows of the process."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)


__all__ = [
    "DECLARED",
    "Declared",
    "Latencies",
    "Observed",
    "ServiceCollector",
    "generate_latest",
    "register",
    "register_process",
]
