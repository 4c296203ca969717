"""Spans of a trace for relational rules, from the shared cases."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from betrace.service.rules.trace_tree import SpanPart, TraceSpan


def nanoseconds(milliseconds: Any) -> int:
    """A time of the cases, rounded to the nanosecond."""
    return round(Decimal(str(milliseconds)) * 1_000_000)


def case_span(number: int, span: dict[str, Any]) -> TraceSpan:
    """A span in the format of the shared cases."""
    start = nanoseconds(span.get("start_ms", 0)) + 1_000_000_000
    resource = dict(span.get("resource", {}))
    if "service" in span:
        resource.setdefault("service.name", span["service"])
    service = resource.get("service.name")
    events = [
        SpanPart(e["attributes"], e["name"], nanoseconds(e.get("offset_ms", 0)))
        for e in span.get("events", ())
    ]
    links = [
        SpanPart(e["attributes"], trace_id=e["trace_id"], span_id=e["span_id"])
        for e in span.get("links", ())
    ]
    attributes = span["attributes"]
    return TraceSpan(
        id=span.get("span_id") or f"{number:016x}",
        parent_id=span.get("parent_id") or "",
        name=span["name"],
        start=start,
        end=start + nanoseconds(span.get("duration_ms", 1)),
        kind=span.get("kind", "internal"),
        status=span.get("status", "unset"),
        status_message=span.get("status_message", ""),
        service=service if isinstance(service, str) else None,
        scope=span.get("scope", ""),
        resource=resource,
        details=lambda: (attributes, events, links),
    )
