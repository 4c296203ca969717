"""Reads the fields of spans, events and links."""

from __future__ import annotations

from betrace.service.rules import exact
from betrace.service.rules.exact import Value
from betrace.service.rules.syntax import Attribute
from betrace.service.rules.trace_tree import SpanPart, TraceSpan


def span_field(span: TraceSpan, attribute: Attribute) -> Value:
    """A field of a span; None if the span does not have it."""
    match attribute.name:
        case "name":
            return span.name
        case "duration":
            return max(0, span.end - span.start)
        case "id":
            return span.id
        case "parentId":
            return span.parent_id or None
        case "start":
            return span.start
        case "end":
            return span.end
        case "root":
            return not span.parent_id
        case _:
            return span.read(attribute)


def part_value(scope: str, is_field: bool, name: str, part: SpanPart) -> Value:
    """A field or attribute of an event or link (``scope``); None if it is missing."""
    if not is_field:
        return exact.normal(part.attributes.get(name))
    if scope == "event":
        return part.name if name == "name" else part.since_start
    return part.trace_id if name == "traceId" else part.span_id
