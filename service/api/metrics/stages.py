"""Metrics of channels, stages, breakers and caches."""

from __future__ import annotations

from collections.abc import Callable

from betrace.channels import BreakerState
from betrace.service.api.metrics.declared import Declared, Samples
from betrace.service.api.sources import Sources
from betrace.service.pipeline import breakers


def _stage_items(sources: Sources) -> Samples:
    for name, stage in sources.pipeline.stages.items():
        stats = stage.statistics()
        yield (name, "done"), stats.items_out
        yield (name, "failed"), stats.failed
        yield (name, "redelivered"), stats.redelivered
        yield (name, "dead"), stats.dead


def _progress(sources: Sources) -> Samples:
    for name, stage in sources.pipeline.stages.items():
        last = stage.statistics().last_progress
        yield (name,), 0.0 if last is None else sources.wall_time(last)


def _stalled(sources: Sources) -> Samples:
    seconds = sources.settings.pipeline.stall_seconds
    for name, stage in sources.pipeline.stages.items():
        yield (name,), float(stage.stalled(seconds))


def _breaker_states(sources: Sources) -> Samples:
    for breaker in sources.pipeline.breakers:
        for state in BreakerState:
            yield (breaker.name, str(state)), float(breaker.state is state)


def _breaker_calls(sources: Sources) -> Samples:
    for breaker in sources.pipeline.breakers:
        for kind, number in breakers.calls(breaker).items():
            yield (breaker.name, kind), number


def _cache_requests(sources: Sources) -> Samples:
    for name, stats in sources.caches.statistics().items():
        yield (name, "hit"), stats["hitCount"]
        yield (name, "miss"), stats["missCount"]


def _cache_loads(sources: Sources) -> Samples:
    for name, stats in sources.caches.statistics().items():
        yield (name, "success"), stats["loadSuccessCount"]
        yield (name, "failure"), stats["loadFailureCount"]


def _cache_load_seconds(sources: Sources) -> Samples:
    for name, stats in sources.caches.statistics().items():
        loads = stats["loadSuccessCount"] + stats["loadFailureCount"]
        yield (name,), stats["averageLoadPenaltyMs"] * loads / 1e3


def _waiting_bytes(sources: Sources) -> Samples:
    return [((), sources.pipeline.correlate.backlog.nbytes)]


def _of_caches(key: str) -> Callable[[Sources], Samples]:
    return lambda s: [((name,), found[key]) for name, found in s.caches.statistics().items()]


DECLARED: tuple[Declared[Sources], ...] = (
    Declared(
        "betrace_seda_queue_size",
        "gauge",
        "Size of a channel in spans, traces or rows, including what is being processed.",
        ("queue",),
        lambda s: [((n,), q.send.statistics().size) for n, q in s.pipeline.queues.items()],
    ),
    Declared(
        "betrace_seda_queue_capacity",
        "gauge",
        "Capacity of a channel.",
        ("queue",),
        lambda s: [((n,), q.send.capacity) for n, q in s.pipeline.queues.items()],
    ),
    Declared(
        "betrace_seda_queue_peak",
        "gauge",
        "Largest size of a channel since the last scrape.",
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
        "When a stage last finished an item; 0 before the first.",
        ("stage",),
        _progress,
    ),
    Declared(
        "betrace_stage_stalled",
        "gauge",
        "1 while a stage has input but has finished nothing for pipeline.stall_seconds.",
        ("stage",),
        _stalled,
    ),
    Declared(
        "betrace_backlog_tenants",
        "gauge",
        "Tenants whose spans wait because they used up their CPU time.",
        (),
        lambda s: [((), len(s.pipeline.correlate.backlog))],
    ),
    Declared(
        "betrace_backlog_spans",
        "gauge",
        "Spans of those tenants that wait to be folded.",
        (),
        lambda s: [((), s.pipeline.correlate.backlog.spans)],
    ),
    Declared(
        "betrace_backlog_bytes",
        "gauge",
        "Bytes of the requests that wait to be folded.",
        (),
        _waiting_bytes,
    ),
    Declared(
        "betrace_backlog_cpu_seconds",
        "counter",
        "CPU time of folding what waited.",
        (),
        lambda s: [((), s.pipeline.correlate.backlog.cpu_seconds)],
    ),
    Declared(
        "betrace_matches_unknown",
        "counter",
        "Spans not counted for a check because a text was too long for a pattern.",
        (),
        lambda s: [((), s.pipeline.open_traces.counts.unknown)],
    ),
    Declared(
        "betrace_cache_requests",
        "counter",
        "Cache lookups, by result.",
        ("cache", "result"),
        _cache_requests,
    ),
    Declared(
        "betrace_cache_hit_ratio",
        "gauge",
        "Share of cache lookups since the start that were hits; 0 before the first.",
        ("cache",),
        _of_caches("hitRate"),
    ),
    Declared(
        "betrace_cache_entries",
        "gauge",
        "Entries in a cache.",
        ("cache",),
        _of_caches("size"),
    ),
    Declared(
        "betrace_cache_evictions",
        "counter",
        "Cache entries evicted because of size or age.",
        ("cache",),
        _of_caches("evictionCount"),
    ),
    Declared(
        "betrace_cache_loads",
        "counter",
        "Cache loads by outcome, including warm-up and loading ahead.",
        ("cache", "outcome"),
        _cache_loads,
    ),
    Declared(
        "betrace_cache_load_seconds",
        "counter",
        "Time spent on cache loads; divided by their number, the cost of a miss.",
        ("cache",),
        _cache_load_seconds,
    ),
    Declared(
        "betrace_circuit_breaker_state",
        "gauge",
        "1 for the current state of the breaker, 0 for the others.",
        ("name", "state"),
        _breaker_states,
    ),
    Declared(
        "betrace_circuit_breaker_calls",
        "counter",
        "Calls through a breaker, by outcome; a slow call is also counted as slow.",
        ("name", "kind"),
        _breaker_calls,
    ),
)
