"""Spans as pages show them: the rows of a waterfall, and everything about one span."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from betrace.service.otlp.span_tree import TreeSpan, in_tree_order, spans_of
from betrace.service.rules.syntax import KINDS

MOST_ROWS = 300
"""Rows of a waterfall on one page."""
MOST_ATTRIBUTES = 100  # of a span, a resource, an event or a link
MOST_PARTS = 50  # events, and links
MOST_TEXT = 1000  # characters of a value
MOST_NAME = 200  # characters of a name
_DEEPEST = 16  # deeper rows are not indented further

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SpanRow:
    """A line of the waterfall. ``left`` and ``width`` place its bar, in percent; ``marks`` are the
    numbers of the checks that it matches."""

    id: str
    name: str
    service: str
    depth: int
    took: int
    failed: bool
    marks: tuple[int, ...]
    left: float
    width: float
    hue: int


@dataclass(frozen=True, slots=True)
class Waterfall:
    """A part of a trace: ``rows`` beginning with row ``first`` (from 0) of ``total``; the addresses
    of the parts before and after it are those of ``previous`` and ``following`` rows. ``ticks`` are
    nanoseconds since ``start``."""

    rows: list[SpanRow]
    first: int
    total: int
    previous: int | None
    following: int | None
    start: int
    ticks: list[int]
    services: dict[str, int]


class TraceSpans:
    """The spans of a trace in OTLP JSON."""

    def __init__(self, trace: Json) -> None:
        self._ordered = in_tree_order(spans_of(trace))
        self._at = {span.id: k for k, (_, span) in enumerate(self._ordered)}
        self.start = min((span.start for _, span in self._ordered), default=0)
        self._whole = max((span.end for _, span in self._ordered), default=0) - self.start
        names = sorted({span.service for _, span in self._ordered})
        self._hues = {name: k % 8 for k, name in enumerate(names)}

    def get(self, span_id: str) -> TreeSpan | None:
        """A span."""
        at = self._at.get(span_id)
        return None if at is None else self._ordered[at][1]

    def name(self, span_id: str) -> str | None:
        """The name of a span; None if it is not there."""
        span = self.get(span_id)
        return None if span is None else cut(span.name, MOST_NAME)

    def waterfall(
        self, marks: Mapping[str, tuple[int, ...]], selected: str | None, first: int | None
    ) -> Waterfall:
        """The rows from ``first``; by default those around the selected span."""
        total = len(self._ordered)
        if first is None:
            first = self._at.get(selected or "", 0) // MOST_ROWS * MOST_ROWS
        first = min(first, max(0, total - 1))
        part = self._ordered[first : first + MOST_ROWS]
        following = first + len(part)
        rows = [self._row(depth, span, marks.get(span.id, ())) for depth, span in part]
        return Waterfall(
            rows,
            first,
            total,
            max(0, first - MOST_ROWS) if first else None,
            following if following < total else None,
            self.start,
            [self._whole * k // 4 for k in range(5)],
            {row.service: row.hue for row in rows},
        )

    def _row(self, depth: int, span: TreeSpan, marks: tuple[int, ...]) -> SpanRow:
        whole = max(1, self._whole)
        left = 100 * (span.start - self.start) / whole
        width = 100 * (span.end - span.start) / whole
        return SpanRow(
            span.id,
            cut(span.name, MOST_NAME) or "(no name)",
            cut(span.service, MOST_NAME),
            min(depth, _DEEPEST),
            span.end - span.start,
            span.failed,
            marks,
            round(min(left, 99.6), 2),
            round(max(width, 0.4), 2),
            self._hues[span.service],
        )


@dataclass(frozen=True, slots=True)
class Field:
    """An attribute. ``cut`` says that only the beginning of its value is shown; ``named`` that the
    rule names it."""

    name: str
    value: str
    cut: bool = False
    named: bool = False


@dataclass(frozen=True, slots=True)
class Fields:
    """Some attributes, and how many more there are."""

    shown: list[Field] = field(default_factory=list)
    more: int = 0

    @property
    def whole(self) -> bool:
        return not self.more and not any(each.cut for each in self.shown)


@dataclass(frozen=True, slots=True)
class SpanPart:
    """An event (``at`` is nanoseconds since the trace began) or a link."""

    name: str
    at: int
    trace_id: str
    span_id: str
    fields: Fields


@dataclass(frozen=True, slots=True)
class SpanDetail:
    """Everything about a span; ``whole`` says that nothing was cut."""

    id: str
    name: str
    service: str
    kind: str
    status: str
    status_message: str
    failed: bool
    parent: str
    parent_name: str | None
    starts: int
    took: int
    scope: str
    attributes: Fields
    resource: Fields
    events: list[SpanPart]
    links: list[SpanPart]
    more_parts: int
    whole: bool


def span_detail(spans: TraceSpans, span_id: str, named: Collection[str]) -> SpanDetail | None:
    """A span; None if it is not there. Attributes that the rule names come first."""
    found = spans.get(span_id)
    if found is None:
        return None
    span, status = found.span, found.span.get("status", {})
    events, links = span.get("events", []), span.get("links", [])
    more_parts = max(0, len(events) - MOST_PARTS) + max(0, len(links) - MOST_PARTS)
    attributes = _fields(span.get("attributes", []), named)
    resource = _fields(found.resource.get("attributes", []), named)
    shown_events = [_part(each, spans.start) for each in events[:MOST_PARTS]]
    shown_links = [_part(each, 0) for each in links[:MOST_PARTS]]
    every = [attributes, resource, *(each.fields for each in (*shown_events, *shown_links))]
    kind = int(span.get("kind", 0))
    scope = found.scope
    return SpanDetail(
        span_id,
        cut(found.name, MOST_TEXT) or "(no name)",
        cut(found.service, MOST_TEXT),
        KINDS[kind] if 0 < kind < len(KINDS) else "",
        {1: "ok", 2: "error"}.get(status.get("code", 0), ""),
        cut(status.get("message", ""), MOST_TEXT),
        found.failed,
        found.parent,
        spans.name(found.parent) if found.parent else None,
        found.start - spans.start,
        found.end - found.start,
        cut(f"{scope.get('name', '')} {scope.get('version', '')}".strip(), MOST_TEXT),
        attributes,
        resource,
        shown_events,
        shown_links,
        more_parts,
        not more_parts and all(each.whole for each in every) and len(found.name) <= MOST_TEXT,
    )


def span_json(span: TreeSpan) -> bytes:
    """The whole span with its resource and scope."""
    return orjson.dumps({"resource": span.resource, "scope": span.scope, "span": span.span})


def _part(part: Json, start: int) -> SpanPart:
    return SpanPart(
        cut(part.get("name", ""), MOST_TEXT),
        int(part.get("timeUnixNano", 0)) - start,
        part.get("traceId", ""),
        part.get("spanId", ""),
        _fields(part.get("attributes", []), ()),
    )


def _fields(attributes: Sequence[Json], named: Collection[str]) -> Fields:
    first = [each for each in attributes if each.get("key") in named]
    others = [each for each in attributes if each.get("key") not in named]
    shown = []
    for each in [*first, *others][:MOST_ATTRIBUTES]:
        key, text = each.get("key", ""), value_text(each.get("value", {}))
        shortened = len(text) > MOST_TEXT
        shown.append(Field(cut(key, MOST_NAME), cut(text, MOST_TEXT), shortened, key in named))
    return Fields(shown, max(0, len(attributes) - MOST_ATTRIBUTES))


def value_text(value: Json) -> str:
    """The text of an attribute's value in OTLP JSON."""
    plain = _plain(value)
    if isinstance(plain, str):
        return plain
    return orjson.dumps(plain).decode()


def _plain(value: Json) -> Any:
    match value:
        case {"arrayValue": array}:
            return [_plain(each) for each in array.get("values", [])]
        case {"kvlistValue": pairs}:
            return {p.get("key", ""): _plain(p.get("value", {})) for p in pairs.get("values", [])}
        case {"bytesValue": data}:
            return f"{len(base64.b64decode(data))} bytes: {data}"
        case {"intValue": number}:
            return int(number) if -(2**53) < int(number) < 2**53 else str(number)
        case {"stringValue": plain} | {"boolValue": plain} | {"doubleValue": plain}:
            return plain
        case _:
            return ""


def cut(text: str, most: int) -> str:
    """At most ``most`` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def marked(checks: Iterable[tuple[int, Sequence[str]]]) -> dict[str, tuple[int, ...]]:
    """The numbers of the checks by span, from the spans by number of a check."""
    found: dict[str, tuple[int, ...]] = {}
    for number, spans in checks:
        for span_id in spans:
            found[span_id] = (*found.get(span_id, ()), number)
    return found
