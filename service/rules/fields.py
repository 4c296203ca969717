"""Reads the fields of spans, events and links."""

from __future__ import annotations

from betrace.service.rules import exact
from betrace.service.rules.exact import Value
from betrace.service.rules.trace_tree import SpanPart, TraceSpan


def span_field(span: TraceSpan, name: str) -> Value:
    """A field of a span; None if the span does not have it."""
    match name:
        case "name":
            return span.name
        case "kind":
            return span.kind
        case "status":
            return span.status
        case "statusMessage":
            return span.status_message
        case "duration":
            return max(0, span.end - span.start)
        case "service":
            return span.service
        case "scope":
            return span.scope
        case "id":
            return span.id
        case "parentId":
            return span.parent_id or None
        case "start":
            return span.start
        case "end":
            return span.end
        case _:
            return not span.parent_id


def part_value(scope: str, is_field: bool, name: str, part: SpanPart) -> Value:
    """A field or attribute of an event or link (``scope``); None if it is missing."""
    if not is_field:
        return exact.normal(part.attributes.get(name))
    if scope == "event":
        return part.name if name == "name" else part.since_start
    return part.trace_id if name == "traceId" else part.span_id
