"""Evaluates the conditions of a relational rule on a whole trace, exactly.

Spans are found by name, id and, for equality with a value of the group, by that value; relatives
are found for all spans at once. So a rule takes time about linear in the trace, unless each group
needs relations of its own. The number of steps is bounded.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from betrace.service.rules import exact
from betrace.service.rules.exact import UnknownError, Value
from betrace.service.rules.syntax import (
    Aggregate,
    And,
    Arithmetic,
    Before,
    Comparison,
    Constant,
    Counted,
    Exists,
    Expression,
    Given,
    Node,
    Not,
    Or,
    Part,
    Ref,
    Relative,
    Scope,
    SpanSet,
)
from betrace.service.rules.trace_tree import SpanPart, TraceSpan, TraceTree, follows

STEPS = 200_000  # of a rule on a trace, and as many for each of its spans:
STEPS_OF_SPAN = 20  # a step takes 2 to 5 microseconds
STEPS_AT_ONCE = 1000  # between looks at the clock

FOREVER = float("inf")


class TooMuchWorkError(Exception):
    """A rule needs more steps or time than allowed."""


@dataclass(frozen=True, slots=True)
class Group:
    """The spans that the bound word stands for, and the values after ``by``."""

    spans: list[TraceSpan]
    values: Mapping[Ref, Value] = field(default_factory=dict)


class Evaluation:
    """One rule and one trace; ``word`` is the bound word of the rule. Nodes are known by identity:
    they live as long as the rule.

    Methods raise :exc:`UnknownError` if the result depends on a text of more than
    ``max_match_bytes`` bytes, and :exc:`TooMuchWorkError` after too many steps, or after the time
    ``until`` of :func:`time.monotonic`.
    """

    def __init__(
        self, trace: TraceTree, word: str | None, until: float, max_match_bytes: int
    ) -> None:
        self._trace = trace
        self._left = STEPS + STEPS_OF_SPAN * len(trace.spans)
        self._look_at = self._left
        self._until = until
        self._longest = max_match_bytes
        self._word = word
        self._group: Group | None = None
        self._memo: dict[tuple[str, int], Any] = {}  # the same for all groups
        self._own: dict[tuple[str, int], Any] = {}  # of the present group
        self._depends: dict[int, bool] = {}

    def enter(self, group: Group) -> None:
        """Let the bound word stand for a group from now on."""
        self._group = group
        self._own = {}

    # Conditions

    def _step(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < self._look_at:
            if self._left < 0:
                raise TooMuchWorkError("the rule needs too much work for this trace")
            if time.monotonic() > self._until:
                raise TooMuchWorkError("there was too little time for this trace")
            self._look_at = self._left - STEPS_AT_ONCE

    def holds(self, node: Node) -> bool:
        """Whether a condition holds."""
        match node:
            case And(items):
                return self._all(items, self.holds)
            case Or(items):
                return not self._all(items, lambda item: not self.holds(item))
            case Not(item):
                return not self.holds(item)
            case Exists(spans):
                return self._exists(spans)
            case Before(first, second):
                one, other = self.select(first), self.select(second)
                return bool(one and other) and one[0].start < other[0].start
            case Comparison() | Given():
                return self._satisfies(node, None, None)
            case _:
                raise TypeError(f"not a condition: {node!r}")

    @staticmethod
    def _all(items: Iterable[Node], holds: Callable[[Node], bool]) -> bool:
        """Whether all hold; unknown only if none certainly fails."""
        unknown: UnknownError | None = None
        for item in items:
            try:
                if not holds(item):
                    return False
            except UnknownError as error:
                unknown = error
        if unknown is not None:
            raise unknown
        return True

    def _exists(self, spans: SpanSet) -> bool:
        try:
            return bool(self.select(spans))
        except UnknownError:
            for span in self._base(spans):
                try:
                    if spans.where is None or self._satisfies(spans.where, span, None):
                        return True
                except UnknownError:
                    pass
            raise

    # Span sets

    def _base(self, spans: SpanSet) -> list[TraceSpan]:
        if spans.bound:
            return self._group.spans if self._group is not None else []
        return self._trace.named(spans.name)

    def is_dependent(self, node: Any) -> bool:
        """Whether a node depends on the group."""
        found = self._depends.get(id(node))
        if found is None:
            found = self._depends[id(node)] = self._find_dependence(node)
        return found

    def _find_dependence(self, node: Any) -> bool:
        match node:
            case Ref(scope):
                return self._word is not None and scope == self._word
            case SpanSet(_, where, bound):
                return bound or (where is not None and self.is_dependent(where))
            case And(items) | Or(items):
                return any(map(self.is_dependent, items))
            case Not(item):
                return self.is_dependent(item)
            case Comparison(left, _, right):
                return any(map(self.is_dependent, (left, *right)))
            case Given(ref):
                return self.is_dependent(ref)
            case Relative(_, spans):
                return self.is_dependent(spans)
            case Part(_, where):
                return where is not None and self.is_dependent(where)
            case Counted(what):
                return self.is_dependent(what)
            case Arithmetic(first, rest):
                return any(map(self.is_dependent, (first, *(right for _, right in rest))))
            case Aggregate(_, spans, ref):
                return self.is_dependent(spans) or (ref is not None and self.is_dependent(ref))
            case _:
                return False

    def select(self, spans: SpanSet) -> list[TraceSpan]:
        """The spans of a set, in order of start and id."""
        if spans.where is None:
            return self._base(spans)
        memo = self._own if self.is_dependent(spans) else self._memo
        found = memo.get(("select", id(spans)))
        if found is None:
            candidates, where = self._candidates(spans)
            found = [s for s in candidates if where is None or self._satisfies(where, s, None)]
            memo["select", id(spans)] = found
        return found  # type: ignore[no-any-return]

    def _candidates(self, spans: SpanSet) -> tuple[list[TraceSpan], Node | None]:
        """The spans that may be in a set, and what they must satisfy."""
        where = spans.where
        if spans.bound or not self.is_dependent(where):
            return self._base(spans), where
        for part in where.items if isinstance(where, And) else (where,):
            if isinstance(part, Relative) and part.spans.bound and "_by" not in part.kind:
                return self._near(spans, part), where
        join = self._join(spans)
        if join is None:
            return self._base(spans), where
        of_group, index = join
        value = self.value(of_group, None, None)
        wanted: list[tuple[str, Any]] = []
        number = exact.number(value)
        if number is not None:
            wanted.append(("number", number))
        if isinstance(value, str | bool):
            wanted.append(("text", exact.text(value)))
        found: dict[str, TraceSpan] = {}
        for each in wanted:
            for span in index.get(each, ()):
                found[span.id] = span
        if len(wanted) > 1:
            return sorted(found.values(), key=lambda span: (span.start, span.id)), where
        return list(found.values()), where

    def _near(self, spans: SpanSet, part: Relative) -> list[TraceSpan]:
        """The spans with the set's name that have a relative in the group."""
        trace = self._trace
        key = ("named", id(spans))
        if key not in self._memo:
            self._memo[key] = frozenset(span.id for span in self._base(spans))
        named: frozenset[str] = self._memo[key]
        found: dict[str, TraceSpan] = {}
        for span in self.select(part.spans):
            near: Iterable[TraceSpan | None]
            match part.kind:
                case "parent":
                    near = trace.children(span.id)
                case "child":
                    near = (trace.parent(span),)
                case "sibling":
                    near = trace.children(span.parent_id)
                case "ancestor":
                    near = trace.below(span)
                case _:
                    near = trace.ancestors(span)
            for each in near:
                self._step()
                if each is not None and each.id in named:
                    found[each.id] = each
        return sorted(found.values(), key=lambda span: (span.start, span.id))

    def _join(
        self, spans: SpanSet
    ) -> tuple[Expression, Mapping[tuple[str, Any], list[TraceSpan]]] | None:
        """The side of an equality that is of the group, and the spans by the other side's value;
        None if the predicate has no such equality."""
        key = ("join", id(spans))
        if key not in self._memo:
            self._memo[key] = self._find_join(spans)
        return self._memo[key]  # type: ignore[no-any-return]

    def _find_join(
        self, spans: SpanSet
    ) -> tuple[Expression, Mapping[tuple[str, Any], list[TraceSpan]]] | None:
        where = spans.where
        parts = where.items if isinstance(where, And) else (where,)
        for part in parts:
            if not isinstance(part, Comparison) or part.op != "==":
                continue
            for one, other in ((part.left, part.right[0]), (part.right[0], part.left)):
                if self._is_of_group(one) and not self.is_dependent(other):
                    index: dict[tuple[str, Any], list[TraceSpan]] = {}
                    for span in self._base(spans):
                        self._step()
                        value = self.value(other, span, None)
                        number = exact.number(value)
                        if number is not None:
                            index.setdefault(("number", number), []).append(span)
                        if isinstance(value, str | bool):
                            index.setdefault(("text", exact.text(value)), []).append(span)
                    return one, index
        return None

    def _is_of_group(self, node: Expression) -> bool:
        """Whether a value depends on the group, and not on the span."""
        return self.is_dependent(node) and self._without_span(node)

    def _without_span(self, node: Expression) -> bool:
        match node:
            case Constant():
                return True
            case Ref(scope):
                return scope in ("root", "trace", self._word)
            case Arithmetic(first, rest):
                return all(map(self._without_span, (first, *(right for _, right in rest))))
            case _:
                return False

    # Predicates

    def _satisfies(self, node: Node, span: TraceSpan | None, part: SpanPart | None) -> bool:
        """Whether a predicate holds for a span, or for an event or link of it."""
        self._step()
        match node:
            case And(items):
                return self._all(items, lambda item: self._satisfies(item, span, part))
            case Or(items):
                return not self._all(items, lambda item: not self._satisfies(item, span, part))
            case Not(item):
                return not self._satisfies(item, span, part)
            case Comparison(left, op, right):
                return self._compares(self.value(left, span, part), op, right, span, part)
            case Given(ref, truthy):
                value = self.value(ref, span, part)
                return exact.truthy(value) if truthy else value is not None
            case Relative():
                assert span is not None
                return self._relatives(node, span) > 0
            case Part():
                assert span is not None
                return self._parts(node, span, most=1) > 0
            case _:
                raise TypeError(f"not a predicate: {node!r}")

    def _compares(
        self,
        left: Value,
        op: str,
        right: Sequence[Expression],
        span: TraceSpan | None,
        part: SpanPart | None,
    ) -> bool:
        if op == "in":
            return any(exact.compare(left, "==", self.value(each, span, part)) for each in right)
        value = self.value(right[0], span, part)
        if op == "matches":
            return exact.matches(left, str(value), self._longest)
        if op == "contains":
            return exact.contains(left, value)
        return exact.compare(left, op, value)

    def _parts(self, node: Part, span: TraceSpan, most: float = FOREVER) -> int:
        """The number of events or links that satisfy a predicate, counted up to ``most``."""
        found = 0
        unknown: UnknownError | None = None
        for each in span.events if node.kind == "event" else span.links:
            try:
                found += node.where is None or self._satisfies(node.where, span, each)
            except UnknownError as error:
                unknown = error
            if found >= most:
                return found
        if unknown is not None:
            raise unknown
        return found

    # Relatives

    def _relatives(self, node: Relative, span: TraceSpan) -> int:
        """The number of relatives in the set; of ancestors, parents and spans in time 0 or 1."""
        if self.is_dependent(node.spans):
            return self._relatives_of_group(node, span)
        trace = self._trace
        match node.kind:
            case "parent":
                parent = trace.parent(span)
                return parent is not None and parent.id in self._ids(node.spans)
            case "child":
                own = span.parent_id == span.id and span.id in self._ids(node.spans)
                return self._by_parent(node.spans).get(span.id, 0) - own
            case "sibling":
                own = span.id in self._ids(node.spans)
                if not span.parent_id:
                    return 0
                return self._by_parent(node.spans).get(span.parent_id, 0) - own
            case "ancestor":
                found = self._memoised("below", node.spans, trace.with_ancestor)
                return span.id in found
            case "descendant":
                counts = self._memoised("above", node.spans, trace.descendants)
                return counts.get(span.id, 0)  # type: ignore[no-any-return]
            case _:
                return self._in_time(node, span, self._starts(node.spans, self._memo))

    def _memoised(self, name: str, spans: SpanSet, compute: Callable[[frozenset[str]], Any]) -> Any:
        key = (name, id(spans))
        if key not in self._memo:
            self._step(len(self._trace.spans))
            self._memo[key] = compute(self._ids(spans))
        return self._memo[key]

    def _ids(self, spans: SpanSet) -> frozenset[str]:
        memo = self._own if self.is_dependent(spans) else self._memo
        key = ("ids", id(spans))
        if key not in memo:
            memo[key] = frozenset(span.id for span in self.select(spans))
        return memo[key]  # type: ignore[no-any-return]

    def _by_parent(self, spans: SpanSet) -> Mapping[str, int]:
        key = ("by parent", id(spans))
        if key not in self._memo:
            counts: dict[str, int] = {}
            for span in self.select(spans):
                if span.parent_id:
                    counts[span.parent_id] = counts.get(span.parent_id, 0) + 1
            self._memo[key] = counts
        return self._memo[key]  # type: ignore[no-any-return]

    def _starts(self, spans: SpanSet, memo: dict[tuple[str, int], Any]) -> list[int]:
        key = ("starts", id(spans))
        if key not in memo:
            memo[key] = [span.start for span in self.select(spans)]
        return memo[key]  # type: ignore[no-any-return]

    def _in_time(self, node: Relative, span: TraceSpan, starts: list[int]) -> int:
        within = FOREVER if node.within is None else node.within.value
        assert not isinstance(within, str)
        if node.kind == "followed_by":
            return follows(starts, span.start, within)
        at = bisect_left(starts, span.start) - 1
        return at >= 0 and span.start - starts[at] <= within

    def _relatives_of_group(self, node: Relative, span: TraceSpan) -> int:
        """The same for a set that depends on the group, and is usually small."""
        trace = self._trace
        spans = self.select(node.spans)
        ids = self._ids(node.spans)
        match node.kind:
            case "parent":
                parent = trace.parent(span)
                return parent is not None and parent.id in ids
            case "child":
                self._step(len(spans))
                return sum(s.parent_id == span.id and s is not span for s in spans)
            case "sibling":
                self._step(len(spans))
                same = span.parent_id
                return sum(s.parent_id == same and s is not span for s in spans) if same else 0
            case "ancestor":
                return any(self._stepped(each) in ids for each in trace.ancestors(span))
            case "descendant":
                return sum(
                    any(self._stepped(each) == span.id for each in trace.ancestors(s))
                    for s in spans
                )
            case _:
                return self._in_time(node, span, self._starts(node.spans, self._own))

    def _stepped(self, span: TraceSpan) -> str:
        self._step()
        return span.id

    # Values

    def value(self, node: Expression, span: TraceSpan | None, part: SpanPart | None) -> Value:
        """The value of an expression for a span, or for an event or link of it."""
        match node:
            case Constant(value):
                return value
            case Ref():
                return self._ref(node, span, part)
            case Arithmetic(first, rest):
                result = self.value(first, span, part)
                for op, right in rest:
                    result = exact.calculate(result, op, self.value(right, span, part))
                return result
            case Counted(what):
                assert span is not None
                if isinstance(what, Part):
                    return self._parts(what, span)
                return int(self._relatives(what, span))
            case Aggregate():
                memo = self._own if self.is_dependent(node) else self._memo
                key = ("aggregate", id(node))
                if key not in memo:
                    memo[key] = self._aggregate(node)
                return memo[key]  # type: ignore[no-any-return]

    def _aggregate(self, node: Aggregate) -> Value:
        spans = self.select(node.spans)
        self._step(len(spans))
        if node.kind == "count":
            return len(spans)
        assert node.ref is not None
        values = [self.value(node.ref, span, None) for span in spans]
        if node.kind == "distinct":
            return len({key for value in values if (key := exact.key(value)) is not None})
        numbers = [number for value in values if (number := exact.number(value)) is not None]
        match node.kind:
            case "sum":
                return sum(numbers)
            case "avg":
                return exact.calculate(sum(numbers), "/", len(numbers))
            case "min":
                return min(numbers, default=None)
            case _:
                return max(numbers, default=None)

    def _ref(self, ref: Ref, span: TraceSpan | None, part: SpanPart | None) -> Value:
        scope, attribute = ref.scope, ref.attribute
        if scope == self._word and self._word is not None:
            group = self._group
            assert group is not None
            if group.values:
                return group.values.get(Ref("", attribute))
            of = group.spans[0]
        elif scope in ("event", "link"):
            assert part is not None
            return _part_value(scope, attribute.scope is Scope.FIELD, attribute.name, part)
        elif scope == "trace":
            return self._trace_field(attribute.name)
        else:
            if scope == "":
                found = span
            elif scope == "root":
                found = self._trace.root
            else:
                found = self._trace.parent(span) if span is not None else None
            if found is None:
                return None
            of = found
        if attribute.scope is Scope.FIELD:
            return span_field(of, attribute.name)
        if attribute.scope is Scope.ANY:
            value = of.attributes.get(attribute.name)
            if value is not None:
                return exact.normal(value)
        return exact.normal(of.resource.get(attribute.name))

    def _trace_field(self, name: str) -> int:
        match name:
            case "duration":
                return self._trace.duration
            case "spans":
                return len(self._trace.spans)
            case _:
                return self._trace.services


def span_field(span: TraceSpan, name: str) -> Value:
    """A field of a span; None if the span does not have it."""
    match name:
        case "name":
            return span.name
        case "kind":
            return span.kind
        case "status":
            return span.status
        case "statusMessage":
            return span.status_message
        case "duration":
            return max(0, span.end - span.start)
        case "service":
            return span.service
        case "scope":
            return span.scope
        case "id":
            return span.id
        case "parentId":
            return span.parent_id or None
        case "start":
            return span.start
        case "end":
            return span.end
        case _:
            return not span.parent_id


def _part_value(scope: str, is_field: bool, name: str, part: SpanPart) -> Value:
    if not is_field:
        return exact.normal(part.attributes.get(name))
    if scope == "event":
        return part.name if name == "name" else part.since_start
    return part.trace_id if name == "traceId" else part.span_id
