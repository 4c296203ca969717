"""A trace as a waterfall: one line per span, below its parent, with a bar for its time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textual.content import Content

from betrace.tui.format import cut, many, millis
from betrace.tui.tones import toned
from betrace.tui.traces import ShownSpan

MAX_SPANS = 1000
"""Maximum number of lines."""

MATCH = "◆"
_DEEPEST = 12
"""Deeper levels are not indented further."""
_DURATION = 8


@dataclass(frozen=True, slots=True)
class _Layout:
    """Widths of the columns, and the time span of the bars."""

    mark: int
    name: int
    service: int
    bar: int
    first: int
    last: int


def letters(evidence: Mapping[str, Any]) -> dict[str, str]:
    """A letter for each selector that matched spans, in their order: ``{selector: "a"}``."""
    named = [name for name, spans in evidence.items() if spans]
    return {name: chr(ord("a") + index % 26) for index, name in enumerate(named)}


def marks(evidence: Mapping[str, Any]) -> dict[str, str]:
    """The letters of the selectors that match each span, by span id."""
    found: defaultdict[str, str] = defaultdict(str)
    for name, letter in letters(evidence).items():
        for span in evidence[name] if isinstance(evidence[name], list) else ():
            found[str(span)] += letter
    return dict(found)


def waterfall(
    lines: Sequence[tuple[int, ShownSpan]],
    matching: Mapping[str, str],
    width: int,
    selected: int = -1,
) -> Content:
    """The lines of spans :func:`betrace.tui.traces.in_tree_order`. ``matching`` maps ids of
    matching spans to the letters after their mark; ``selected`` is the index of a span."""
    if not lines:
        return Content("no spans")
    layout = _layout(lines, matching, width)
    shown = [
        _line(depth, span, matching.get(span.id), layout, number == selected)
        for number, (depth, span) in enumerate(lines[:MAX_SPANS])
    ]
    if len(lines) > MAX_SPANS:
        shown.append(Content(f"… and {many(len(lines) - MAX_SPANS, 'more span')}"))
    return Content("\n").join(shown)


def _layout(
    lines: Sequence[tuple[int, ShownSpan]], matching: Mapping[str, str], width: int
) -> _Layout:
    """Names and services get what they need; the bars get the rest, at least 30 % of the line."""
    spans = [span for _, span in lines]
    mark = max((len(each) for each in matching.values()), default=0) + 2
    bar = max(10, (width - mark) * 3 // 10)
    service = min(max(14, width // 8), max(len(span.service) for span in spans))
    name = max(12, width - mark - service - _DURATION - bar - 3)
    spare = max(0, name - max(12, *(len(_title(depth, span)) for depth, span in lines)))
    return _Layout(
        mark,
        name - spare,
        service,
        bar + spare,
        min(span.start for span in spans),
        max(span.end for span in spans),
    )


def _title(depth: int, span: ShownSpan) -> str:
    return "  " * min(depth, _DEEPEST) + ("✖ " if span.failed else "") + span.name


def _line(
    depth: int, span: ShownSpan, match: str | None, layout: _Layout, selected: bool
) -> Content:
    whole = max(1, layout.last - layout.first)
    at = min(layout.bar - 1, (span.start - layout.first) * layout.bar // whole)
    long = max(1, min(layout.bar - at, round((span.end - span.start) * layout.bar / whole)))
    style = "bold $warning" if match is not None else ""
    sign = f"{MATCH}{match}" if match is not None else ""
    name = cut(_title(depth, span), layout.name)
    text = Content.assemble(
        (
            f"{sign:<{layout.mark}}{name:<{layout.name}} ",
            "$error" if span.failed and not style else style,
        ),
        toned(f"{cut(span.service, layout.service):<{layout.service}} ", "quiet"),
        f"{millis((span.end - span.start) / 1e6):>{_DURATION}}",
    )
    if selected:
        text = text.stylize("bold reverse")
    return Content.assemble(text, " ", (f"{' ' * at}{'█' * long}", style or "$primary"))
