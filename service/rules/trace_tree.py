"""The spans of one whole trace, as relational rules see them: by id, by name, and as a tree."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from operator import attrgetter

from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from betrace.service.otlp.columns import MSG_LEN, MSG_OFF, SpanBatch
from betrace.service.rules import exact
from betrace.service.rules.exact import Value
from betrace.service.rules.match import plain_value, read_attribute
from betrace.service.rules.names import name_matches
from betrace.service.rules.syntax import Attribute, Scope
from betrace.service.rules.values import AttributeValue

Attributes = Mapping[str, AttributeValue]

SERVICE = Attribute(Scope.FIELD, "service")


@dataclass(frozen=True, slots=True, eq=False)
class SpanPart:
    """An event, with ``since_start`` in nanoseconds from its span's start, or a link."""

    attributes: Attributes
    name: str = ""
    since_start: int = 0
    trace_id: str = ""
    span_id: str = ""


class TraceSpan:
    """A span in a row of a batch, which it keeps in memory. Ids are lower-case hex, ``parent_id``
    is empty without a parent; times are nanoseconds. Everything else is read when it is first
    needed."""

    __slots__ = ("_batch", "_parts", "_row", "_values", "end", "id", "name", "parent_id", "start")

    def __init__(
        self, batch: SpanBatch, row: int, id: str, parent_id: str, name: str, start: int, end: int
    ) -> None:
        self._batch = batch
        self._row = row
        self._values: dict[Attribute, Value] = {}
        self._parts: tuple[Sequence[SpanPart], Sequence[SpanPart]] | None = None
        self.id = id
        self.parent_id = parent_id
        self.name = name
        self.start = start
        self.end = end

    def read(self, attribute: Attribute) -> Value:
        """An attribute, or a field that spans have in rules of all kinds."""
        try:
            return self._values[attribute]
        except KeyError:
            value = exact.normal(read_attribute(attribute, self._batch, self._row))
            self._values[attribute] = value
            return value

    @property
    def service(self) -> Value:
        """The resource's ``service.name``, None without one."""
        return self.read(SERVICE)

    @property
    def events(self) -> Sequence[SpanPart]:
        """The events, in the order in which they were sent."""
        return self._read_parts()[0]

    @property
    def links(self) -> Sequence[SpanPart]:
        """The links, in the order in which they were sent."""
        return self._read_parts()[1]

    def _message(self) -> Span:
        return span_message(self._batch, self._row)

    def _read_parts(self) -> tuple[Sequence[SpanPart], Sequence[SpanPart]]:
        if self._parts is None:
            span = self._message()
            events = [
                SpanPart(_attributes(e.attributes), e.name, int(e.time_unix_nano) - self.start)
                for e in span.events
            ]
            links = [
                SpanPart(
                    _attributes(link.attributes),
                    trace_id=link.trace_id.hex(),
                    span_id=link.span_id.hex(),
                )
                for link in span.links
            ]
            self._parts = events, links
        return self._parts


def span_message(batch: SpanBatch, row: int) -> Span:
    """The span in a row, as a message."""
    offset, length = batch.spans[row, [MSG_OFF, MSG_LEN]].tolist()
    return Span.FromString(batch.buf[offset : offset + length].tobytes())


def _attributes(pairs: Sequence[KeyValue]) -> Attributes:
    """The first value of each key, as the fold sees it."""
    found: dict[str, AttributeValue] = {}
    for pair in pairs:
        if pair.key not in found:
            value = plain_value(pair.value)
            if value is not None:
                found[pair.key] = value
    return found


class TraceTree:
    """All spans of a trace, each once, in order of start and id. Of copies the first counts."""

    def __init__(self, spans: Iterable[TraceSpan]) -> None:
        self.by_id: dict[str, TraceSpan] = {}
        for span in spans:
            self.by_id.setdefault(span.id, span)
        self.spans = sorted(self.by_id.values(), key=attrgetter("start", "id"))
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
