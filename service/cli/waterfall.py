"""A trace as a waterfall of text: a line per span, below its parent, with a bar for its time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from betrace.service.cli.common import printable
from betrace.service.otlp.span_tree import in_tree_order, spans_of
from betrace.service.times import short_duration

MAX_SPANS = 1000
"""Maximum number of lines."""

_DEEPEST = 12  # deeper levels are not indented further
_DURATION = 8

Json = dict[str, Any]


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
    rows = in_tree_order(spans_of(trace))
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
            f"{short_duration(took):>{_DURATION}} {' ' * at}{'█' * long}"
        )
        yield Line(text, span.failed, marked)
    if len(rows) > MAX_SPANS:
        yield Line(f"… and {len(rows) - MAX_SPANS} more; see all with --json")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
