"""Endpoints that show rates, latencies, channels, caches and the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import trio

from betrace.service.api.components import components
from betrace.service.api.endpoint import EVENTS_TYPE, Answer, Call, Endpoints, event
from betrace.service.api.endpoints.breakers import breaker_list
from betrace.service.api.endpoints.pipeline import pipeline_state
from betrace.service.api.errors import ApiError
from betrace.service.api.params import Param, near, read_text

endpoints = Endpoints("Performance", access="operator")

SNAPSHOT_SECONDS = 1.0


@endpoints.add(
    "GET",
    "/api/performance/metrics",
    "Rates, latencies and totals",
    answers={
        200: "`spanIngestionRate`, `ruleEvaluationP99`, `tigerBeetleWriteLatency`, "
        "`duckDBInsertThroughput`, `activeTenants`, `memoryUsageMB`, `uptime`, …, and `stages`"
    },
)
async def get_metrics(call: Call) -> Any:
    """Rates (per second) and latencies (milliseconds, null if nothing was timed) cover the last
    `windowSeconds` (`metrics.window_seconds`) and up to a twelfth more; everything else counts from
    the start. A latency is within 1 % of the exact percentile.

    `tigerBeetleWriteLatency` is the p99 of recording a batch of signals in the ledger, whatever the
    ledger is. `ruleEvaluationP99` is that of deciding a batch, `endToEndP99` that from the last
    span that mattered until its signal is in the ledger, `duckDBWriteLatency` that of writing a
    batch of rows.
    `duckDBInsertThroughput` is in rows. `spansRefused` is by reason.

    A stage has `in` and `out` (items: requests or batches), `unitsIn` and `unitsOut` (spans, traces
    or rows; see `unit`), `rate` (units processed per second), `latencyMs` (`p50`, `p95`, `p99` of
    the time for a batch), `errors`, `dead` (items moved to dead letters), `lastError`, and
    `lastProgress` (seconds since 1970)."""
    return call.tools.performance.metrics()


@endpoints.add(
    "GET",
    "/api/performance/queue-stats",
    "All channels",
    answers={200: '`{"queues": […]}`'},
)
async def list_queues(call: Call) -> Any:
    """Sizes are in spans, traces or rows; see `unit`. `peak` is the largest size since the last
    reading."""
    return {"queues": call.tools.performance.queues()}


@endpoints.add(
    "GET",
    "/api/performance/queue-stats/{name}",
    "One channel",
    path_params=(Param("name", "The name of the channel, such as span-ingestion.", read_text),),
    answers={200: "The channel", 404: "There is no such channel"},
)
async def get_queue(call: Call) -> Any:
    queues = {queue["name"]: queue for queue in call.tools.performance.queues()}
    name = call.params["name"]
    if name not in queues:
        raise ApiError(404, f"there is no channel {name[:80]!r}", near(name, queues))
    return queues[name]


@endpoints.add(
    "GET",
    "/api/performance/cache-stats",
    "All caches",
    answers={200: "By cache: hits, misses, hit rate, evictions, loads, size"},
)
async def get_caches(call: Call) -> Any:
    return call.tools.sources.caches.statistics()


@endpoints.add(
    "GET",
    "/api/performance/trace-windows",
    "Open traces",
    answers={200: "`activeWindows`, `totalSpansInMemory`, `memoryBytes`, `oldestSeconds`, …"},
)
async def get_windows(call: Call) -> Any:
    return call.tools.performance.trace_windows()


@endpoints.add(
    "GET",
    "/api/performance/system-stats",
    "The process",
    answers={200: "`memory`, `cpu`, `threads`, `gc`, `uptime`"},
)
async def get_system(call: Call) -> Any:
    return call.tools.performance.system()


@endpoints.add(
    "GET",
    "/api/performance/stream",
    "All of the above, once a second, as server-sent events",
    answers={200: "Events named `snapshot`"},
    media_type=EVENTS_TYPE,
)
async def stream_performance(call: Call) -> Answer:
    """An event has `metrics`, `queues`, `caches`, `traceWindows` and `system`, and from other
    endpoints `breakers`, `pipeline`, `ready` and `components`."""
    sources, performance = call.tools.sources, call.tools.performance

    async def events() -> AsyncIterator[bytes]:
        while True:
            snapshot = {
                "metrics": performance.metrics(),
                "queues": performance.queues(),
                "caches": sources.caches.statistics(),
                "traceWindows": performance.trace_windows(),
                "system": performance.system(),
                "breakers": breaker_list(sources),
                "pipeline": pipeline_state(sources),
                "ready": sources.ready,
                "components": components(sources),
            }
            yield event("snapshot", snapshot)
            await trio.sleep(SNAPSHOT_SECONDS)

    return call.stream(events)
