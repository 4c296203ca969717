"""The pages of signals: the list, and one signal with its rule and its trace."""

from __future__ import annotations

from typing import Any

from betrace.service.api.endpoints import signals as api
from betrace.service.api.pages.evidence import (
    checks,
    finding,
    first_span,
    named_attributes,
    rule_lines,
    rule_of,
)
from betrace.service.api.pages.spans import TraceSpans, marked, span_detail
from betrace.service.api.pages.visit import Page, Visit, not_found
from betrace.service.api.params import (
    CURSOR,
    SINCE,
    UNTIL,
    Param,
    read_choice,
    read_integer,
    read_param,
)
from betrace.service.rules.definition import SEVERITIES
from betrace.service.signals import Signal
from betrace.service.storage.duck.queries import SignalFilter
from betrace.service.times import SECOND, read_time

Json = dict[str, Any]

ROWS = 50
"""Rows of a list on one page."""
MOST_OTHERS = 20
STORED_WITHIN = 60 * SECOND
"""A signal may be stored this much earlier than its trace."""
SPAN = Param("span", "The selected span.", lambda text: text[:16])
FROM = Param("from", "The first row of the waterfall.", read_integer(0, 10**9))
_RECENT = (("15m", "15 minutes"), ("1h", "hour"), ("24h", "24 hours"), ("7d", "7 days"))
AGO = [(f"-{text}", f"the last {words}") for text, words in _RECENT]


async def signal_list(visit: Visit) -> Page:
    """All signals, newest first."""
    trace = Param("trace_id", "", api.TRACE_ID.read)
    status = Param("status", "", read_choice(*api.STATUSES))
    known = (api.RULE, api.SEVERITY, trace, status, api.SERVICE, SINCE, UNTIL, CURSOR)
    given = visit.params(known)
    cursor = given.pop("cursor")
    tools, tenant = visit.tools, visit.viewer.tenant

    def build() -> Json:
        found, following = tools.store.signals(
            tenant, SignalFilter(**given), limit=ROWS, cursor=cursor
        )
        tools.metadata.listed(tenant, found)
        return {
            "signals": visit.signals(found),
            "names": rule_names(visit),
            "severities": SEVERITIES,
            "statuses": api.STATUSES,
            "ago": AGO,
            "following": following,
            "filtered": any(value is not None for value in given.values()),
        }

    return await visit.show("signals.html", build)


async def live(visit: Visit) -> Page:
    """Signals as they are raised, as server-sent events; lists reload when one comes."""
    visit.params(())
    everything = {"rule": None, "severity": None, "service": None}
    answer = await api.stream_signals(visit.call(everything))
    return Page(answer.body, media_type=answer.media_type, headers=answer.headers)


async def signal_page(visit: Visit, signal_id: str) -> Page:
    """One signal."""
    signal_id = read_param(api.SIGNAL_ID, signal_id)
    given = visit.params((SPAN, FROM))
    return await visit.show("signal.html", lambda: _signal(visit, signal_id, given))


def _signal(visit: Visit, signal_id: str, given: Json) -> Json:
    tools, tenant = visit.tools, visit.viewer.tenant
    stored = tools.signal(tenant, signal_id)
    if stored is None:
        raise not_found(f"signal {signal_id}")
    (signal,) = visit.signals([stored])
    rule, origin = rule_of(tools.sources.rules, tenant, signal["rule_id"], signal["rule_version"])
    trace = tools.reader.trace(tenant, signal["trace_id"])
    waiting = trace is None and is_fresh(stored.signal)
    spans = None if trace is None else TraceSpans(trace)
    found = checks(rule, signal, spans)
    selected = given["span"] or first_span(found)
    marks = marked((check.number, [each for each, _ in check.spans]) for check in found)
    return {
        "signal": signal,
        "finding": signal["finding"],
        "rule": rule,
        "origin": origin,
        "lines": rule_lines(rule, signal) if rule else [],
        "checks": found,
        "groups": (signal["context"] or {}).get("groups"),
        "mute": tools.triage.current_mute(tenant, signal["rule_id"]),
        "trace": trace,
        "waiting": waiting,
        "others": _others(trace, signal_id),
        "most_others": MOST_OTHERS,
        "names": rule_names(visit),
        **waterfall(spans, marks, selected, given["from"], named_attributes(rule)),
    }


def waterfall(
    spans: TraceSpans | None,
    marks: dict[str, tuple[int, ...]],
    selected: str | None,
    first: int | None,
    named: frozenset[str] = frozenset(),
) -> Json:
    """What the templates of a waterfall and of its selected span need."""
    detail = None
    if spans is not None and selected is not None:
        detail = span_detail(spans, selected, named)
    return {
        "waterfall": spans.waterfall(marks, selected, first) if spans else None,
        "detail": detail,
        "selected": selected,
        "marks": marks,
    }


def is_fresh(signal: Signal) -> bool:
    """Whether a signal is so new that its trace may not be stored yet."""
    return read_time("now") - signal.detected_at < STORED_WITHIN


def _others(trace: Json | None, signal_id: str) -> list[Json]:
    """The other signals of the trace."""
    if trace is None:
        return []
    return [
        {**each, "finding": finding(each)} for each in trace["signals"] if each["id"] != signal_id
    ]


def rule_names(visit: Visit) -> dict[str, str]:
    """The names of the tenant's rules by id."""
    rules = visit.tools.sources.rules.rules(visit.viewer.tenant)
    return {rule.id: rule.name for rule in sorted(rules, key=lambda rule: rule.name.lower())}
