"""Judges a relational rule on many traces at once, from arrays of their spans.

Names, comparisons with literals, relations along the tree and in time, and counts are computed for
all spans together; groups are formed by key. The result is exact, except for traces that are
*unsure*: those with long texts, conditions on events and links, and cycles. They and the traces
that break the rule are judged again, span by span (:mod:`betrace.service.rules.relations`), which
also finds the groups and the evidence. A rule with a construct that is missing here is always
judged that way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np

from betrace.service.otlp.columns import Rows, SpanBatch
from betrace.service.otlp.primitives import BYTES_TYPE
from betrace.service.rules import exact
from betrace.service.rules.column_kernels import Flags, count_fields
from betrace.service.rules.column_values import ColumnComparisons, Items, Programs, UnsupportedError
from betrace.service.rules.columns import Names, SpanColumns, TraceColumns
from betrace.service.rules.dependence import Dependence
from betrace.service.rules.exact import Value
from betrace.service.rules.syntax import (
    Aggregate,
    And,
    Arithmetic,
    Before,
    Comparison,
    Constant,
    Exists,
    Expression,
    ForEach,
    Given,
    Node,
    Not,
    Or,
    Part,
    Ref,
    Relative,
    RuleSyntax,
    SpanSet,
)
from betrace.service.rules.workspace import FOREVER

_TAGS = {"event": 11 << 3 | BYTES_TYPE, "link": 13 << 3 | BYTES_TYPE}
_INVERSE = {
    "parent": "child",
    "child": "parent",
    "ancestor": "descendant",
    "descendant": "ancestor",
    "sibling": "sibling",
    "followed_by": "preceded_by",
    "preceded_by": "followed_by",
}
_COUNTED = ("parent", "child", "ancestor", "sibling")  # whose inverse has a number


class Screened(NamedTuple):
    """The traces that may break a rule, and those of them that are unsure."""

    may_break: Flags
    unsure: Flags


class ColumnRule:
    """A rule that can be judged in columns. Raises :exc:`UnsupportedError` for others."""

    def __init__(self, syntax: RuleSyntax) -> None:
        self.syntax = syntax
        self.dependence = Dependence(syntax.for_each.word if syntax.for_each else None, {})
        self.programs = Programs()
        self.run(_nothing())  # visits every node
        self.programs.finish()

    @property
    def reads_values(self) -> bool:
        """Whether it reads values of spans, other than in comparisons with literals."""
        return self.programs.reads_values

    def run(self, traces: TraceColumns) -> Screened:
        """Judge traces."""
        return _Run(self, traces).run()


def _nothing() -> TraceColumns:
    """No traces."""
    rows = np.zeros((0, 32), np.int64)
    batch = SpanBatch("", np.zeros(0, np.uint8), rows, rows, rows, rows)
    return TraceColumns(batch, Names(), np.zeros((len(SpanColumns._fields), 0), np.int64), 0)


class _Run:
    """One rule on some traces. Conditions are evaluated for *items*: traces or groups."""

    def __init__(self, rule: ColumnRule, traces: TraceColumns) -> None:
        self._rule = rule.syntax
        self._traces = traces
        self._of = traces.spans.of
        self._depends = rule.dependence.has
        self._unsure = traces.odd.copy()
        self._sets: dict[int, Rows] = {}
        self._relatives_of: dict[int, Rows] = {}
        self._items = Items(np.arange(traces.traces))
        compared = ColumnComparisons(
            rule.programs, traces, self._items, self._unsure, self._counted, self._aggregate
        )
        self._hold, self._values = compared.hold, compared.values

    def run(self) -> Screened:
        rule = self._rule
        holds = np.ones(len(self._items.at), bool)
        if rule.when is not None:
            holds = self._condition(rule.when)
        if rule.for_each is not None:
            self._enter(rule.for_each)
        broken = np.zeros(len(self._items.at), bool)
        if rule.always is not None:
            broken |= ~self._condition(rule.always)
        if rule.never is not None:
            broken |= self._condition(rule.never)
        found = np.zeros(self._traces.traces, bool)
        found[self._items.at[broken]] = True
        return Screened((found & holds) | self._unsure, self._unsure)

    def _enter(self, each: ForEach) -> None:
        """Evaluate conditions for groups from now on."""
        items, spans = self._items, self._select(each.spans)
        items.group = np.full(len(self._traces), -1)
        if each.by:
            items.group[spans], items.values, groups = self._grouped(each.by, spans)
            items.first = self._traces.firsts(spans[items.group[spans] >= 0], items.group, groups)
        else:
            items.group[spans] = np.arange(len(spans))
            items.first = spans
        items.word, items.by = each.word, bool(each.by)
        items.at = self._of[items.first]

    def _grouped(
        self, by: tuple[Ref, ...], spans: Rows
    ) -> tuple[list[int], dict[Ref, list[Value]], int]:
        """The number of each span's group, -1 for none, the values of each group, and the number of
        groups."""
        columns = [self._values(ref, spans) for ref in by]
        groups: dict[tuple[int | str | None, ...], int] = {}
        known: dict[Ref, list[Value]] = {ref: [] for ref in by}
        numbers = []
        for trace, *values in zip(self._of[spans].tolist(), *columns, strict=True):
            key = (trace, *map(exact.key, values))
            if None in key:
                numbers.append(-1)
                continue
            number = groups.setdefault(key, len(groups))
            for ref, value in zip(known, values, strict=True):
                if number == len(known[ref]):
                    known[ref].append(value)
                elif exact.is_number(value):
                    known[ref][number] = value
            numbers.append(number)
        return numbers, known, len(groups)

    # Conditions: a truth value for each item

    def _condition(self, node: Node) -> Flags:
        match node:
            case And(items):
                return cast(Flags, np.all([self._condition(item) for item in items], axis=0))
            case Or(items):
                return cast(Flags, np.any([self._condition(item) for item in items], axis=0))
            case Not(item):
                return ~self._condition(item)
            case Exists(spans):
                return self._count(spans, exactly=False) > 0
            case Before(first, second):
                one, other = self._first(first), self._first(second)
                starts = np.append(self._traces.spans.start, 0)
                return (one >= 0) & (other >= 0) & (starts[one] < starts[other])
            case Comparison() | Given():
                return self._hold(node, None)
            case _:
                raise UnsupportedError

    def _first(self, spans: SpanSet) -> Rows:
        """The first span of a set for each item, -1 without one."""
        found = self._members(spans)
        if spans.bound:
            return self._traces.firsts(found, self._items.group, len(self._items.at))
        return self._traces.firsts(found, self._of, self._traces.traces)[self._items.at]

    def _members(self, spans: SpanSet) -> Rows:
        """The spans of a set that is the same for all groups, or has only spans of groups."""
        if not spans.bound:
            return self._select(spans)
        found = np.flatnonzero(self._items.group >= 0)
        return found if spans.where is None else found[self._satisfy(spans.where, found)]

    def _select(self, spans: SpanSet) -> Rows:
        found = self._sets.get(id(spans))
        if found is None:
            if self._depends(spans):
                raise UnsupportedError
            found = self._traces.named(spans.name)
            if spans.where is not None:
                found = found[self._satisfy(spans.where, found)]
            self._sets[id(spans)] = found
        return found

    def _count(self, spans: SpanSet, exactly: bool) -> Rows:
        """How many spans of a set each item has; not ``exactly`` if only more than 0 matters."""
        at = self._items.at
        if spans.bound:
            return np.bincount(self._items.group[self._members(spans)], minlength=len(at))
        if self._depends(spans):
            return self._count_joined(spans, exactly)
        return np.bincount(self._of[self._select(spans)], minlength=self._traces.traces)[at]

    def _count_joined(self, spans: SpanSet, exactly: bool) -> Rows:
        """The same for spans that a value or relation connects with the group."""
        where = spans.where
        found = self._traces.named(spans.name)
        joins = []
        for part in where.items if isinstance(where, And) else (where,):
            assert part is not None
            if self._depends(part):
                joins.append(part)
            else:
                found = found[self._satisfy(part, found)]
        match joins:
            case [Comparison(left, "==", (right,))]:
                return self._count_equal(found, left, right)
            case [Relative(kind, SpanSet(_, None, True), _) as join] if not self._items.by and (
                kind in _COUNTED or not exactly
            ):
                return self._relatives(_INVERSE[kind], found, _limit(join))[self._items.first]
            case _:
                raise UnsupportedError

    def _count_equal(self, spans: Rows, left: Expression, right: Expression) -> Rows:
        own, of_group = (right, left) if self._depends(left) else (left, right)
        if self._depends(own) or not _is_of_group(of_group):
            raise UnsupportedError
        index: dict[tuple[int, str, object], int] = {}
        of = self._of[spans].tolist()
        for trace, value in zip(of, self._values(own, spans), strict=True):
            for kind, key in _keys(value):
                index[trace, kind, key] = index.get((trace, kind, key), 0) + 1
        counts = []
        of = self._items.at.tolist()
        for trace, value in zip(of, self._values(of_group, None), strict=True):
            equal = _equal_keys(value)
            counts.append(sum(index.get((trace, *each), 0) for each in equal))
        return np.array(counts, np.int64)

    def _aggregate(self, node: Aggregate) -> list[Value]:
        if node.kind == "count":
            return self._count(node.spans, exactly=True).tolist()  # type: ignore[no-any-return]
        assert node.ref is not None
        bound = node.spans.bound
        if self._depends(node.ref) and not bound:
            raise UnsupportedError
        spans = self._members(node.spans)
        of = self._items.group if bound else self._of
        values: list[list[Value]] = [
            [] for _ in range(len(self._items.at) if bound else self._traces.traces)
        ]
        for number, value in zip(of[spans].tolist(), self._values(node.ref, spans), strict=True):
            if value is not None:
                values[number].append(value)
        found = [exact.aggregate(node.kind, each) for each in values]
        return found if bound else [found[trace] for trace in self._items.at.tolist()]

    # Predicates: a truth value for each of some spans

    def _satisfy(self, node: Node, spans: Rows) -> Flags:
        match node:
            case And(items) | Or(items):
                so_far = isinstance(node, And)
                found = np.full(len(spans), so_far)
                for item in items:
                    left = np.flatnonzero(found == so_far)
                    found[left] = self._satisfy(item, spans[left])
                return found
            case Not(item):
                return ~self._satisfy(item, spans)
            case Relative() | Part():
                return self._counted(node, spans) > 0
            case Comparison() | Given():
                return self._hold(node, spans)
            case _:
                raise UnsupportedError

    def _counted(self, node: Relative | Part, spans: Rows) -> Rows:
        """How many relatives, events or links spans have. If events or links must satisfy
        something, traces in which spans have some are unsure."""
        if isinstance(node, Relative):
            counts = self._relatives_of.get(id(node))
            if counts is None:
                counts = self._relatives(node.kind, self._select(node.spans), _limit(node))
                self._relatives_of[id(node)] = counts
            return counts[spans]
        batch = self._traces.batch
        out = np.zeros(len(spans), np.int64)
        rows = self._traces.spans.row[spans]
        count_fields(batch.buf, batch.spans, rows, _TAGS[node.kind], out)
        if node.where is not None:
            self._unsure[self._of[spans[out > 0]]] = True
        return out

    def _relatives(self, kind: str, spans: Rows, within: float) -> Rows:
        if kind in ("ancestor", "descendant"):
            self._unsure |= self._traces.cyclic
        chosen = np.zeros(len(self._traces), bool)
        chosen[spans] = True
        return self._traces.relatives(kind, chosen, within)


def _limit(node: Relative) -> float:
    if node.within is None:
        return FOREVER
    assert not isinstance(node.within.value, str)
    return math.floor(node.within.value)


def _is_of_group(node: Expression) -> bool:
    """Whether a value is of the group, and not of a span."""
    match node:
        case Constant():
            return True
        case Ref(scope):
            return scope not in ("", "parent", "event", "link")
        case Arithmetic(first, rest):
            return all(map(_is_of_group, (first, *(right for _, right in rest))))
        case _:
            return False


def _keys(value: Value) -> Iterator[tuple[str, object]]:
    """What a value is found by."""
    if exact.is_number(value):
        yield "number", value
    elif isinstance(value, str | bool):
        yield "text", exact.text(value)
        if (number := exact.number(value)) is not None:
            yield "text as number", number


def _equal_keys(value: Value) -> Iterator[tuple[str, object]]:
    """What the values that equal a value are found by: of two numbers one may be a text; two texts
    must be the same."""
    if exact.is_number(value):
        yield from (("number", value), ("text as number", value))
    elif isinstance(value, str | bool):
        yield "text", exact.text(value)
        if (number := exact.number(value)) is not None:
            yield "number", number
