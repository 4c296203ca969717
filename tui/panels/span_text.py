"""A span of a trace in full."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

from betrace.tui.format import NONE, many, millis
from betrace.tui.json_values import Json, as_text, mapping, objects
from betrace.tui.tones import marked
from betrace.tui.traces import ShownSpan, attribute_text, nanoseconds
from betrace.tui.widgets.fields import fields

_KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")


def span_text(span: ShownSpan, begun: int) -> Content:
    """The attributes, events and links of a span of a trace that began at ``begun``, in
    nanoseconds since 1970."""
    raw = span.raw
    status = mapping(raw.get("status"))
    error = as_text(status.get("message")) or "error"
    facts: list[tuple[str, str | Content]] = [
        ("name", span.name),
        ("service", span.service or NONE),
        ("span", span.id),
        ("parent", span.parent or "none: it is the root"),
        ("kind", _kind(raw.get("kind"))),
        ("starts", f"{millis((span.start - begun) / 1e6)} after the trace"),
        ("duration", millis((span.end - span.start) / 1e6)),
        ("status", Content.assemble(marked(error, "bad")) if span.failed else "no error"),
    ]
    parts = [fields(*facts), _attributes("Attributes", raw)]
    for event in objects(raw.get("events")):
        at = millis((nanoseconds(event.get("timeUnixNano")) - span.start) / 1e6)
        parts.append(_attributes(f"Event {event.get('name')}, {at} after the start", event))
    parts += [
        _attributes(f"Link to {link.get('traceId')} {link.get('spanId')}", link)
        for link in objects(raw.get("links"))
    ]
    parts.append(_attributes("Resource", span.resource))
    return Content("\n\n").join(parts)


def span_title(span: ShownSpan, spans: Sequence[ShownSpan]) -> str:
    return f"Span {span.name} ({many(len(spans), 'span')} in the trace)"


def _attributes(title: str, owner: Json) -> Content:
    found = [
        (as_text(each.get("key")), attribute_text(each.get("value")))
        for each in objects(owner.get("attributes"))
    ]
    lines = fields(*sorted(found)) if found else Content("none")
    return Content.assemble((title, "bold"), "\n", lines)


def _kind(value: object) -> str:
    if isinstance(value, int) and 0 <= value < len(_KINDS):
        return _KINDS[value]
    return as_text(value).removeprefix("SPAN_KIND_").lower() or _KINDS[0]
