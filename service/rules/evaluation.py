"""Evaluates the conditions of a relational rule on a whole trace, exactly.

Spans are found by name, id and, for equality with a value of the group, by that value; relatives
are found for all spans at once. So a rule takes time about linear in the trace, unless each group
needs relations of its own. The number of steps is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from betrace.service.rules import exact
from betrace.service.rules.exact import UnknownError, Value
from betrace.service.rules.fields import part_value, span_field
from betrace.service.rules.relatives import Relatives
from betrace.service.rules.selection import Selection
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
)
from betrace.service.rules.trace_tree import SpanPart, TraceSpan
from betrace.service.rules.workspace import FOREVER, Workspace


class Evaluation:
    """The conditions and values of one rule on one trace.

    Methods raise :exc:`UnknownError` if the result depends on a text that is too long, and
    :exc:`TooMuchWorkError` after too many steps or too much time.
    """

    def __init__(self, run: Workspace) -> None:
        self._run = run
        selection = Selection(
            run,
            lambda node, span: self._satisfies(node, span, None),
            lambda node, span: self.value(node, span, None),
        )
        self.select = selection.select
        self._exists = selection.exists
        self._relatives = Relatives(run, self.select).count

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

    def _satisfies(self, node: Node, span: TraceSpan | None, part: SpanPart | None) -> bool:
        """Whether a predicate holds for a span, or for an event or link of it."""
        self._run.step()
        match node:
            case And(items):
                return self._all(items, lambda item: self._satisfies(item, span, part))
            case Or(items):
                return not self._all(items, lambda item: not self._satisfies(item, span, part))
            case Not(item):
                return not self._satisfies(item, span, part)
            case Comparison(left, op, right):
                value = self.value(left, span, part)
                if op == "in":
                    others = (self.value(each, span, part) for each in right)
                    return any(exact.compare(value, "==", other) for other in others)
                return exact.holds(value, op, self.value(right[0], span, part))
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
                memo = self._run.own if self._run.is_dependent(node) else self._run.memo
                key = ("aggregate", id(node))
                if key not in memo:
                    memo[key] = self._aggregate(node)
                return memo[key]  # type: ignore[no-any-return]

    def _aggregate(self, node: Aggregate) -> Value:
        spans = self.select(node.spans)
        self._run.step(len(spans))
        if node.kind == "count":
            return len(spans)
        assert node.ref is not None
        values = [self.value(node.ref, span, None) for span in spans]
        return exact.aggregate(node.kind, values)

    def _ref(self, ref: Ref, span: TraceSpan | None, part: SpanPart | None) -> Value:
        scope, attribute = ref.scope, ref.attribute
        if scope == self._run.word and self._run.word is not None:
            group = self._run.group
            assert group is not None
            if group.values:
                return group.values.get(Ref("", attribute))
            of = group.spans[0]
        elif scope in ("event", "link"):
            assert part is not None
            return part_value(scope, attribute.scope is Scope.FIELD, attribute.name, part)
        elif scope == "trace":
            return self._trace_field(attribute.name)
        else:
            if scope == "":
                found = span
            elif scope == "root":
                found = self._run.trace.root
            else:
                found = self._run.trace.parent(span) if span is not None else None
            if found is None:
                return None
            of = found
        if attribute.scope is Scope.FIELD:
            return span_field(of, attribute)
        return of.read(attribute)

    def _trace_field(self, name: str) -> int:
        match name:
            case "duration":
                return self._run.trace.duration
            case "spans":
                return len(self._run.trace.spans)
            case _:
                return self._run.trace.services
