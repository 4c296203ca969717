"""How many spans and how long a trace must be for a relational rule to be broken at all.

A rule such as ``never { x.where(count(child(y)) > 50) }`` is not broken by a trace of ten spans,
whatever they are. The fold knows the number of spans of a trace and its duration, so candidates
that are too small are not read back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from betrace.service.rules.logic import MIRRORED, OPPOSITE
from betrace.service.rules.syntax import (
    Aggregate,
    And,
    Attribute,
    Comparison,
    Constant,
    Counted,
    Exists,
    Expression,
    Node,
    Not,
    Or,
    Ref,
    Relative,
    RuleSyntax,
    Scope,
    SpanSet,
)

_MOST = 2**62


class Least(NamedTuple):
    """The least number of spans, and the least duration in nanoseconds."""

    spans: int = 0
    duration: int = 0


def least(rule: RuleSyntax) -> Least:
    """What a trace must have at least to break a rule."""
    broken = [_least(rule.always, False)] if rule.always is not None else []
    broken += [_least(rule.never, True)] if rule.never is not None else []
    parts = [_either(broken)]
    if rule.when is not None:
        parts.append(_least(rule.when, True))
    if rule.for_each is not None:
        parts.append(_of_span(rule.for_each.spans))
    return _all(parts)


def _all(parts: list[Least]) -> Least:
    return Least(max(part.spans for part in parts), max(part.duration for part in parts))


def _either(parts: list[Least]) -> Least:
    return Least(min(part.spans for part in parts), min(part.duration for part in parts))


def _of_span(spans: SpanSet) -> Least:
    """For a set to have a span."""
    return Least(1) if spans.where is None else _all([Least(1), _least(spans.where, True)])


def _least(node: Node, holds: bool) -> Least:
    """For a condition or predicate to hold, or not to hold."""
    match node:
        case And(items) | Or(items):
            parts = [_least(item, holds) for item in items]
            return _all(parts) if isinstance(node, And) == holds else _either(parts)
        case Not(item):
            return _least(item, not holds)
        case Exists(spans) if holds:
            return _of_span(spans)
        case Relative(_, spans) if holds:
            return _all([Least(2), _of_span(spans)])
        case Comparison(left, op, (right, *_)) if op in OPPOSITE:
            if isinstance(left, Constant):
                left, op, right = right, MIRRORED[op], left
            if isinstance(right, Constant) and not isinstance(right.value, str):
                return _compared(left, op if holds else OPPOSITE[op], right)
            return Least()
        case _:
            return Least()


def _compared(left: Expression, op: str, right: Constant) -> Least:
    assert not isinstance(right.value, str)
    if op not in (">", ">=", "=="):
        return Least()
    value = math.floor(right.value) + 1 if op == ">" else math.ceil(right.value)
    value = max(0, min(value, _MOST))
    match left:
        case Aggregate("count" | "distinct"):
            return Least(value)
        case Counted(Relative()):
            return Least(value + 1 if value else 0)  # no span is its own relative
        case Ref("trace", Attribute(Scope.FIELD, "spans" | "services")):
            return Least(value)
        case Ref("trace", Attribute(Scope.FIELD, "duration")):
            return Least(0, value)
        case _:
            return Least()
