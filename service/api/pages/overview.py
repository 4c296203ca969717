"""The overview: signals over time, the rules that break most, and the latest signals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from betrace.service.api.pages.visit import Page, Visit
from betrace.service.api.params import Param, read_choice
from betrace.service.rules.definition import SEVERITIES
from betrace.service.storage.duck.queries import SummaryRow
from betrace.service.times import SECOND, read_time

Json = dict[str, Any]

LATEST = 10
TOP = 12
TOP_ALERTS, ALL_ALERTS = 4, 100  # shown at once, and after a click
BARS = 60
RANGES = {
    "1h": (3600, "the last hour"),
    "6h": (6 * 3600, "the last 6 hours"),
    "24h": (86_400, "the last 24 hours"),
    "7d": (7 * 86_400, "the last 7 days"),
}
_RANGE = Param("range", "", read_choice(*RANGES), default="1h")


@dataclass(slots=True)
class Bar:
    """The signals of a bucket of time, by severity, the most severe first."""

    start: int
    total: int = 0
    parts: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class RuleCount:
    """The signals of a rule: how many were raised and retracted, and when, in ``BARS`` buckets."""

    rule_id: str
    name: str
    severity: str
    raised: int = 0
    retracted: int = 0
    bars: list[int] = field(default_factory=lambda: [0] * BARS)
    muted: bool = False


async def overview(visit: Visit) -> Page:
    """What happened recently."""
    given = visit.params((_RANGE,))
    return await visit.show("overview.html", lambda: _overview(visit, given["range"]))


def _overview(visit: Visit, chosen: str) -> Json:
    tools, tenant = visit.tools, visit.viewer.tenant
    seconds, words = RANGES[chosen]
    bucket = seconds * SECOND // BARS
    first = read_time("now") // bucket - BARS + 1
    rows = tools.store.summary(tenant, first * bucket, (first + BARS) * bucket, bucket)
    rules = {rule.id: rule for rule in tools.sources.rules.rules(tenant)}
    bars = [Bar((first + k) * bucket) for k in range(BARS)]
    counts: dict[str, RuleCount] = {}
    for row in rows:
        _add(bars[row.bucket_ns // bucket - first], row)
        rule = rules.get(row.rule_id)
        found = counts.setdefault(
            row.rule_id,
            RuleCount(row.rule_id, rule.name if rule else row.rule_id, row.severity),
        )
        found.raised += row.raised
        found.retracted += row.retracted
        found.bars[row.bucket_ns // bucket - first] += row.raised
    for found in counts.values():
        found.muted = tools.triage.current_mute(tenant, found.rule_id) is not None
    alerts = tools.sources.alerts
    firing = alerts.firing(tenant) if alerts.destinations else []
    undecided, _ = tools.undecided.page(tenant, limit=1)
    latest, _ = tools.store.signals(tenant, limit=LATEST)
    top = sorted(counts.values(), key=lambda each: (-each.raised, each.rule_id))
    severities: Counter[str] = Counter()
    for bar in bars:
        severities += bar.parts
    return {
        "chosen": chosen,
        "words": words,
        "ranges": list(RANGES),
        "since": first * bucket,
        "bars": bars,
        "highest": max(1, max(bar.total for bar in bars)),
        "total": sum(severities.values()),
        "retracted": sum(row.retracted for row in rows),
        "severities": [(each, severities[each]) for each in SEVERITIES],
        "top": top[:TOP],
        "more_rules": max(0, len(top) - TOP),
        "rules": len(rules),
        "alerting": bool(alerts.destinations),
        "alerts": firing[:ALL_ALERTS],
        "most_alerts": TOP_ALERTS,
        "more_alerts": max(0, len(firing) - ALL_ALERTS),
        "undecided": any(each.at_ns >= first * bucket for each in undecided),
        "latest": visit.signals(latest),
        "names": {rule.id: rule.name for rule in rules.values()},
    }


def _add(bar: Bar, row: SummaryRow) -> None:
    bar.total += row.raised
    bar.parts[row.severity] += row.raised
