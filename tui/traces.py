"""The spans of a trace in OTLP JSON, as a tree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from betrace.tui.json_values import Json, mapping, objects


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """One span. Times are nanoseconds since 1970."""

    id: str
    parent: str
    name: str
    service: str
    start: int
    end: int
    failed: bool


def spans_of(trace: Json) -> list[TreeSpan]:
    """The spans of a trace; malformed ones are left out."""
    found = []
    for resource in objects(trace.get("resourceSpans")):
        service = _service(resource)
        for scope in objects(resource.get("scopeSpans")):
            found += [_span(span, service) for span in objects(scope.get("spans"))]
    return found


def in_tree_order(spans: Iterable[TreeSpan]) -> list[tuple[int, TreeSpan]]:
    """Each span below its parent, with its depth; siblings by start. A span without its parent is
    a root, and so is the earliest span of a cycle."""
    left = {span.id: span for span in sorted(spans, key=lambda span: (span.start, span.id))}
    children: defaultdict[str, list[TreeSpan]] = defaultdict(list)
    for span in left.values():
        children[span.parent].append(span)
    roots = [span for span in left.values() if span.parent not in left]
    found: list[tuple[int, TreeSpan]] = []
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


def _span(span: Json, service: str) -> TreeSpan:
    status = span.get("status")
    start = _nanoseconds(span.get("startTimeUnixNano"))
    return TreeSpan(
        str(span.get("spanId", "")),
        str(span.get("parentSpanId") or ""),
        str(span.get("name", "")),
        service,
        start,
        max(start, _nanoseconds(span.get("endTimeUnixNano"))),
        isinstance(status, dict) and status.get("code") in (2, "STATUS_CODE_ERROR"),
    )


def _service(resource: Json) -> str:
    for attribute in objects(mapping(resource.get("resource")).get("attributes")):
        if attribute.get("key") == "service.name":
            return str(mapping(attribute.get("value")).get("stringValue", ""))
    return ""


def _nanoseconds(value: Any) -> int:
    """A 64-bit integer, which OTLP JSON writes as a string."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0
