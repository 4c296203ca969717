"""How many spans and how long a trace must be for a relational rule to be broken at all.

A rule such as ``never { x.where(count(child(y)) > 50) }`` is not broken by a trace of ten spans,
whatever they are. The fold knows the number of spans of a trace and its duration, so candidates
that are too small are not read back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
_MOST_ALTERNATIVES = 8


class Least(NamedTuple):
    """The least number of spans, and the least duration in nanoseconds."""

    spans: int = 0
    duration: int = 0


Alternatives = tuple[Least, ...]
"""A trace must have what one of them says. Without alternatives, no trace can break the rule."""

_ANY: Alternatives = (Least(),)


def least(rule: RuleSyntax) -> Alternatives:
    """What a trace must have at least to break a rule."""
    broken = [_least(rule.always, False)] if rule.always is not None else []
    broken += [_least(rule.never, True)] if rule.never is not None else []
    parts = [_either(broken)]
    if rule.when is not None:
        parts.append(_least(rule.when, True))
    if rule.for_each is not None:
        parts.append(_of_span(rule.for_each.spans))
    return _all(parts)


def _all(parts: Sequence[Alternatives]) -> Alternatives:
    found = _ANY
    for part in parts:
        found = _simple(
            Least(max(one.spans, other.spans), max(one.duration, other.duration))
            for one in found
            for other in part
        )
    return found


def _either(parts: Iterable[Alternatives]) -> Alternatives:
    return _simple(each for part in parts for each in part)


def _simple(alternatives: Iterable[Least]) -> Alternatives:
    """Without those that need more than another; if there are too many, less than all of them."""
    found: list[Least] = []
    for each in sorted(set(alternatives)):
        if not any(other.duration <= each.duration for other in found):  # others need fewer spans
            found.append(each)
    if len(found) > _MOST_ALTERNATIVES:
        return (Least(found[0].spans, found[-1].duration),)
    return tuple(found)


def _of_span(spans: SpanSet) -> Alternatives:
    """For a set to have a span."""
    one = (Least(1),)
    return one if spans.where is None else _all([one, _least(spans.where, True)])


def _least(node: Node, holds: bool) -> Alternatives:
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
            return _all([(Least(2),), _of_span(spans)])
        case Comparison(left, op, (right, *_)) if op in OPPOSITE:
            if isinstance(left, Constant):
                left, op, right = right, MIRRORED[op], left
            if isinstance(right, Constant) and not isinstance(right.value, str):
                return (_compared(left, op if holds else OPPOSITE[op], right),)
            return _ANY
        case _:
            return _ANY


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
