"""The endpoint for alerts that fire now."""

from __future__ import annotations

from typing import Any

from betrace.service.api.endpoint import Call, Endpoints
from betrace.service.api.params import LIMIT
from betrace.service.config.edge import Api
from betrace.service.export.alerts.alert import Alert
from betrace.service.times import write_time

endpoints = Endpoints("Signals and traces")

Json = dict[str, Any]


@endpoints.add(
    "GET",
    "/api/v1/alerts",
    "Alerts that fire now, the latest breach first",
    params=(LIMIT,),
    answers={200: '`{"alerts": […], "total", "destinations": [names]}`'},
)
async def list_alerts(call: Call) -> Any:
    """An alert is what people are paged for: one for each rule while it breaks. `started` and
    `last` are when its first and its last breach were detected, `count` is the number of breaches
    that are not retracted, and `ends` is when it resolves without another one. `examples` are up to
    five traces, the newest first; with `api.public_url` each has the `url` of its signal's page.
    `delivered` has the destinations that know of it. Without destinations in `[alerts]` there are
    no alerts; `total` counts those beyond `limit`, too."""
    alerts = call.tools.sources.alerts
    found = await call.blocking(alerts.firing, call.tenant)
    api, resolve_after_ns = call.tools.sources.settings.api, alerts.book.resolve_after_ns
    shown = found[: call.params["limit"]]
    return {
        "alerts": [_alert_json(each, api, resolve_after_ns) for each in shown],
        "total": len(found),
        "destinations": alerts.destinations,
    }


def _alert_json(alert: Alert, api: Api, resolve_after_ns: int) -> Json:
    examples = []
    for each in reversed(alert.examples):
        example = {"signal": each.signal, "trace_id": each.trace, "message": each.message}
        url = api.page_url(f"/signals/{each.signal}", alert.tenant)
        examples.append(example if url is None else {**example, "url": url})
    return {
        "rule_id": alert.rule,
        "severity": alert.severity,
        "labels": alert.labels,
        "started": write_time(alert.started_ns),
        "last": write_time(alert.last_ns),
        "ends": write_time(alert.quiet_ns(resolve_after_ns)),
        "count": alert.count,
        "examples": examples,
        "delivered": {
            name: {"state": str(had.state), "at": write_time(had.at_ns)}
            for name, had in alert.delivered.items()
        },
    }
