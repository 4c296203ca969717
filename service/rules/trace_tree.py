"""The spans of one whole trace, as relational rules see them: by id, by name, and as a tree."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from betrace.service.rules.names import name_matches
from betrace.service.rules.values import AttributeValue

Attributes = Mapping[str, AttributeValue]


@dataclass(frozen=True, slots=True, eq=False)
class SpanPart:
    """An event, with ``since_start`` in nanoseconds from its span's start, or a link."""

    attributes: Attributes
    name: str = ""
    since_start: int = 0
    trace_id: str = ""
    span_id: str = ""


@dataclass(slots=True, eq=False)
class TraceSpan:
    """A span. Ids are lower-case hex, ``parent_id`` is empty without a parent; times are
    nanoseconds. ``details`` reads attributes, events and links when they are first needed."""

    id: str
    parent_id: str
    name: str
    start: int
    end: int
    kind: str
    status: str
    status_message: str
    service: str | None
    scope: str
    resource: Attributes
    details: Callable[[], tuple[Attributes, Sequence[SpanPart], Sequence[SpanPart]]]
    _read: tuple[Attributes, Sequence[SpanPart], Sequence[SpanPart]] | None = field(
        default=None, init=False
    )

    def _details(self) -> tuple[Attributes, Sequence[SpanPart], Sequence[SpanPart]]:
        if self._read is None:
            self._read = self.details()
        return self._read

    @property
    def attributes(self) -> Attributes:
        return self._details()[0]

    @property
    def events(self) -> Sequence[SpanPart]:
        return self._details()[1]

    @property
    def links(self) -> Sequence[SpanPart]:
        return self._details()[2]


class TraceTree:
    """All spans of a trace, each once, in order of start and id. Of copies the first counts."""

    def __init__(self, spans: Iterable[TraceSpan]) -> None:
        self.by_id: dict[str, TraceSpan] = {}
        for span in spans:
            self.by_id.setdefault(span.id, span)
        self.spans = sorted(self.by_id.values(), key=lambda span: (span.start, span.id))
        self._names: dict[str, list[TraceSpan]] = {}
        for span in self.spans:
            self._names.setdefault(span.name, []).append(span)
        self._patterns: dict[str, list[TraceSpan]] = {}

    def named(self, name: str) -> list[TraceSpan]:
        """The spans with a name, which may be a pattern."""
        if "*" not in name:
            return self._names.get(name, [])
        if name == "*":
            return self.spans
        if name not in self._patterns:
            wanted = {known for known in self._names if name_matches(name, known)}
            self._patterns[name] = [span for span in self.spans if span.name in wanted]
        return self._patterns[name]

    @cached_property
    def root(self) -> TraceSpan | None:
        """The earliest span without a parent id; of several the one with the smallest id."""
        return next((span for span in self.spans if not span.parent_id), None)

    @cached_property
    def duration(self) -> int:
        """From the earliest start to the latest end, in nanoseconds."""
        return max(0, max(span.end for span in self.spans) - self.spans[0].start)

    @cached_property
    def services(self) -> int:
        """The number of distinct services."""
        return len({span.service for span in self.spans if span.service is not None})

    @cached_property
    def missing_parents(self) -> int:
        """The number of distinct parent ids of which the trace has no span."""
        return len({span.parent_id for span in self.spans if span.parent_id} - self.by_id.keys())

    def parent(self, span: TraceSpan) -> TraceSpan | None:
        """The parent, unless it is not in the trace or the span itself."""
        return self.by_id.get(span.parent_id) if span.parent_id != span.id else None

    @cached_property
    def _children(self) -> dict[str, list[TraceSpan]]:
        found: dict[str, list[TraceSpan]] = {}
        for span in self.spans:
            if span.parent_id:
                found.setdefault(span.parent_id, []).append(span)
        return found

    def children(self, span_id: str) -> list[TraceSpan]:
        """The spans with this parent id; a span that is its own parent is among them."""
        return self._children.get(span_id, [])

    def below(self, span: TraceSpan) -> Iterator[TraceSpan]:
        """The descendants."""
        seen = {span.id}
        waiting = [span]
        while waiting:
            for child in self.children(waiting.pop().id):
                if child.id not in seen:
                    seen.add(child.id)
                    waiting.append(child)
                    yield child

    @cached_property
    def _order(self) -> tuple[list[TraceSpan], list[list[TraceSpan]]]:
        """The spans with children before their parents, without those that are their own
        ancestors; and these, cycle by cycle."""
        waiting = dict.fromkeys(self.by_id, 0)
        for span in self.spans:
            if (parent := self.parent(span)) is not None:
                waiting[parent.id] += 1
        order = [span for span in self.spans if not waiting[span.id]]
        for span in order:  # grows
            if (parent := self.parent(span)) is not None:
                waiting[parent.id] -= 1
                if not waiting[parent.id]:
                    order.append(parent)
        left = {span_id for span_id, number in waiting.items() if number}
        cycles = []
        for span in self.spans:
            if span.id in left:
                cycle = []
                at: TraceSpan | None = span
                while at is not None and at.id in left:
                    left.discard(at.id)
                    cycle.append(at)
                    at = self.parent(at)
                cycles.append(cycle)
        return order, cycles

    def with_ancestor(self, spans: Collection[str]) -> set[str]:
        """The ids of the spans that have one of ``spans`` (ids) as an ancestor."""
        order, cycles = self._order
        found: set[str] = set()
        below_cycle: set[str] = set()  # in or directly below a cycle that has one of the spans
        for cycle in cycles:
            within = [span.id for span in cycle if span.id in spans]
            if within:
                below_cycle.update(span.id for span in cycle)
                found.update(s.id for s in cycle if within != [s.id])
        for span in reversed(order):
            parent = self.parent(span)
            if parent is not None and (
                parent.id in spans or parent.id in found or parent.id in below_cycle
            ):
                found.add(span.id)
        return found

    def descendants(self, spans: Collection[str]) -> dict[str, int]:
        """For each span that has some of ``spans`` (ids) as descendants, how many."""
        order, cycles = self._order
        found = dict.fromkeys(self.by_id, 0)
        for span in order:
            if (parent := self.parent(span)) is not None:
                found[parent.id] += found[span.id] + (span.id in spans)
        for cycle in cycles:
            total = sum(found[span.id] + (span.id in spans) for span in cycle)
            for span in cycle:
                found[span.id] = total - (span.id in spans)
        return found

    def ancestors(self, span: TraceSpan) -> Iterable[TraceSpan]:
        """The ancestors, nearest first."""
        seen = {span.id}
        at = self.parent(span)
        while at is not None and at.id not in seen:
            seen.add(at.id)
            yield at
            at = self.by_id.get(at.parent_id)


def follows(starts: Sequence[int], start: int, within: float | Fraction) -> bool:
    """Whether one of the ascending ``starts`` is after ``start``, at most ``within`` later."""
    at = bisect_right(starts, start)
    return at < len(starts) and starts[at] - start <= within
