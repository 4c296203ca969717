"""The spans of a trace in OTLP JSON, in the order of a waterfall."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_FAILED = (2, "STATUS_CODE_ERROR")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """A span, with the JSON of the span, its resource and its scope. Times are nanoseconds since
    1970."""

    id: str
    parent: str
    name: str
    service: str
    start: int
    end: int
    failed: bool
    span: Json
    resource: Json
    scope: Json


def spans_of(trace: Json) -> Iterator[TreeSpan]:
    """All spans of ``trace``, which has ``resourceSpans``."""
    for group in trace.get("resourceSpans", []):
        resource = group.get("resource", {})
        service = next(
            (
                str(each.get("value", {}).get("stringValue", ""))
                for each in resource.get("attributes", [])
                if each.get("key") == "service.name"
            ),
            "",
        )
        for part in group.get("scopeSpans", []):
            for span in part.get("spans", []):
                start = int(span.get("startTimeUnixNano", 0))
                yield TreeSpan(
                    span.get("spanId", ""),
                    span.get("parentSpanId") or "",
                    span.get("name", ""),
                    service,
                    start,
                    max(start, int(span.get("endTimeUnixNano", 0))),
                    span.get("status", {}).get("code") in _FAILED,
                    span,
                    resource,
                    part.get("scope", {}),
                )


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
    return found
