"""Comparison of attribute values with the literals of a rule (rules.md, "Meaning").

How values read:

* As a *number* read integers, floats and texts such as ``"1500"`` or ``"-0.5e3"``; a bool does
  not. Where attribute and literal both read as numbers they compare as numbers, exactly, an
  integer also with a float.
* As *text* read strings, bools (``true``, ``false``) and numbers (:func:`number_text`). What
  does not compare as numbers compares as text, by Unicode code point.
* Bytes, arrays and key-value lists read as neither: every comparison with them is false, also
  ``!=``. Only ``contains`` on an array is more: membership.
* A missing attribute (None) makes ``!=`` true and everything else false.
* NaN equals nothing: ``!=`` is true, ``==``, ``in`` and the orderings are false.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import re2

from betrace.service.rules.syntax import Literal, Number

AttributeValue = str | bool | int | float | bytes | list[Any] | dict[str, Any] | None
"""An attribute as OTLP's AnyValue has it; None is a missing one."""

MAX_NUMBER_CHARS = 4000
"""Longer text does not read as a number: the cost of reading integers grows with the square of
their length, and Python itself refuses more than 4300 digits."""

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII)
_INFINITY = float("inf")


def read_number(text: str) -> Number | None:
    """The number that ``text`` is: optional sign, digits, optional fraction, optional exponent.

    An int when there is neither fraction nor exponent, else the nearest float. None for
    everything else: spaces, underscores, ``inf``, ``nan``, hexadecimal, other scripts' digits,
    what overflows a float, and more than :data:`MAX_NUMBER_CHARS` characters.
    """
    # Most strings are no numbers; their first character tells without the pattern.
    if not text or text[0] not in "0123456789+-" or len(text) > MAX_NUMBER_CHARS:
        return None
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    if found.group(1) is None and found.group(2) is None:
        return int(text)
    number = float(text)
    return None if number in (_INFINITY, -_INFINITY) else number


def number_text(number: Number) -> str:
    """The text of a number, in plain decimal notation without trailing zeros: ``1000``, ``0.5``.

    A float with an integral value reads as that integer with all its digits; another one as the
    shortest decimal that reads back as the same float, never with an exponent. The rest is named
    as in OTLP JSON: ``NaN``, ``Infinity``, ``-Infinity``.
    """
    if isinstance(number, int):
        return str(number)
    if number.is_integer():
        return str(int(number))
    if number != number:
        return "NaN"
    if number in (_INFINITY, -_INFINITY):
        return "Infinity" if number > 0 else "-Infinity"
    return format(Decimal(repr(number)), "f")


def value_text(value: AttributeValue) -> str | None:
    """The text form of a string, bool or number; None for what has none."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return number_text(value)
    return None


def compile_pattern(pattern: str) -> Any:
    """The RE2 program of ``pattern``, which searches UTF-8 bytes.

    Raises :exc:`re2.error` with RE2's explanation for a pattern that does not compile.
    """
    return _compile(pattern.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=128)  # each holds at most RE2's default of 8 MiB, usually a thousandth
def _compile(pattern: bytes) -> Any:
    options = re2.Options()
    options.never_capture = True
    options.log_errors = False
    return re2.compile(pattern, options)


def compare(value: AttributeValue, op: str, literals: Sequence[Literal]) -> bool:
    """Whether ``value op literal`` holds; ``op`` as in
    :class:`betrace.service.rules.syntax.Compare`.

    Only ``in`` looks at more than the first literal. Never raises on odd data.
    """
    if value is None:
        return op == "!="
    if isinstance(value, list):
        return op == "contains" and any(_equal(item, literals[0]) for item in value)
    text = value_text(value)
    if text is None:
        return False
    match op:
        case "in":
            return any(_equal(value, literal) for literal in literals)
        case "contains":
            return literals[0].text in text
        case "matches":
            program = compile_pattern(literals[0].text)
            return program.search(text.encode("utf-8", "surrogatepass")) is not None
        case "==":
            return _equal(value, literals[0])
        case "!=":
            return not _equal(value, literals[0])
        case _:
            return _ordered(value, op, literals[0])


def truthy(value: AttributeValue) -> bool:
    """Whether a bare attribute holds: ``true``, the string ``"true"``, or a number other than 0.

    A string of digits is a string here, and not true.
    """
    if isinstance(value, str):
        return value == "true"
    return isinstance(value, int | float) and value != 0


def _number(value: AttributeValue) -> Number | None:
    """The number that ``value`` reads as; None for what reads as none."""
    if isinstance(value, str):
        return read_number(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return None


def _equal(value: AttributeValue, literal: Literal) -> bool:
    if value != value:  # NaN
        return False
    if literal.number is not None:
        number = _number(value)
        if number is not None:
            return number == literal.number
    return value_text(value) == literal.text


def _ordered(value: AttributeValue, op: str, literal: Literal) -> bool:
    if value != value:  # NaN
        return False
    number = _number(value) if literal.number is not None else None
    left: Any
    right: Any
    if number is not None:
        left, right = number, literal.number
    else:
        left, right = value_text(value), literal.text
    match op:
        case "<":
            return bool(left < right)
        case "<=":
            return bool(left <= right)
        case ">":
            return bool(left > right)
        case ">=":
            return bool(left >= right)
        case _:
            raise ValueError(f"unknown comparison {op!r}")
