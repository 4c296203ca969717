"""Endpoints for health, which need no authentication, and metrics."""

from __future__ import annotations

from typing import Any

from betrace.channels import ThreadTimeout
from betrace.service.api.components import components
from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.errors import ApiError
from betrace.service.api.metrics.exposition import TEXT_TYPE, media_type

endpoints = Endpoints("Health", access="none")


@endpoints.add("GET", "/livez", "Whether the process is alive", answers={200: '`{"status": "ok"}`'})
@endpoints.add("GET", "/healthz", "The same as /livez", answers={200: '`{"status": "ok"}`'})
async def get_live(call: Call) -> Any:
    return {"status": "ok"}


@endpoints.add(
    "GET",
    "/readyz",
    "Whether requests should be sent here",
    answers={
        200: '`{"status": "ready", "components": {name: {"status", "detail"}}}`',
        503: "The same with `not ready`: the service is starting or draining",
    },
)
async def get_ready(call: Call) -> Any:
    """The status of a component is starting, ok, degraded, failed or stopping."""
    sources = call.tools.sources
    ready = sources.ready
    status = "ready" if ready else "not ready"
    return Answer({"status": status, "components": components(sources)}, 200 if ready else 503)


@endpoints.add(
    "GET",
    "/metrics",
    "Metrics in Prometheus' text format",
    answers={200: "The metrics", 503: "The disk did not answer in time"},
    media_type=TEXT_TYPE,
    access="scrape",
)
async def get_exposition(call: Call) -> Any:
    """With `Accept: application/openmetrics-text`, as OpenMetrics with exemplars."""
    accepted = media_type(call.headers.get("accept", ""))
    try:
        return Answer(await call.tools.exposition.scrape(accepted), media_type=accepted)
    except ThreadTimeout as error:
        raise ApiError(
            503,
            f"the metrics could not be read ({error})",
            "check the disk of the data directory",
        ) from None
