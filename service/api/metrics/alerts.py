"""Metrics of alerts by rule."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from betrace.service.api.metrics.declared import Declared, Samples, one
from betrace.service.api.sources import Sources
from betrace.service.config.alerts import ALERT_WEBHOOK, ALERTMANAGER
from betrace.service.export.alerts.sender import AlertSender


def _each(value: Callable[[Sources, AlertSender], float]) -> Callable[[Sources], Samples]:
    """A number for each destination; 0 if it is not configured."""

    def samples(sources: Sources) -> Samples:
        found = dict.fromkeys((ALERTMANAGER, ALERT_WEBHOOK), 0.0)
        found |= {sender.name: value(sources, sender) for sender in sources.alerts}
        for name, number in found.items():
            yield (name,), number

    return samples


def _sent(sources: Sources) -> Samples:
    for outcome in ("sent", "rejected"):
        get = attrgetter(outcome)
        for (name,), number in _each(lambda _, sender, get=get: get(sender))(sources):  # type: ignore[misc]
            yield (name, outcome), number


DECLARED: tuple[Declared[Sources], ...] = (
    Declared(
        "betrace_alerts_firing",
        "gauge",
        "Alerts that fire: rules of tenants that are broken now and page somebody. 0 without a "
        "destination in [alerts].",
        (),
        lambda s: one(s.alerts.book.firing),
    ),
    Declared(
        "betrace_alerts_started",
        "counter",
        "Alerts that began, or continued before receivers were told that they were over.",
        (),
        lambda s: one(s.alerts.book.started),
    ),
    Declared(
        "betrace_alerts_resolved",
        "counter",
        "Alerts that ended, by reason: no new signal, all signals retracted, or the rule muted.",
        ("reason",),
        lambda s: [((reason,), n) for reason, n in s.alerts.book.resolved.items()],
    ),
    Declared(
        "betrace_alerts_overflow",
        "counter",
        "Signals that started no alert because alerts.max_active rules were broken.",
        (),
        lambda s: one(s.alerts.book.overflowed),
    ),
    Declared(
        "betrace_alert_deliveries",
        "counter",
        "Alerts sent, repetitions included, by outcome: sent, or permanently rejected.",
        ("destination", "outcome"),
        _sent,
    ),
    Declared(
        "betrace_alert_delivery_failures",
        "counter",
        "Failed deliveries of alerts that are retried.",
        ("destination",),
        _each(lambda _, sender: sender.failures),
    ),
    Declared(
        "betrace_alert_delivery_lag_seconds",
        "gauge",
        "For how long a destination has not been told of an alert that began or ended.",
        ("destination",),
        _each(lambda sources, sender: sources.alerts.lag_seconds(sender.name)),
    ),
)
