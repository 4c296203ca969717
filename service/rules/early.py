"""What no later span can undo, of a rule that relates spans.

From a rule a stronger one is derived, whose violation stays when spans are added to the trace. So a
trace that is still open and breaks it has broken the rule for good.

Conditions are replaced as in Kleene's logic, by how they can change while a trace grows. Values of
the span itself, of its events and links, and of the bound span stay as they are. Relations to other
spans, and counts of spans and relatives, can only become true or grow. Values of the parent, the
root and the trace can change in any way, except for ``trace:duration``, ``trace:spans`` and
``trace:services``, which grow.
"""

from __future__ import annotations

from collections.abc import Iterable

from betrace.service.rules.logic import (
    MIRRORED,
    OPPOSITE,
    conjunction,
    disjunction,
    negation,
)
from betrace.service.rules.syntax import (
    Aggregate,
    And,
    Arithmetic,
    Comparison,
    Constant,
    Counted,
    Exists,
    Expression,
    ForEach,
    Given,
    Node,
    Not,
    Or,
    Part,
    Predicate,
    Ref,
    Relative,
    RuleSyntax,
    SpanSet,
)

Growing = Node | bool
"""A condition that stays true once it is true, or its constant value."""


def early(rule: RuleSyntax) -> RuleSyntax | None:
    """The stronger rule; None if nothing can be told before the trace closes."""
    growth = _Growth(rule.for_each)
    when = growth.holds(rule.when) if rule.when is not None else True
    each = rule.for_each
    if each is not None:
        spans = growth.spans(each.spans)
        if spans is None:
            return None
        each = ForEach(spans, each.by, each.word)
    # Broken if it is not so that the clause holds.
    always = negation(growth.fails(rule.always)) if rule.always is not None else True
    never = growth.holds(rule.never) if rule.never is not None else False
    if when is False or always is False or never is True or (always is True and never is False):
        return None
    return RuleSyntax(
        None if isinstance(when, bool) else when,  # type: ignore[arg-type]
        None if isinstance(always, bool) else always,  # type: ignore[arg-type]
        None if isinstance(never, bool) else never,  # type: ignore[arg-type]
        for_each=each,
        relational=True,
    )


class _Growth:
    """Replaces the conditions and predicates of one rule."""

    def __init__(self, each: ForEach | None) -> None:
        self._word = each.word if each is not None else None
        self._by = bool(each is not None and each.by)

    def holds(self, node: Node) -> Growing:
        """Implies that a condition or predicate holds, now and later."""
        match node:
            case And(items):
                return conjunction(map(self.holds, items))
            case Or(items):
                return disjunction(map(self.holds, items))
            case Not(item):
                return self.fails(item)
            case Exists(spans):
                found = self.spans(spans)
                return False if found is None else Exists(found)
            case Relative(kind, spans, within):
                found = self.spans(spans)
                return False if found is None else Relative(kind, found, within)
            case Part():
                return self._part(node)
            case Comparison(left, op, right):
                return self._comparison(left, op, right)
            case Given(ref, truthy):
                # A group's value can become a number, which is not the text "true".
                return node if self._stays(ref) or (self._is_bound(ref) and not truthy) else False
            case _:
                return False

    def fails(self, node: Node) -> Growing:
        """Implies that a condition or predicate does not hold, now and later."""
        match node:
            case And(items):
                return disjunction(map(self.fails, items))
            case Or(items):
                return conjunction(map(self.fails, items))
            case Not(item):
                return self.holds(item)
            case Comparison(left, op, right) if op in OPPOSITE:
                if self._stays_all((left, *right)):
                    return Not(node)
                return self._comparison(left, OPPOSITE[op], right)
            case Comparison(left, _, right):
                return Not(node) if self._stays_all((left, *right)) else False
            case Given(ref):
                return Not(node) if self._stays(ref) else False
            case Part(_, where):
                return Not(node) if where is None or self._is_own(where) else False
            case _:
                return False

    def spans(self, spans: SpanSet) -> SpanSet | None:
        """A set whose spans are and stay in the given one; None for the empty set."""
        if spans.where is None:
            return spans
        where = self.holds(spans.where)
        if isinstance(where, bool):
            return SpanSet(spans.name, None, spans.bound) if where else None
        return SpanSet(spans.name, where, spans.bound)  # type: ignore[arg-type]

    def _part(self, node: Part) -> Growing:
        if node.where is None:
            return node
        where = self.holds(node.where)
        if isinstance(where, bool):
            return Part(node.kind) if where else False
        return Part(node.kind, where)  # type: ignore[arg-type]

    def _comparison(self, left: Expression, op: str, right: tuple[Expression, ...]) -> Growing:
        if self._stays_all((left, *right)):
            return Comparison(left, op, right)
        if op in ("==", "in") and self._bound_or_stays((left, *right)):
            return Comparison(left, op, right)  # equal texts are equal numbers, too
        if op not in MIRRORED:
            return False
        other = right[0]
        if isinstance(left, Constant):
            left, op, other = other, MIRRORED[op], left
        if not isinstance(other, Constant) or isinstance(other.value, str):
            return False
        if op == "!=" and _counts(left):
            op = ">"
        wanted = "<" if isinstance(left, Aggregate) and left.kind == "min" else ">"
        if not op.startswith(wanted):
            return False
        grown = self._grows(left)
        return False if grown is None else Comparison(grown, op, (other,))

    def _grows(self, node: Expression) -> Expression | None:
        """A lower bound of a number, if it can only grow (of ``min``: only become less)."""
        match node:
            case Aggregate("count" | "distinct" | "max" | "min" as kind, spans, ref):
                if ref is not None and not self._stays(ref):
                    return None
                found = self.spans(spans)
                return None if found is None else Aggregate(kind, found, ref)
            case Counted(Relative(kind, spans, within)):
                found = self.spans(spans)
                return None if found is None else Counted(Relative(kind, found, within))
            case Counted(Part() as part):
                grown = self._part(part)
                return Counted(grown) if isinstance(grown, Part) else None
            case Ref("trace"):
                return node
            case _:
                return None

    # What stays as it is

    def _stays_all(self, nodes: Iterable[Expression]) -> bool:
        return all(map(self._stays, nodes))

    def _stays(self, node: Expression) -> bool:
        match node:
            case Constant():
                return True
            case Ref(scope):
                return scope in ("", "event", "link") or (scope == self._word and not self._by)
            case Arithmetic(first, rest):
                return self._stays_all((first, *(right for _, right in rest)))
            case Counted(Part(_, where)):
                return where is None or self._is_own(where)
            case _:
                return False

    def _is_bound(self, node: Expression) -> bool:
        return isinstance(node, Ref) and self._word is not None and node.scope == self._word

    def _bound_or_stays(self, nodes: Iterable[Expression]) -> bool:
        return all(self._stays(node) or self._is_bound(node) for node in nodes)

    def _is_own(self, node: Predicate | Node) -> bool:
        """Whether a predicate asks only for what stays as it is."""
        match node:
            case And(items) | Or(items):
                return all(map(self._is_own, items))
            case Not(item):
                return self._is_own(item)
            case Comparison(left, _, right):
                return self._stays_all((left, *right))
            case Given(ref):
                return self._stays(ref)
            case Part(_, where):
                return where is None or self._is_own(where)
            case _:
                return False


def _counts(node: Expression) -> bool:
    """Whether a number is never missing and never decreases."""
    match node:
        case Aggregate("count" | "distinct") | Counted() | Ref("trace"):
            return True
        case _:
            return False
