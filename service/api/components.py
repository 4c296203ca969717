"""The parts of the service, each with its state: what ``/readyz`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from betrace.service.pipeline import breakers

if TYPE_CHECKING:
    from betrace.service.app import Service

Json = dict[str, Any]


def components(service: Service, state: str) -> Mapping[str, Json]:
    """``status`` and ``detail`` by name. While the service as a whole is starting or draining, that
    is the status of each."""
    whole = {"starting": "starting", "draining": "stopping"}.get(state)
    found: dict[str, Json] = {
        "service": {"status": whole or "ok", "detail": state},
        "span-log": {"status": "ok", "detail": f"{service.pipeline.sync.failures} sync failures"},
    }
    if service.pipeline.sync.failures:
        found["span-log"]["status"] = "degraded"
    stall = service.settings.pipeline.stall_seconds
    for name, stage in service.pipeline.stages.items():
        status, detail = "ok", "working"
        if stage.paused:
            status, detail = "degraded", "paused"
        elif stage.stalled(stall):
            status, detail = "failed", f"no progress for {stall:g} s with input waiting"
        found[name] = {"status": whole or status, "detail": detail}
    for breaker in service.pipeline.breakers:
        shown = {"status": whole or breakers.status(breaker), "detail": str(breaker.state)}
        found[f"breaker-{breaker.name}"] = shown
    hanging, problem = service.ledger.clients.left_behind, service.ledger.problem
    found["ledger"] = {
        "status": whole or ("degraded" if problem or hanging else "ok"),
        "detail": problem or f"{service.ledger.kind}, {hanging} clients hang",
    }
    for name, fallback in service.pipeline.fallbacks.items():
        lines = fallback.statistics().lines
        status = "degraded" if fallback.pending else "ok"
        detail = f"{lines} records wait to be written back" if lines else "nothing waits"
        found[f"fallback-{name}"] = {"status": whole or status, "detail": detail}
    letters = service.pipeline.letters.total
    found["dead-letters"] = {
        "status": whole or ("degraded" if letters else "ok"),
        "detail": f"{letters} letters" if letters else "none",
    }
    problems = service.registry.store.problems
    found["rules"] = {
        "status": "degraded" if problems else "ok",
        "detail": f"{len(problems)} files not taken" if problems else "all files taken",
    }
    return found
