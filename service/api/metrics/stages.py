"""Metrics of channels, stages, breakers and caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from betrace.channels import BreakerState
from betrace.service.api.metrics.declared import Declared, Samples
from betrace.service.pipeline import breakers

if TYPE_CHECKING:
    from betrace.service.app import Service


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


def _stalled(service: Service) -> Samples:
    seconds = service.settings.pipeline.stall_seconds
    for name, stage in service.pipeline.stages.items():
        yield (name,), float(stage.stalled(seconds))


def _breaker_states(service: Service) -> Samples:
    for breaker in service.pipeline.breakers:
        for state in BreakerState:
            yield (breaker.name, str(state)), float(breaker.state is state)


def _breaker_calls(service: Service) -> Samples:
    for breaker in service.pipeline.breakers:
        for kind, number in breakers.calls(breaker).items():
            yield (breaker.name, kind), number


def _cache_requests(service: Service) -> Samples:
    for name, stats in service.cache_stats().items():
        yield (name, "hit"), stats["hitCount"]
        yield (name, "miss"), stats["missCount"]


def _cache_loads(service: Service) -> Samples:
    for name, stats in service.cache_stats().items():
        yield (name, "success"), stats["loadSuccessCount"]
        yield (name, "failure"), stats["loadFailureCount"]


def _cache_load_seconds(service: Service) -> Samples:
    for name, stats in service.cache_stats().items():
        loads = stats["loadSuccessCount"] + stats["loadFailureCount"]
        yield (name,), stats["averageLoadPenaltyMs"] * loads / 1e3


def _of_caches(key: str) -> Callable[[Service], Samples]:
    return lambda service: [((name,), s[key]) for name, s in service.cache_stats().items()]


DECLARED = (
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
        _of_caches("hitRate"),
    ),
    Declared(
        "betrace_cache_entries",
        "gauge",
        "Entries of a cache.",
        ("cache",),
        _of_caches("size"),
    ),
    Declared(
        "betrace_cache_evictions",
        "counter",
        "Entries that left a cache for room or age.",
        ("cache",),
        _of_caches("evictionCount"),
    ),
    Declared(
        "betrace_cache_loads",
        "counter",
        "What was loaded into a cache, by how it ended; warm-up and loading ahead included.",
        ("cache", "outcome"),
        _cache_loads,
    ),
    Declared(
        "betrace_cache_load_seconds",
        "counter",
        "Time spent in the loads of a cache; over their number it is what a miss costs.",
        ("cache",),
        _cache_load_seconds,
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
)
