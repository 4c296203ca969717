"""The formats in which other systems receive signals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import SeverityNumber

from betrace.service.signals import Kind, Signal, raised_id
from betrace.service.times import write_time

_SEVERITIES = {
    "critical": SeverityNumber.SEVERITY_NUMBER_FATAL,
    "high": SeverityNumber.SEVERITY_NUMBER_ERROR,
    "medium": SeverityNumber.SEVERITY_NUMBER_WARN,
    "low": SeverityNumber.SEVERITY_NUMBER_INFO2,
    "info": SeverityNumber.SEVERITY_NUMBER_INFO,
}
NEVER = "0001-01-01T00:00:00Z"  # Go's zero time, which means "not yet" in Alertmanager


PageUrl = Callable[[str, str], str | None]
"""Returns the address of a page of a tenant, None without a public URL."""


def otlp_logs(
    signals: Sequence[Signal], version: str, page_url: PageUrl = lambda *_: None
) -> bytes:
    """Return an ``ExportLogsServiceRequest`` (opentelemetry-proto 1.x) with a log record for each
    signal and a resource for each tenant.

    A record has the id of the trace that broke the rule and of the first span in its evidence. Its
    body is the message, its event name is ``betrace.signal``, and everything else is in attributes.
    """
    request = ExportLogsServiceRequest()
    by_tenant: dict[str, Any] = {}
    for signal in signals:
        records = by_tenant.get(signal.tenant)
        if records is None:
            of_tenant = request.resource_logs.add()
            _set(of_tenant.resource.attributes, "service.name", "betrace")
            _set(of_tenant.resource.attributes, "betrace.tenant", signal.tenant)
            scope = of_tenant.scope_logs.add()
            scope.scope.name, scope.scope.version = "betrace", version
            records = by_tenant[signal.tenant] = scope.log_records
        record = records.add(
            time_unix_nano=signal.detected_at,
            observed_time_unix_nano=signal.detected_at,
            severity_number=_SEVERITIES.get(signal.severity, SeverityNumber.SEVERITY_NUMBER_INFO),
            severity_text=signal.severity,
            trace_id=bytes.fromhex(signal.trace_id),
            event_name="betrace.signal",
        )
        record.body.string_value = signal.message
        spans = [span for found in signal.evidence.values() for span in found]
        if spans:
            record.span_id = bytes.fromhex(spans[0])
        for name, value in (
            ("id", signal.id),
            ("kind", str(signal.kind)),
            ("rule.id", signal.rule_id),
            ("rule.version", signal.rule_version),
            ("clause", signal.clause),
            ("counts", orjson.dumps(signal.counts).decode()),
            ("evidence", orjson.dumps(signal.evidence).decode()),
            ("reason", signal.reason),
            ("service", signal.service),
            ("url", page_url(f"/signals/{raised_id(signal)}", signal.tenant)),
            *((f"label.{name}", value) for name, value in signal.labels.items()),
        ):
            if value is not None:
                _set(record.attributes, f"betrace.{name}", value)
    return request.SerializeToString()


def _set(attributes: Any, key: str, value: str) -> None:
    attributes.add(key=key).value.string_value = value


def alert_groups(signals: Iterable[Signal]) -> list[list[Signal]]:
    """Group signals by tenant and rule, as webhooks expect; the order in a group is kept."""
    groups: dict[tuple[str, str], list[Signal]] = {}
    for signal in signals:
        groups.setdefault((signal.tenant, signal.rule_id), []).append(signal)
    return list(groups.values())


def alertmanager(
    group: Sequence[Signal], external_url: str, page_url: PageUrl = lambda *_: None
) -> bytes:
    """Return the body of an Alertmanager webhook (``version`` 4,
    prometheus.io/docs/alerting/configuration) for signals of one tenant and rule.

    A raised signal is a firing alert; a retraction resolves it with the same labels and
    fingerprint.
    """
    first = group[0]
    alerts = [_alert(signal, external_url, page_url) for signal in group]
    shared = {"alertname": first.rule_id, "tenant": first.tenant}
    firing = any(alert["status"] == "firing" for alert in alerts)
    return orjson.dumps(
        {
            "version": "4",
            "groupKey": f'{{}}:{{alertname="{first.rule_id}", tenant="{first.tenant}"}}',
            "truncatedAlerts": 0,
            "status": "firing" if firing else "resolved",
            "receiver": "betrace",
            "groupLabels": shared,
            "commonLabels": _common([alert["labels"] for alert in alerts]),
            "commonAnnotations": _common([alert["annotations"] for alert in alerts]),
            "externalURL": external_url,
            "alerts": alerts,
        }
    )


def _alert(signal: Signal, external_url: str, page_url: PageUrl) -> dict[str, Any]:
    raised = signal.kind == Kind.RAISED
    at = write_time(signal.detected_at)
    of = raised_id(signal)
    link = f"{external_url}/api/v1/signals/{of}" if external_url else ""
    annotations = {"summary": signal.message, "clause": signal.clause}
    if signal.reason is not None:
        annotations["reason"] = signal.reason
    return {
        "status": "firing" if raised else "resolved",
        "labels": {
            **signal.labels,
            "alertname": signal.rule_id,
            "tenant": signal.tenant,
            "severity": signal.severity,
            "trace_id": signal.trace_id,
        },
        "annotations": annotations,
        "startsAt": at,
        "endsAt": NEVER if raised else at,
        "generatorURL": page_url(f"/signals/{of}", signal.tenant) or link,
        "fingerprint": of[:16],
    }


def _common(of_each: list[dict[str, str]]) -> dict[str, str]:
    first, *others = of_each
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
