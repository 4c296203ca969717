"""Compares and calculates exactly.

A *value* is None (missing), a bool, an exact number (int or Fraction), text, a float that is NaN or
infinite, or an array, map or bytes. A double is the shortest decimal that reads back as it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from betrace.service.rules.logic import OPERATORS
from betrace.service.rules.patterns import TOO_LONG, search
from betrace.service.rules.syntax import Literal, Number
from betrace.service.rules.values import (
    AttributeValue,
    exact_float,
    exact_number,
    exact_text,
    number_text,
)

Value = AttributeValue | Fraction


class UnknownError(Exception):
    """A text is too long to be searched, so the result is unknown."""


def normal(value: AttributeValue) -> Value:
    """An attribute's value with exact numbers."""
    if isinstance(value, float):
        exact = exact_float(value)
        return value if exact is None else exact
    return value


def is_number(value: Value) -> bool:
    """Whether a value is a finite number; text and bools are not."""
    return isinstance(value, int | Fraction) and not isinstance(value, bool)


def number(value: Value) -> Number | None:
    """The number that a value is or that its text reads as, or None."""
    if isinstance(value, str):
        return exact_number(value)
    if isinstance(value, int | Fraction) and not isinstance(value, bool):
        return value
    return None


def text(value: Value) -> str | None:
    """The text of text, a bool or a number; None for other values."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | Fraction):
        return exact_text(value)
    if isinstance(value, float):
        return number_text(value)
    return None


def key(value: Value) -> str | None:
    """The text by which values are grouped; None for values that count as missing there."""
    return None if isinstance(value, float) else text(value)


def compare(left: Value, op: str, right: Value) -> bool:
    """Whether ``left op right``; ``op`` is one of ``== != < <= > >=``."""
    comparable = (bool, int, Fraction, str)
    if not (isinstance(left, comparable) and isinstance(right, comparable)):
        return op == "!="  # missing, an array or map, NaN, or infinite
    if is_number(left) or is_number(right):
        one, other = number(left), number(right)
        if one is not None and other is not None:
            return OPERATORS[op](one, other)
    if op in ("==", "!="):
        return OPERATORS[op](text(left), text(right))
    return isinstance(left, str) and isinstance(right, str) and OPERATORS[op](left, right)


def compare_literals(value: AttributeValue, op: str, literals: Sequence[Literal]) -> bool:
    """Whether ``value op literal`` holds; ``op`` as in
    :class:`betrace.service.rules.syntax.Compare`, except ``matches``.

    Only ``in`` uses more than the first literal. Never raises, whatever the value.
    """
    left = normal(value)
    match op:
        case "in":
            return any(_compare_literal(left, "==", literal) for literal in literals)
        case "contains":
            if isinstance(left, list):
                return any(_compare_literal(normal(item), "==", literals[0]) for item in left)
            found = text(left)
            return found is not None and literals[0].text in found
        case _:
            return _compare_literal(left, op, literals[0])


def _compare_literal(left: Value, op: str, literal: Literal) -> bool:
    if literal.number is None:
        return compare(left, op, literal.text)
    if isinstance(left, str) and op in ("==", "!=") and number(left) is None:
        return OPERATORS[op](left, literal.text)  # a duration's text is what the rule says
    return compare(left, op, literal.number)


def contains(value: Value, part: Value) -> bool:
    """Whether a text contains the text of ``part``, or an array a member equal to it."""
    if isinstance(value, list):
        return any(compare(normal(item), "==", part) for item in value)
    found, wanted = text(value), text(part)
    return found is not None and wanted is not None and wanted in found


def matches(value: Value, pattern: str) -> bool:
    """Whether RE2 finds ``pattern`` in the value's text. Raises :exc:`UnknownError` if the text is
    too long."""
    found = text(value)
    if found is None:
        return False
    verdict = search(pattern, found)
    if verdict is None:
        raise UnknownError(TOO_LONG)
    return verdict


def holds(left: Value, op: str, right: Value) -> bool:
    """Whether a comparison with one value holds. Raises :exc:`UnknownError` if a text is too
    long."""
    if op == "matches":
        return matches(left, str(right))
    if op == "contains":
        return contains(left, right)
    return compare(left, op, right)


def truthy(value: Value) -> bool:
    """Whether a value stands for true: true, the text ``true``, or a number other than 0."""
    if isinstance(value, str):
        return value == "true"
    return isinstance(value, int | Fraction | float) and value == value and value != 0


def calculate(left: Value, op: str, right: Value) -> Number | None:
    """``left op right`` for ``+ - * /``; None if a part is not a number, or for division by 0."""
    one, other = number(left), number(right)
    if one is None or other is None:
        return None
    match op:
        case "+":
            return one + other
        case "-":
            return one - other
        case "*":
            return one * other
        case _:
            return None if other == 0 else Fraction(one) / other


def aggregate(kind: str, values: Iterable[Value]) -> Value:
    """``sum``, ``avg``, ``min``, ``max`` or ``distinct`` of values."""
    if kind == "distinct":
        return len({text for value in values if (text := key(value)) is not None})
    numbers = [found for value in values if (found := number(value)) is not None]
    match kind:
        case "sum":
            return sum(numbers)
        case "avg":
            return calculate(sum(numbers), "/", len(numbers))
        case "min":
            return min(numbers, default=None)
        case _:
            return max(numbers, default=None)
