"""The skeleton of many whole traces at once: ids, parents, times and names of their spans, in
arrays. Attributes are read from the bytes when a rule asks for them.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import NamedTuple, cast

import numpy as np

from betrace.service.otlp.attributes import OUT_SIZE
from betrace.service.otlp.columns import (
    KIND,
    RESOURCE,
    SPAN_ID,
    STATUS,
    TRACE_HI,
    TRACE_LO,
    Rows,
    SpanBatch,
)
from betrace.service.rules import exact
from betrace.service.rules.column_kernels import (
    Flags,
    count_descendants,
    find_ancestors,
    find_attributes,
    leaves_first,
    next_starts,
    previous_starts,
)
from betrace.service.rules.exact import Value
from betrace.service.rules.match import attribute_key, attribute_value, read_attribute
from betrace.service.rules.names import name_matches
from betrace.service.rules.syntax import KINDS, STATUSES, Attribute, Scope
from betrace.service.rules.trace_tree import TraceSpan, TraceTree, span_message

TraceId = tuple[int, int]
"""The halves of a trace id, as rows contain them."""

_LONGEST = 2**62  # nanoseconds
_NAMED_FIELDS = {"kind": (KIND, KINDS), "status": (STATUS, STATUSES)}


class Names:
    """The distinct span names of a batch, and which of them match a pattern."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._matching: dict[str, Flags] = {}

    def matching(self, pattern: str) -> Flags:
        """For each name, whether it matches."""
        found = self._matching.get(pattern)
        if found is None:
            matches = partial(name_matches if "*" in pattern else str.__eq__, pattern)
            found = np.fromiter(map(matches, self.texts), bool)
            self._matching[pattern] = found
        return found


class SpanColumns(NamedTuple):
    """Rows of one array, with an item for each span in order of trace, start and id."""

    of: Rows  # number of its trace
    row: Rows  # in the batch
    name: Rows  # number of its name
    start: Rows
    end: Rows
    id: Rows
    parent_id: Rows
    below: Rows  # 1 if it has a parent id
    parent: Rows  # number of its parent, -1 if the trace does not have it


class TraceColumns:
    """Several traces of a tenant, each span once: of several copies, the first counts."""

    def __init__(self, batch: SpanBatch, names: Names, spans: Rows, traces: int) -> None:
        self.batch = batch
        self.spans = SpanColumns(*spans)
        self.traces = traces
        self._all = spans
        self._names = names
        self._first = np.searchsorted(self.spans.of, np.arange(traces + 1))

    def __len__(self) -> int:
        return len(self.spans.of)

    def take(self, numbers: Rows) -> TraceColumns:
        """Some of the traces, with new numbers."""
        first, last = self._first[numbers], self._first[numbers + 1]
        sizes = last - first
        begins = np.cumsum(sizes) - sizes
        shift = np.repeat(first - begins, sizes)
        chosen = shift + np.arange(len(shift))
        taken = np.take(self._all, chosen, axis=1)
        of, *_, parent = taken
        of[:] = np.repeat(np.arange(len(numbers)), sizes)
        np.copyto(parent, parent - shift, where=parent >= 0)
        return TraceColumns(self.batch, self._names, taken, len(numbers))

    def size(self, number: int) -> int:
        """How many spans a trace has."""
        return int(self._first[number + 1] - self._first[number])

    def ids(self, number: int) -> list[int]:
        """The span ids of a trace in order of arrival, those of copies included."""
        if not self.size(number):
            return []
        hi, lo = self.batch.spans[self.spans.row[self._first[number]], [TRACE_HI, TRACE_LO]]
        arrived = self.batch.spans
        own = (arrived[:, TRACE_HI] == hi) & (arrived[:, TRACE_LO] == lo)
        return arrived[own, SPAN_ID].tolist()  # type: ignore[no-any-return]

    def tree(self, number: int) -> TraceTree:
        """A trace as objects."""
        of = slice(self._first[number], self._first[number + 1])
        ids, parents = (
            part[of].astype(">i8").tobytes().hex() for part in (self.spans.id, self.spans.parent_id)
        )
        found = []
        columns = (part[of].tolist() for part in self.spans)
        rows = zip(*columns, strict=True)
        for k, (_, row, name, start, end, _, parent_id, below, _) in enumerate(rows):
            parent = ""
            if below:
                parent = parents[16 * k : 16 * k + 16]
                if not parent_id:  # it is not 8 bytes long
                    parent = span_message(self.batch, row).parent_span_id.hex()
            span_id, text = ids[16 * k : 16 * k + 16], self._names.texts[name]
            found.append(TraceSpan(self.batch, row, span_id, parent, text, start, end))
        return TraceTree(found)

    def named(self, pattern: str) -> Rows:
        """The spans with a name, which may be a pattern."""
        if pattern == "*":
            return np.arange(len(self))
        return np.flatnonzero(self._names.matching(pattern)[self.spans.name])

    @cached_property
    def odd(self) -> Flags:
        """The traces with a parent id that is not 8 bytes long. Their siblings are not known
        here."""
        found = np.zeros(self.traces, bool)
        found[self.spans.of[(self.spans.below != 0) & (self.spans.parent_id == 0)]] = True
        return found

    @cached_property
    def roots(self) -> Rows:
        """Each trace's earliest span without a parent id, -1 without one."""
        return self.firsts(np.flatnonzero(self.spans.below == 0), self.spans.of, self.traces)

    @staticmethod
    def firsts(spans: Rows, of: Rows, groups: int) -> Rows:
        """The first of the ``spans`` (ascending) in each group, -1 without one."""
        found = np.full(groups, -1)
        found[of[spans[::-1]]] = spans[::-1]  # of several assignments the last counts
        return found

    @cached_property
    def duration(self) -> Rows:
        """From the earliest start to the latest end of each trace, in nanoseconds."""
        if not len(self):
            return np.zeros(0, np.int64)
        first = self._first[:-1]
        return np.maximum(0, np.maximum.reduceat(self.spans.end, first) - self.spans.start[first])

    @cached_property
    def _order(self) -> Rows:
        order = np.empty(len(self), np.int64)
        filled = leaves_first(self.spans.parent, np.empty(len(self), np.int64), order)
        return order[:filled]

    @cached_property
    def _siblings(self) -> Rows:
        """The same number for spans of a trace with the same parent id, -1 without one."""
        ids, number = np.unique(self.spans.parent_id, return_inverse=True)
        _, groups = np.unique(self.spans.of * len(ids) + number, return_inverse=True)
        return np.where(self.spans.below != 0, groups, -1)

    @cached_property
    def cyclic(self) -> Flags:
        """The traces in which some span is its own ancestor."""
        left = np.ones(len(self), bool)
        left[self._order] = False
        found = np.zeros(self.traces, bool)
        found[self.spans.of[left]] = True
        return found

    def relatives(self, kind: str, chosen: Flags, within: float) -> Rows:
        """For each span how many relatives of a kind are chosen; of parents, ancestors and spans in
        time 0 or 1. Ancestors and descendants in ``cyclic`` traces are left out."""
        parents = self.spans.parent
        out = np.zeros(len(self), np.int64)
        match kind:
            case "parent":
                above = np.flatnonzero(parents >= 0)
                out[above] = chosen[parents[above]]
            case "child":
                above = parents[chosen]
                out = np.bincount(above[above >= 0], minlength=len(self))
            case "sibling":
                own = self._siblings
                groups = int(own.max(initial=-1)) + 1
                counts = np.bincount(own[chosen & (own >= 0)], minlength=groups)
                within_group = np.flatnonzero(own >= 0)
                out[within_group] = counts[own[within_group]] - chosen[within_group]
            case "ancestor":
                find_ancestors(parents, self._order, chosen, out)
            case "descendant":
                count_descendants(parents, self._order, chosen, out)
            case _:
                search = next_starts if kind == "followed_by" else previous_starts
                search(self.spans.of, self.spans.start, chosen, out)
                limit = int(min(within, _LONGEST))
                found = (out >= 0) & (np.abs(out - self.spans.start) <= limit)
                out = found.astype(np.int64)
        return out

    def values(self, attribute: Attribute, spans: Rows) -> list[Value]:
        """An attribute or field of spans; None for number -1."""
        found: list[Value]
        present = spans >= 0
        if not present.all():
            found = [None] * len(spans)
            numbers = np.flatnonzero(present)
            for k, value in zip(
                numbers.tolist(), self.values(attribute, spans[numbers]), strict=True
            ):
                found[k] = value
            return found
        if attribute.scope is Scope.FIELD:
            return self._fields(attribute, spans)
        rows = self.spans.row[spans]
        out = np.zeros((len(rows), OUT_SIZE), np.int64)
        of_span = attribute.scope is Scope.ANY
        key = attribute_key(attribute.name)
        batch = self.batch
        find_attributes(batch.buf, batch.spans, batch.resources, rows, of_span, key, out)
        return [exact.normal(attribute_value(batch, each)) for each in out.tolist()]

    def _fields(self, attribute: Attribute, spans: Rows) -> list[Value]:
        own, name = self.spans, attribute.name
        match name:
            case "name":
                return [self._names.texts[each] for each in own.name[spans].tolist()]
            case "duration":
                return cast(list[Value], np.maximum(0, own.end - own.start)[spans].tolist())
            case "start" | "end":
                return cast(
                    list[Value], (own.start if name == "start" else own.end)[spans].tolist()
                )
            case "id":
                return [f"{each:016x}" for each in own.id[spans].view(np.uint64).tolist()]
            case "parentId":
                ids = own.parent_id[spans].view(np.uint64).tolist()
                below = own.below[spans].tolist()
                return [f"{id:016x}" if has else None for id, has in zip(ids, below, strict=True)]
            case "root":
                return cast(list[Value], (own.below[spans] == 0).tolist())
        rows = own.row[spans]
        if name in _NAMED_FIELDS:
            column, texts = _NAMED_FIELDS[name]
            numbers = self.batch.spans[rows, column].tolist()
            return [texts[each] if 0 <= each < len(texts) else texts[0] for each in numbers]
        if name == "service":
            resources = self.batch.spans[rows, RESOURCE]
            _, first, of = np.unique(resources, return_index=True, return_inverse=True)
            known = [read_attribute(attribute, self.batch, row) for row in rows[first].tolist()]
            return [known[each] for each in of.tolist()]
        return [exact.normal(read_attribute(attribute, self.batch, row)) for row in rows.tolist()]
