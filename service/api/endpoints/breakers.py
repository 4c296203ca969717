"""Endpoints for circuit breakers."""

from __future__ import annotations

from typing import Any

from betrace.service.api.endpoint import Call, Endpoints
from betrace.service.api.errors import ApiError
from betrace.service.api.params import Param, near, read_choice, read_text
from betrace.service.api.sources import Sources
from betrace.service.pipeline import breakers

endpoints = Endpoints("Administration", access="operator")


def breaker_list(sources: Sources) -> list[dict[str, Any]]:
    """All circuit breakers."""
    return [breakers.shown(each, sources.wall_time) for each in sources.pipeline.breakers]


@endpoints.add(
    "GET",
    "/api/admin/breakers",
    "All circuit breakers",
    answers={200: '`{"breakers": [{"name", "state", "failureRate", "calls", …}]}`'},
)
async def list_breakers(call: Call) -> Any:
    """`state` is closed, open, half_open, forced_open or disabled. Rates are null below the minimum
    number of calls. `retryInSeconds` is the time until a call may be permitted, null if an operator
    has to act first."""
    return {"breakers": breaker_list(call.tools.sources)}


@endpoints.add(
    "POST",
    "/api/admin/breakers/{name}/{action}",
    "Trip, reset, force open or disable a circuit breaker",
    path_params=(
        Param(
            "name",
            "The breaker: `rule-evaluation`, `ledger`, `duckdb`, or, if that export is configured, "
            "`export-otlp` or `export-webhook`.",
            read_text,
        ),
        Param(
            "action",
            "What to do.",
            read_choice(*breakers.ACTIONS),
            {"type": "string", "enum": list(breakers.ACTIONS)},
        ),
    ),
    answers={200: "The breaker", 404: "There is no such breaker"},
)
async def act_on_breaker(call: Call) -> Any:
    """`trip` opens it as failures do, so trial calls follow; `reset` closes it. `force-open`
    refuses all calls and `disable` permits all, until the next action."""
    sources, name, action = call.tools.sources, call.params["name"], call.params["action"]
    pipeline = sources.pipeline
    names = [breaker.name for breaker in pipeline.breakers]
    if name not in names:
        raise ApiError(404, f"there is no circuit breaker {name[:80]!r}", near(name, names))
    breaker = pipeline.breakers[name]
    await call.note(f"breaker.{action}", breaker=name, before=str(breaker.state))
    pipeline.breakers.act(name, action)
    for fallback in pipeline.fallbacks.values():
        fallback.write_back_now()
    return breakers.shown(breaker, sources.wall_time)
