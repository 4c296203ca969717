"""Endpoints for the fallback files of the ledger and DuckDB."""

from __future__ import annotations

from typing import Any

from betrace.service.api.endpoint import Answer, Call, Endpoints

endpoints = Endpoints("Administration", access="operator")


@endpoints.add(
    "GET",
    "/api/admin/fallback",
    "Records waiting in local files for the ledger and DuckDB",
    answers={200: '`{"fallbacks": [{"name", "pendingFiles", "pendingRecords", …}]}`'},
)
async def list_fallbacks(call: Call) -> Any:
    fallbacks = call.tools.sources.pipeline.fallbacks.values()
    return {"fallbacks": [fallback.shown() for fallback in fallbacks]}


@endpoints.add(
    "POST",
    "/api/admin/fallback/replay",
    "Write the local files back now",
    answers={202: '`{"fallbacks": […]}`, their current state'},
)
async def replay_fallbacks(call: Call) -> Any:
    """The files are written back automatically when the breaker of the store permits it; this skips
    the pause before the next attempt."""
    await call.note("fallback.replay")
    for fallback in call.tools.sources.pipeline.fallbacks.values():
        fallback.write_back_now()
    return Answer(await list_fallbacks(call), 202)
