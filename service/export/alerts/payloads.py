"""Alerts as Alertmanager's API and receivers of its webhooks read them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson

from betrace.service.export.alerts.alert import Alert, AlertExample, State
from betrace.service.export.formats import NEVER
from betrace.service.times import write_time

_NOT_IN_LABELS = re.compile(r"[^a-zA-Z0-9_]")


@dataclass(frozen=True, slots=True)
class Links:
    """``page`` returns the address of a page of a tenant, None without a public URL;
    ``runbook_url`` may contain ``{tenant}`` and ``{rule}``."""

    page: Callable[[str, str], str | None]
    public_url: str = ""
    runbook_url: str = ""

    def example(self, alert: Alert, example: AlertExample) -> str | None:
        """The page of an example's signal."""
        return self.page(f"/signals/{example.signal}", alert.tenant)

    def runbook(self, alert: Alert) -> str:
        """The runbook of a rule."""
        text = self.runbook_url.replace("{tenant}", quote(alert.tenant, safe=""))
        return text.replace("{rule}", quote(alert.rule, safe=""))


def alert_labels(alert: Alert) -> dict[str, str]:
    """The labels that identify an alert: those of the rule, and ``alertname``, ``tenant`` and
    ``severity``. Characters that Alertmanager does not accept in names become ``_``; empty labels
    are left out."""
    own = {_label_name(name): value for name, value in sorted(alert.labels.items()) if value}
    return own | {"alertname": alert.rule, "tenant": alert.tenant, "severity": alert.severity}


def _label_name(name: str) -> str:
    name = _NOT_IN_LABELS.sub("_", name)
    return f"_{name}" if name[0].isdigit() else name


def alert_annotations(alert: Alert, links: Links) -> dict[str, str]:
    """What people read: a summary, the count, the first and the last time, and up to five of the
    latest examples, one a line."""
    found = {
        "summary": _summary(alert),
        "count": str(alert.count),
        "first": write_time(alert.started_ns),
        "last": write_time(alert.last_ns),
        "examples": "\n".join(_example(alert, each, links) for each in reversed(alert.examples)),
        "runbook_url": links.runbook(alert),
    }
    return {name: text for name, text in found.items() if text}


def _summary(alert: Alert) -> str:
    if not alert.examples:  # those that were kept were retracted
        return f"{_traces(alert.count)} broke the rule {alert.rule} of tenant {alert.tenant}"
    message = alert.examples[-1].message
    whom = f"the rule {alert.rule} of tenant {alert.tenant}"
    if alert.count == 1:
        return f"A trace broke {whom}. {message}"
    return f"{_traces(alert.count)} broke {whom}. The latest: {message}"


def _traces(count: int) -> str:
    return "1 trace" if count == 1 else f"{count} traces"


def _example(alert: Alert, example: AlertExample, links: Links) -> str:
    link = links.example(alert, example)
    return f"trace {example.trace}: {link}" if link else f"trace {example.trace}"


def generator_url(alert: Alert, links: Links) -> str:
    """The page of the latest example, or else of the tenant's signals."""
    if alert.examples:
        return links.example(alert, alert.examples[-1]) or ""
    return links.page("/signals", alert.tenant) or ""


def for_alertmanager(alerts: Sequence[tuple[Alert, int]], links: Links) -> bytes:
    """The body of ``POST /api/v2/alerts`` for alerts, each with the time when it ends or will end
    without another signal (``endsAt``). So Alertmanager resolves it by itself if this service does
    not come back, and its ``resolve_timeout`` does not matter."""
    return orjson.dumps(
        [
            {
                "labels": alert_labels(alert),
                "annotations": alert_annotations(alert, links),
                "startsAt": write_time(alert.started_ns),
                "endsAt": write_time(max(ends_ns, alert.started_ns + 1)),
                "generatorURL": generator_url(alert, links),
            }
            for alert, ends_ns in alerts
        ]
    )


def for_webhook(alert: Alert, state: State, links: Links) -> bytes:
    """The body of an Alertmanager webhook (``version`` 4) with one alert."""
    shared, texts = alert_labels(alert), alert_annotations(alert, links)
    shown: dict[str, Any] = {
        "status": str(state),
        "labels": shared,
        "annotations": texts,
        "startsAt": write_time(alert.started_ns),
        "endsAt": NEVER if state is State.FIRING else write_time(alert.ended_ns),
        "generatorURL": generator_url(alert, links),
        "fingerprint": fingerprint(alert),
    }
    return orjson.dumps(
        {
            "version": "4",
            "groupKey": f'{{}}:{{alertname="{alert.rule}", tenant="{alert.tenant}"}}',
            "truncatedAlerts": 0,
            "status": str(state),
            "receiver": "betrace",
            "groupLabels": {"alertname": alert.rule, "tenant": alert.tenant},
            "commonLabels": shared,
            "commonAnnotations": texts,
            "externalURL": links.public_url,
            "alerts": [shown],
        }
    )


def fingerprint(alert: Alert) -> str:
    """The same for all notifications of a tenant's rule: 16 hex digits."""
    return hashlib.sha256(f"{alert.tenant}/{alert.rule}".encode()).hexdigest()[:16]
