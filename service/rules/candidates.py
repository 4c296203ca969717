"""What a trace must have for a relational rule to be broken at all.

The fold cannot decide a relational rule, but it can decide a condition without relations that holds
for every trace that breaks the rule. Only the traces for which it holds, the *candidates*, are read
back and judged. The condition consists of the old nodes, which the fold counts.

A condition is bounded from above (it holds whenever the original does) or from below (the original
holds whenever it does); ``not`` swaps the two. Comparisons with literals are kept, because the fold
compares as :mod:`betrace.service.rules.exact` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from betrace.service.rules.exact import number
from betrace.service.rules.logic import MIRRORED, conjunction, disjunction, negation
from betrace.service.rules.syntax import (
    FIELDS,
    Aggregate,
    And,
    Attribute,
    Before,
    Compare,
    Comparison,
    Constant,
    CountCompare,
    Exists,
    Expression,
    Given,
    Literal,
    Node,
    Not,
    Number,
    Or,
    Predicate,
    Ref,
    Relative,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
    all_of,
    span_sets,
)
from betrace.service.rules.values import exact_text

Bound = Node | bool
"""A condition, or its constant value."""


def candidate(rule: RuleSyntax) -> Bound:
    """A condition that holds for every trace that breaks the rule."""
    bounds = _Bounds(rule)
    parts: list[Bound] = []
    if rule.when is not None:
        parts.append(bounds.condition(rule.when, above=True))
    if rule.for_each is not None:
        spans = bounds.spans(rule.for_each.spans, above=True)
        parts.append(_at_least(spans, 1, above=True))
    broken: list[Bound] = []
    if rule.always is not None:
        broken.append(negation(bounds.condition(rule.always, above=False)))
    if rule.never is not None:
        broken.append(bounds.condition(rule.never, above=True))
    parts.append(disjunction(broken))
    return _cheaper(conjunction(parts))


def _cheaper(bound: Bound) -> Bound:
    """Without what is asked of all spans, if there are conditions for spans with a name as well:
    fewer traces are candidates with it, but every span would be compared. And without spans that
    must exist, if some of them must satisfy something."""
    if not isinstance(bound, And):
        return bound
    named = [item for item in bound.items if all(each.name != "*" for each in span_sets(item))]
    several = {
        item.left.name
        for item in named
        if isinstance(item, CountCompare) and isinstance(item.left, SpanSet) and item.op == ">="
    }
    needed = [
        item
        for item in named
        if not (isinstance(item, Exists) and not item.spans.where and item.spans.name in several)
    ]
    return all_of(needed) if needed else bound


class _Bounds:
    def __init__(self, rule: RuleSyntax) -> None:
        self._each = rule.for_each

    def condition(self, node: Node, above: bool) -> Bound:
        match node:
            case And(items):
                return conjunction(self.condition(item, above) for item in items)
            case Or(items):
                return disjunction(self.condition(item, above) for item in items)
            case Not(item):
                return negation(self.condition(item, not above))
            case Exists(spans):
                if spans.bound and spans.where is None:
                    return True  # a group has a span
                found = self.spans(spans, above)
                if found is None:
                    return False
                exists = _at_least(found, 1, above)
                return conjunction([exists, *self._needed(spans.where)]) if above else exists
            case Before(first, second):
                if not above:
                    return False
                both = [self.spans(each, above=True) for each in (first, second)]
                return conjunction(_at_least(each, 1, above=True) for each in both)
            case Comparison():
                return self._comparison(node, above)
            case _:
                return above

    def _needed(self, where: Node | None) -> Iterator[Bound]:
        """What a trace must have if a span satisfies a predicate: its relatives."""
        for part in where.items if isinstance(where, And) else (where,):
            if isinstance(part, Relative):
                yield self.condition(Exists(part.spans), above=True)

    def _comparison(self, node: Comparison, above: bool) -> Bound:
        left, op, right = node.left, node.op, node.right[0]
        if isinstance(left, Constant):
            left, op, right = right, MIRRORED.get(op, op), left
        if isinstance(left, Aggregate) and isinstance(right, Constant):
            limit = number(right.value)
            return above if limit is None else self._aggregate(left, op, limit, above)
        if not above or not isinstance(left, Ref) or not isinstance(right, Constant):
            return above
        if self._each is not None and left.scope == self._each.word and not self._each.by:
            own = Comparison(Ref("", left.attribute), op, node.right)
            spans = self.spans(self._with(own), above=True)
            return _at_least(spans, 1, above=True)
        if left.scope == "root" and left.attribute == Attribute(Scope.FIELD, "name"):
            names = [each.value if isinstance(each, Constant) else None for each in node.right]
            if op in ("==", "in") and all(isinstance(name, str) and _plain(name) for name in names):
                return disjunction(Exists(SpanSet(str(name))) for name in names)
        return above

    def _aggregate(self, left: Aggregate, op: str, limit: Number, above: bool) -> Bound:
        value = math.floor(limit)
        whole = value == limit
        high, low = (self.spans(left.spans, above=each) for each in (True, False))
        if left.kind == "count":
            # The set above has at least as many spans, the set below at most as many.
            more, fewer = (high, low) if above else (low, high)
            match op:
                case ">" | ">=":
                    least = value + 1 if op == ">" or not whole else value
                    return _at_least(more, least, above)
                case "<" | "<=":
                    most = value - 1 if op == "<" and whole else value
                    return negation(_at_least(fewer, most + 1, not above))
                case "==":
                    if not whole:
                        return False
                    return conjunction(
                        [
                            _at_least(more, value, above),
                            negation(_at_least(fewer, value + 1, not above)),
                        ]
                    )
                case _:
                    return above
        if not above:
            return False
        needs = (op in (">", ">=") and value >= 0 and not (op == ">=" and limit == 0)) or (
            left.kind in ("avg", "min", "max") and op != "!="
        )
        return _at_least(high, 1, above) if needs else True

    def _with(self, own: Predicate) -> SpanSet:
        assert self._each is not None
        where = self._each.spans.where
        both = own if where is None else all_of([where, own])
        return SpanSet(self._each.spans.name, both)  # type: ignore[arg-type]

    def spans(self, spans: SpanSet, above: bool) -> SpanSet | None:
        """A set with at least (or at most) the spans of another; None for the empty one."""
        if spans.bound:
            if not above or self._each is None:
                return None
            where = self._each.spans.where
            parts = [part for part in (where, spans.where) if part is not None]
            spans = SpanSet(self._each.spans.name, all_of(parts) if parts else None)  # type: ignore[arg-type]
        if spans.where is None:
            return SpanSet(spans.name)
        where_bound = self._predicate(spans.where, above)
        if isinstance(where_bound, bool):
            return SpanSet(spans.name) if where_bound else None
        return SpanSet(spans.name, where_bound)  # type: ignore[arg-type]

    def _predicate(self, node: Node, above: bool) -> Bound:
        match node:
            case And(items):
                return conjunction(self._predicate(item, above) for item in items)
            case Or(items):
                return disjunction(self._predicate(item, above) for item in items)
            case Not(item):
                return negation(self._predicate(item, not above))
            case Given(Ref("", attribute), True) if is_folded(attribute):
                return Truthy(attribute)
            case Comparison(Ref("", attribute), op, right):
                return _own(attribute, op, right, above)
            case _:
                return above


def is_folded(attribute: Attribute) -> bool:
    """Whether the fold knows an attribute or field."""
    return attribute.scope is not Scope.FIELD or attribute.name in FIELDS


def _own(attribute: Attribute, op: str, right: tuple[Expression, ...], above: bool) -> Bound:
    """A comparison of an own attribute with literals, if the fold can make it."""
    if not is_folded(attribute) or op == "matches":
        return above
    literals = tuple(map(literal, right))
    if any(each is None for each in literals):
        return above
    return Compare(attribute, op, tuple(each for each in literals if each is not None))


def literal(node: Expression) -> Literal | None:
    """A constant of a relational rule as a literal of the fold's rules; None for anything else."""
    if not isinstance(node, Constant):
        return None
    if isinstance(node.value, str):
        return Literal(node.value, None)
    return Literal(exact_text(node.value), node.value)


def _plain(name: str) -> bool:
    """Whether a span's name is found by this text alone, which is no pattern."""
    return "*" not in name


def _at_least(spans: SpanSet | None, least: int, above: bool) -> Bound:
    """Whether a set has so many spans, bounded from above or below."""
    if least <= 0:
        return True
    if spans is None:
        return False
    if spans == SpanSet("*"):  # to count all spans would cost more than it saves
        return True if least == 1 else above
    return Exists(spans) if least == 1 else CountCompare(spans, ">=", least)
