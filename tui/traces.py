"""The spans of a trace in OTLP JSON, as a tree."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from betrace.tui.json_values import Json, mapping, objects


@dataclass(frozen=True, slots=True)
class ShownSpan:
    """One span. Times are nanoseconds since 1970."""

    id: str
    parent: str
    name: str
    service: str
    start: int
    end: int
    failed: bool
    raw: Json = field(default_factory=dict, compare=False)
    """The span in OTLP JSON."""
    resource: Json = field(default_factory=dict, compare=False)


def spans_of(trace: Json) -> list[ShownSpan]:
    """The spans of a trace; malformed ones are left out."""
    found = []
    for resource in objects(trace.get("resourceSpans")):
        service = _service(resource)
        for scope in objects(resource.get("scopeSpans")):
            of = mapping(resource.get("resource"))
            found += [_span(span, service, of) for span in objects(scope.get("spans"))]
    return found


def in_tree_order(spans: Iterable[ShownSpan]) -> list[tuple[int, ShownSpan]]:
    """Each span below its parent, with its depth; siblings by start. A span without its parent is
    a root, and so is the earliest span of a cycle."""
    left = {span.id: span for span in sorted(spans, key=lambda span: (span.start, span.id))}
    children: defaultdict[str, list[ShownSpan]] = defaultdict(list)
    for span in left.values():
        children[span.parent].append(span)
    roots = [span for span in left.values() if span.parent not in left]
    found: list[tuple[int, ShownSpan]] = []
    for root in [*roots, *left.values()]:  # the second part reaches the cycles
        stack = [(0, root)]
        while stack:
            depth, span = stack.pop()
            if left.pop(span.id, None) is not None:
                found.append((depth, span))
                stack += [(depth + 1, child) for child in reversed(children[span.id])]
        if not left:
            break
    return found


def _span(span: Json, service: str, resource: Json) -> ShownSpan:
    status = span.get("status")
    start = nanoseconds(span.get("startTimeUnixNano"))
    return ShownSpan(
        str(span.get("spanId", "")),
        str(span.get("parentSpanId") or ""),
        str(span.get("name", "")),
        service,
        start,
        max(start, nanoseconds(span.get("endTimeUnixNano"))),
        isinstance(status, dict) and status.get("code") in (2, "STATUS_CODE_ERROR"),
        span,
        resource,
    )


def _service(resource: Json) -> str:
    for attribute in objects(mapping(resource.get("resource")).get("attributes")):
        if attribute.get("key") == "service.name":
            return str(mapping(attribute.get("value")).get("stringValue", ""))
    return ""


def nanoseconds(value: Any) -> int:
    """A 64-bit integer, which OTLP JSON writes as a string."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0


def attribute_text(value: object) -> str:
    """An attribute's value: a string as it is, others as in JSON."""
    found = _plain(value)
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _plain(value: object) -> Any:
    """The plain value of an ``AnyValue``; 64-bit integers are written as strings."""
    for name, inner in mapping(value).items():
        if name == "intValue":
            return nanoseconds(inner)
        if name == "arrayValue":
            return [_plain(each) for each in objects(mapping(inner).get("values"))]
        if name == "kvlistValue":
            pairs = objects(mapping(inner).get("values"))
            return {str(each.get("key")): _plain(each.get("value")) for each in pairs}
        return inner
    return None
