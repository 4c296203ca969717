"""Endpoints that show operators how the service does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import trio

from service.http.endpoint import EVENTS_TYPE, Answer, Call, Endpoints, event
from service.http.errors import ApiError
from service.http.params import Param, near, read_text

endpoints = Endpoints("Performance", access="operator")

SNAPSHOT_SECONDS = 1.0


@endpoints.add(
    "GET",
    "/api/performance/metrics",
    "Rates, latencies and totals",
    answers={200: "`spanIngestionRate`, `ruleEvaluationP99`, … and per stage in, out, errors"},
)
async def get_metrics(call: Call) -> Any:
    """Rates and percentiles cover the last `metrics.window_seconds`."""
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
    """The data has `metrics`, `queues`, `caches`, `traceWindows`, `system`, `ready` and
    `components`."""
    backend = call.backend

    async def events() -> AsyncIterator[bytes]:
        while True:
            snapshot = {
                "metrics": backend.performance_metrics(),
                "queues": list(backend.queue_stats()),
                "caches": dict(backend.cache_stats()),
                "traceWindows": backend.trace_windows(),
                "system": backend.system_stats(),
                "ready": backend.ready,
                "components": dict(backend.components()),
            }
            yield event("snapshot", snapshot)
            await trio.sleep(SNAPSHOT_SECONDS)

    return call.stream(events)
