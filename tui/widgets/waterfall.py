"""A trace as a waterfall: a line for each span, below its parent, with a bar for its time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textual.content import Content

from betrace.tui.client import Json
from betrace.tui.widgets.basic import toned
from betrace.tui.widgets.text import many, millis

MAX_SPANS = 1000
"""Lines of a waterfall, at most."""

MATCH = "◆"
_DEEPEST = 12
"""Levels that are indented; what is deeper stands there too."""


@dataclass(frozen=True, slots=True)
class Span:
    """Times are nanoseconds since 1970."""

    id: str
    parent: str
    name: str
    service: str
    start: int
    end: int
    failed: bool


def spans_of(trace: Json) -> list[Span]:
    """The spans of a trace in OTLP JSON; what is not as it should be is left out."""
    found = []
    for resource in _dicts(trace.get("resourceSpans")):
        service = _service(resource)
        for scope in _dicts(resource.get("scopeSpans")):
            found += [_span(span, service) for span in _dicts(scope.get("spans"))]
    return found


def _span(span: Json, service: str) -> Span:
    status = span.get("status")
    start = _int(span.get("startTimeUnixNano"))
    return Span(
        str(span.get("spanId", "")),
        str(span.get("parentSpanId") or ""),
        str(span.get("name", "")),
        service,
        start,
        max(start, _int(span.get("endTimeUnixNano"))),
        isinstance(status, dict) and status.get("code") in (2, "STATUS_CODE_ERROR"),
    )


def _service(resource: Json) -> str:
    attributes = _dict(resource.get("resource")).get("attributes")
    for attribute in _dicts(attributes):
        if attribute.get("key") == "service.name":
            return str(_dict(attribute.get("value")).get("stringValue", ""))
    return ""


def ordered(spans: Iterable[Span]) -> list[tuple[int, Span]]:
    """Each span below its parent, with its depth; those of a parent by start. A span whose parent
    is not there is a root, and so is the earliest of a cycle."""
    left = {span.id: span for span in sorted(spans, key=lambda span: (span.start, span.id))}
    children: defaultdict[str, list[Span]] = defaultdict(list)
    for span in left.values():
        children[span.parent].append(span)
    roots = [span for span in left.values() if span.parent not in left]
    found: list[tuple[int, Span]] = []
    for root in [*roots, *left.values()]:  # the second time for what only cycles lead to
        stack = [(0, root)]
        while stack:
            depth, span = stack.pop()
            if left.pop(span.id, None) is not None:
                found.append((depth, span))
                stack += [(depth + 1, child) for child in reversed(children[span.id])]
        if not left:
            break
    return found


def letters(evidence: Mapping[str, Any]) -> dict[str, str]:
    """A letter for each selector of a rule that has spans, in their order: ``{selector: "a"}``."""
    named = [name for name, spans in evidence.items() if spans]
    return {name: chr(ord("a") + index % 26) for index, name in enumerate(named)}


def marks(evidence: Mapping[str, Any]) -> dict[str, str]:
    """The letters of the selectors that a span matches, by the span's id."""
    found: defaultdict[str, str] = defaultdict(str)
    for name, letter in letters(evidence).items():
        for span in evidence[name] if isinstance(evidence[name], list) else ():
            found[str(span)] += letter
    return dict(found)


def waterfall(spans: Sequence[Span], matching: Mapping[str, str], width: int) -> Content:
    """The lines. ``matching`` has what stands after the mark of spans that match, by id."""
    if not spans:
        return Content("no spans")
    first, last = min(s.start for s in spans), max(s.end for s in spans)
    lines = ordered(spans)
    marked = max((len(each) for each in matching.values()), default=0) + 2
    bar = max(10, min(60, (width - marked) * 3 // 10))
    services = min(14, max(len(span.service) for span in spans))
    name = max(12, width - marked - services - 8 - bar - 3)
    shown = [
        _line(depth, span, matching.get(span.id), (marked, name, services, bar), (first, last))
        for depth, span in lines[:MAX_SPANS]
    ]
    if len(lines) > MAX_SPANS:
        shown.append(Content(f"… and {many(len(lines) - MAX_SPANS, 'more span')}"))
    return Content("\n").join(shown)


def _line(
    depth: int,
    span: Span,
    match: str | None,
    widths: tuple[int, int, int, int],
    times: tuple[int, int],
) -> Content:
    marked, name, services, room = widths
    first, last = times
    whole = max(1, last - first)
    at = min(room - 1, (span.start - first) * room // whole)
    long = max(1, min(room - at, round((span.end - span.start) * room / whole)))
    title = "  " * min(depth, _DEEPEST) + ("✖ " if span.failed else "") + span.name
    style = "bold $warning" if match is not None else ""
    sign = f"{MATCH}{match}" if match is not None else ""
    took = millis((span.end - span.start) / 1e6)
    return Content.assemble(
        (f"{sign:<{marked}}{_cut(title, name)} ", "$error" if span.failed and not style else style),
        toned(f"{_cut(span.service, services)} ", "quiet"),
        f"{took:>8} ",
        (f"{' ' * at}{'█' * long}", style or "$primary"),
    )


def _cut(text: str, width: int) -> str:
    return f"{text[: width - 1]}…" if len(text) > width else f"{text:<{width}}"


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[Json]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _int(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0
