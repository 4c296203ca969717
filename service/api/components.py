"""The state of each part of the service, as ``/readyz`` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from betrace.service.api.sources import Sources
from betrace.service.pipeline import breakers

if TYPE_CHECKING:
    from betrace.service.cluster.query.node import QueryNode

Json = dict[str, Any]


def components(sources: Sources) -> dict[str, Json]:
    """``status`` and ``detail`` by name. While the service starts or drains, nearly every
    component has that status."""
    pipeline, ledger, state = sources.pipeline, sources.ledger, sources.state()
    whole = {"starting": "starting", "draining": "stopping"}.get(state)
    found: dict[str, Json] = {
        "service": {"status": whole or "ok", "detail": state},
        "span-log": _span_log(sources),
    }
    stall = sources.settings.pipeline.stall_seconds
    for name, stage in pipeline.stages.items():
        status, detail = "ok", "working"
        if stage.paused:
            status, detail = "degraded", "paused"
        elif stage.stalled(stall):
            status, detail = "failed", f"no progress for {stall:g} s with input waiting"
        found[name] = {"status": whole or status, "detail": detail}
    for breaker in pipeline.breakers:
        shown = {"status": whole or breakers.status(breaker), "detail": str(breaker.state)}
        found[f"breaker-{breaker.name}"] = shown
    hung, problem = ledger.clients.left_behind, ledger.problem
    found["ledger"] = {
        "status": whole or ("degraded" if problem or hung else "ok"),
        "detail": problem or f"{ledger.kind}; {hung or 'no'} hung clients",
    }
    broken = len(sources.duckdb.incomplete)
    found["duckdb"] = {
        "status": "degraded" if broken else "ok",
        "detail": f"the files of {broken} tenants are being rebuilt; see duckdb.damaged and "
        "duckdb.incomplete in the service's log"
        if broken
        else "complete",
    }
    for name, fallback in pipeline.fallbacks.items():
        lines = fallback.statistics().lines
        status = "degraded" if fallback.pending else "ok"
        detail = f"{lines} records are waiting to be written back" if lines else "nothing waiting"
        found[f"fallback-{name}"] = {"status": whole or status, "detail": detail}
    letters = pipeline.letters.book.total
    found["dead-letters"] = {
        "status": whole or ("degraded" if letters else "ok"),
        "detail": f"{letters} letters" if letters else "none",
    }
    if sources.node is not None:
        found["cluster"] = _cluster(sources.node, whole)
        found |= sources.node.cluster.others.role_components()
    problems = sources.rules.problems
    found["rules"] = {
        "status": "degraded" if problems else "ok",
        "detail": f"{len(problems)} files rejected" if problems else "all files loaded",
    }
    return found


def _cluster(node: QueryNode, whole: str | None) -> Json:
    partitions = node.partitions()
    failing = [each for each in partitions if each["problem"] is not None]
    lag = sum(each["lag"] or 0 for each in partitions)
    detail = f"node {node.name}, roles {', '.join(node.roles)}; {lag} messages to apply"
    if failing:
        first = failing[0]
        detail += f"; {len(failing)} partitions cannot be read: {first['problem']}"
    return {"status": whole or ("degraded" if failing else "ok"), "detail": detail}


def _span_log(sources: Sources) -> Json:
    if sources.data_directory.gone:
        text = "the data directory was deleted or replaced; spans are refused"
        return {"status": "failed", "detail": text}
    sync, damage = sources.pipeline.sync, sources.log.damage
    detail = f"{sync.failures} sync failures"
    if damage.places:
        detail += (
            f"; {damage.places} damaged places in the logs of {damage.tenants} tenants: see "
            "log.damaged in the service's log, and BetraceSpanLogDamaged in docs/runbook.md"
        )
    return {"status": "degraded" if sync.failing or damage.places else "ok", "detail": detail}
