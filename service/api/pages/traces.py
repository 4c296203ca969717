"""The pages of traces: the list, one trace with the verdicts of all rules, and a span as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from betrace.service.api.endpoint import HTML_TYPE
from betrace.service.api.endpoints import signals as api
from betrace.service.api.pages.evidence import finding
from betrace.service.api.pages.signals import (
    AGO,
    FROM,
    ROWS,
    SPAN,
    is_fresh,
    rule_names,
    waterfall,
)
from betrace.service.api.pages.spans import TraceSpans, marked, span_json
from betrace.service.api.pages.visit import Page, Visit, not_found
from betrace.service.api.params import (
    CURSOR,
    SINCE,
    Param,
    read_bool,
    read_hex,
    read_param,
    read_text,
)
from betrace.service.api.rendering import trace_row_json
from betrace.service.storage.duck.queries import SignalFilter
from betrace.service.storage.duck.search import TraceFilter
from betrace.service.times import read_duration, write_time

Json = dict[str, Any]

_FILTERS = (
    Param("service", "", read_text),
    Param("name", "", read_text),
    Param("min_duration", "", read_duration),
    SINCE,
    Param("has_signal", "", read_bool),
    CURSOR,
)
_SHOWN_RULE = Param("rule", "", read_text)
_SPAN_ID = Param("id", "", read_hex(16))


async def trace_list(visit: Visit) -> Page:
    """Closed traces, newest first."""
    given = visit.params(_FILTERS)
    cursor = given.pop("cursor")
    tools, tenant = visit.tools, visit.viewer.tenant

    def build() -> Json:
        found = tools.store.traces(tenant, TraceFilter(**given), limit=ROWS, cursor=cursor)
        return {
            "traces": [trace_row_json(row) for row in found.rows],
            "following": found.next,
            "searched_to": None if found.searched_to is None else write_time(found.searched_to),
            "ago": AGO,
            "filtered": any(value is not None for value in given.values()),
        }

    return await visit.show("traces.html", build)


async def trace_page(visit: Visit, trace_id: str) -> Page:
    """One trace. The parameter ``rule`` marks the spans that the checks of a rule match."""
    trace_id = read_param(api.TRACE_ID, trace_id)
    given = visit.params((SPAN, FROM, _SHOWN_RULE))
    return await _when_stored(
        visit, trace_id, lambda: visit.render("trace.html", _trace(visit, trace_id, given))
    )


def _trace(visit: Visit, trace_id: str, given: Json) -> Json:
    trace = _read(visit, trace_id)
    spans = TraceSpans(trace)
    verdicts = trace["verdicts"]
    shown = verdicts.get(given["rule"], {})
    evidence = {text: ids for text, ids in shown.get("evidence", {}).items() if ids}
    marks = marked(enumerate(evidence.values(), 1))
    selected = given["span"] or next((ids[0] for ids in evidence.values()), None)
    order = {"breach": 0, "unknown": 1, "open": 2, "kept": 3}
    return {
        "trace": trace,
        "verdicts": sorted(verdicts.items(), key=lambda item: order[item[1]["verdict"]]),
        "names": rule_names(visit),
        "shown_rule": given["rule"] if shown else None,
        "evidence": evidence,
        "counts": shown.get("counts", {}),
        "signals": [{**each, "finding": finding(each)} for each in trace["signals"]],
        **waterfall(spans, marks, selected, given["from"]),
    }


async def span_page(visit: Visit, trace_id: str, span_id: str) -> Page:
    """A whole span as JSON, with its resource and scope."""
    trace_id, span_id = read_param(api.TRACE_ID, trace_id), read_param(_SPAN_ID, span_id)

    def build() -> bytes:
        span = TraceSpans(_read(visit, trace_id)).get(span_id)
        if span is None:
            raise not_found(f"span {span_id} in this trace")
        return span_json(span)

    return await _when_stored(visit, trace_id, build, "application/json")


class _Waiting(Exception):  # noqa: N818
    """The trace is being stored."""


async def _when_stored(
    visit: Visit, trace_id: str, build: Callable[[], bytes], media_type: str = HTML_TYPE
) -> Page:
    """What ``build`` returns; if the trace broke a rule a moment ago and is not stored yet, a page
    that reloads itself. Raises :exc:`ApiError` if there is no such trace."""
    try:
        return Page(await visit.call({}).blocking(build), media_type=media_type)
    except _Waiting:
        return Page(visit.render("waiting.html", {"trace_id": trace_id, "waiting": True}), 202)


def _read(visit: Visit, trace_id: str) -> Json:
    tools, tenant = visit.tools, visit.viewer.tenant
    trace = tools.reader.trace(tenant, trace_id)
    if trace is None:
        stored, _ = tools.store.signals(tenant, SignalFilter(trace_id=trace_id), limit=1)
        signals = [*(each.signal for each in stored), *tools.unstored.of_trace(tenant, trace_id)]
        if any(map(is_fresh, signals)):
            raise _Waiting
        raise not_found(f"trace {trace_id}")
    return trace
