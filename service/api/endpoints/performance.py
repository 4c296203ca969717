"""Endpoints that show operators how the service does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import trio

from betrace.service.api.endpoint import EVENTS_TYPE, Answer, Call, Endpoints, event
from betrace.service.api.params import Param, near, read_text
from betrace.service.receiver.responses import ApiError

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
    """Rates (a second) and latencies (milliseconds, null where nothing was timed) cover the last
    `windowSeconds` (`metrics.window_seconds`) and up to a twelfth more; everything else is since
    the start. A latency is within 1 % of the exact percentile.

    `tigerBeetleWriteLatency` is the p99 of recording a batch of signals in the ledger, whatever the
    ledger is; `ruleEvaluationP99` of deciding a batch, `endToEndP99` from the last span that
    mattered to the signal in the ledger, `duckDBWriteLatency` of writing a batch of rows;
    `duckDBInsertThroughput` is in rows. `spansRefused` is by reason.

    A stage has `in` and `out` (items: requests or batches), `unitsIn` and `unitsOut` (spans, traces
    or rows, as `unit` says), `rate` (units done a second), `latencyMs` (`p50`, `p95`, `p99` of its
    work on a batch), `errors`, `dead` (items given up), `lastError`, and `lastProgress` (seconds
    since 1970)."""
    return call.backend.performance_metrics()


@endpoints.add(
    "GET",
    "/api/performance/queue-stats",
    "All channels",
    answers={200: '`{"queues": […]}`'},
)
async def list_queues(call: Call) -> Any:
    """Sizes are in spans, traces or signals; `peak` is that since it was last read."""
    return {"queues": list(call.backend.queue_stats())}


@endpoints.add(
    "GET",
    "/api/performance/queue-stats/{name}",
    "One channel",
    path_params=(Param("name", "The channel's name, such as span-ingestion.", read_text),),
    answers={200: "The channel", 404: "There is no such channel"},
)
async def get_queue(call: Call) -> Any:
    queues = {queue["name"]: queue for queue in call.backend.queue_stats()}
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
    return dict(call.backend.cache_stats())


@endpoints.add(
    "GET",
    "/api/performance/trace-windows",
    "Open traces",
    answers={200: "`activeWindows`, `totalSpansInMemory`, `memoryBytes`, the oldest"},
)
async def get_windows(call: Call) -> Any:
    return call.backend.trace_windows()


@endpoints.add(
    "GET",
    "/api/performance/system-stats",
    "The process",
    answers={200: "`memory`, `cpu`, `threads`, `gc`, `uptime`"},
)
async def get_system(call: Call) -> Any:
    return call.backend.system_stats()


@endpoints.add(
    "GET",
    "/api/performance/stream",
    "All of the above, once a second, as server-sent events",
    answers={200: "Events named `snapshot`"},
    media_type=EVENTS_TYPE,
)
async def stream_performance(call: Call) -> Answer:
    """The data has `metrics`, `queues`, `caches`, `traceWindows` and `system`, and of other
    endpoints `breakers`, `pipeline`, `ready` and `components`."""
    backend = call.backend

    async def events() -> AsyncIterator[bytes]:
        while True:
            snapshot = {
                "metrics": backend.performance_metrics(),
                "queues": list(backend.queue_stats()),
                "caches": dict(backend.cache_stats()),
                "traceWindows": backend.trace_windows(),
                "system": backend.system_stats(),
                "breakers": list(backend.admin.breakers()),
                "pipeline": backend.admin.pipeline(),
                "ready": backend.ready,
                "components": dict(backend.components()),
            }
            yield event("snapshot", snapshot)
            await trio.sleep(SNAPSHOT_SECONDS)

    return call.stream(events)
