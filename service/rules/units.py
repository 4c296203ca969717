"""Warns of plain numbers that are compared with durations: durations are nanoseconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction

from betrace.service.rules.definition import Problem, Rule
from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.format import format_ref
from betrace.service.rules.parse import parse
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
    Node,
    Not,
    Or,
    Part,
    Ref,
    Relative,
    RuleSyntax,
    Scope,
    SpanSet,
)

_FIELDS = ("duration", "sinceStart")


def unit_warnings(rules: Iterable[Rule], source: str = "rule") -> list[Problem]:
    """A warning for each plain number other than 0 that is compared with a duration."""
    return [
        Problem(source, error.message, rule.id, hint=error.hint, syntax=error)
        for rule in rules
        for error in warnings(rule.condition)
    ]


def warnings(condition: str) -> list[RuleSyntaxError]:
    """The warnings for a valid condition, each with its place in it."""
    found: list[RuleSyntaxError] = []
    at = 0
    try:
        rule = parse(condition, relational=True)
    except RuleSyntaxError:  # an old rule with a name that relational rules reserve
        return []
    for comparison in _comparisons(rule):
        sides = [comparison.left, *comparison.right]
        duration = next(filter(None, map(_duration, sides)), None)
        if duration is None:
            continue
        for number in filter(None, map(_plain, sides)):
            text = number.text
            match = re.compile(rf"(?<![\w.]){re.escape(text)}(?![\w.])").search(condition, at)
            at = match.end() if match else at
            place = match.start() if match else 0
            found.append(_warning(duration, text, condition, place))
    return found


def _warning(duration: Ref, text: str, condition: str, place: int) -> RuleSyntaxError:
    shown = format_ref(duration)
    if duration.attribute.scope is not Scope.FIELD:
        message = f"duration is an attribute of the span, compared with {text} without a unit"
        return RuleSyntaxError(
            message,
            condition,
            place,
            f"for the time that a span takes write span:duration > {text}ms",
        )
    message = f"{shown} is in nanoseconds, so {text} means {text} ns"
    return RuleSyntaxError(message, condition, place, f"write the unit, such as {text}ms")


def _plain(side: Expression) -> Constant | None:
    """A number without a unit, other than 0."""
    if isinstance(side, Constant) and isinstance(side.value, int | Fraction):
        return side if side.value and not side.text[-1:].isalpha() else None
    return None


def _duration(side: Expression) -> Ref | None:
    """The duration that an expression is: a field, or the sum or such of one."""
    match side:
        case Ref(_, attribute) if attribute.scope is Scope.FIELD and attribute.name in _FIELDS:
            return side
        case Ref("", attribute) if attribute.name == "duration":
            return side
        case Aggregate(kind, _, ref) if ref is not None and kind != "distinct":
            return _duration(ref)
        case Arithmetic(first, rest) if all(op in "+-" for op, _ in rest):
            return next(filter(None, map(_duration, (first, *(part for _, part in rest)))), None)
        case _:
            return None


def _comparisons(rule: RuleSyntax) -> Iterator[Comparison]:
    """All comparisons in a rule, in the order in which they are written."""

    def of(node: Node | Expression | SpanSet | None) -> Iterator[Comparison]:
        match node:
            case Comparison(left, _, right):
                yield node
                for side in (left, *right):
                    yield from of(side)
            case SpanSet(_, where) | Part(_, where):
                yield from of(where)
            case Exists(spans) | Relative(_, spans) | Aggregate(_, spans):
                yield from of(spans)
            case Before(first, second):
                yield from of(first)
                yield from of(second)
            case And(items) | Or(items):
                for item in items:
                    yield from of(item)
            case Not(item) | Counted(item):
                yield from of(item)
            case Arithmetic(first, rest):
                for part in (first, *(part for _, part in rest)):
                    yield from of(part)
            case _:
                pass

    if rule.for_each is not None:
        yield from of(rule.for_each.spans)
    for clause in (rule.when, rule.always, rule.never):
        yield from of(clause)
