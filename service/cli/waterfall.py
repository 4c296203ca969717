"""A trace as a waterfall of text: a line per span, below its parent, with a bar for its time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from betrace.service.cli.common import printable

MAX_SPANS = 1000
"""Maximum number of lines."""

_DEEPEST = 12  # deeper levels are not indented further
_DURATION = 8
_FAILED = (2, "STATUS_CODE_ERROR")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class WaterfallSpan:
    """A span. Times are nanoseconds since 1970."""

    id: str
    parent: str
    name: str
    service: str
    start: int
    end: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the waterfall. ``marked`` spans are evidence of a signal."""

    text: str
    failed: bool = False
    marked: bool = False


def waterfall(trace: Json, evidence: Collection[str], width: int) -> Iterator[Line]:
    """The lines of a trace in OTLP JSON. The spans in ``evidence`` (ids) are marked with ``◆``.

    Names and services take the width that they need, and the bars the rest, at least 30 %.
    """
    rows = in_tree_order(_spans(trace))
    if not rows:
        return
    shown = rows[:MAX_SPANS]
    titles = [
        "  " * min(depth, _DEEPEST) + ("✖ " if span.failed else "") + printable(span.name)
        for depth, span in shown
    ]
    services = [printable(span.service) for _, span in shown]
    service = min(max(14, width // 8), max(map(len, services)))
    longest = width - 2 - service - _DURATION - 3 - max(10, width * 3 // 10)
    title = max(12, min(longest, max(map(len, titles))))
    bar = max(10, width - 2 - title - service - _DURATION - 3)
    first = min(span.start for _, span in rows)
    whole = max(1, max(span.end for _, span in rows) - first)
    for (_, span), name, of in zip(shown, titles, services, strict=True):
        took = span.end - span.start
        at = min(bar - 1, (span.start - first) * bar // whole)
        long = max(1, min(bar - at, round(took * bar / whole)))
        marked = span.id in evidence
        text = (
            f"{'◆' if marked else ' '} {_cut(name, title):{title}} {_cut(of, service):{service}} "
            f"{duration(took):>{_DURATION}} {' ' * at}{'█' * long}"
        )
        yield Line(text, span.failed, marked)
    if len(rows) > MAX_SPANS:
        yield Line(f"… and {len(rows) - MAX_SPANS} more; see all with --json")


def in_tree_order(spans: Iterable[WaterfallSpan]) -> list[tuple[int, WaterfallSpan]]:
    """Each span below its parent, with its depth; siblings by start. A span without its parent is
    a root, and so is the earliest span of a cycle."""
    left = {span.id: span for span in sorted(spans, key=lambda span: (span.start, span.id))}
    children: defaultdict[str, list[WaterfallSpan]] = defaultdict(list)
    for span in left.values():
        children[span.parent].append(span)
    roots = [span for span in left.values() if span.parent not in left]
    found: list[tuple[int, WaterfallSpan]] = []
    for root in [*roots, *left.values()]:  # the second part reaches the cycles
        stack = [(0, root)]
        while stack:
            depth, span = stack.pop()
            if left.pop(span.id, None) is not None:
                found.append((depth, span))
                stack += [(depth + 1, child) for child in reversed(children[span.id])]
    return found


def duration(ns: int) -> str:
    """Nanoseconds in a unit that suits them."""
    for unit, scale in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if ns >= scale:
            value = ns / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{ns} ns"


def _spans(trace: Json) -> Iterator[WaterfallSpan]:
    for resource in trace.get("resourceSpans", []):
        attributes = resource.get("resource", {}).get("attributes", [])
        service = next(
            (
                str(each.get("value", {}).get("stringValue", ""))
                for each in attributes
                if each.get("key") == "service.name"
            ),
            "",
        )
        for scope in resource.get("scopeSpans", []):
            for span in scope.get("spans", []):
                start = int(span.get("startTimeUnixNano", 0))
                yield WaterfallSpan(
                    span.get("spanId", ""),
                    span.get("parentSpanId") or "",
                    span.get("name", ""),
                    service,
                    start,
                    max(start, int(span.get("endTimeUnixNano", 0))),
                    span.get("status", {}).get("code") in _FAILED,
                )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
