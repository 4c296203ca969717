"""Compares attribute values with the literals of a rule.

* Integers, floats and texts such as ``"1500"`` or ``"-0.5e3"`` read as *numbers*; bools do not. If
  attribute and literal both read as numbers, they compare as numbers, exactly, including an integer
  with a float.
* Strings, bools (``true``, ``false``) and numbers (:func:`number_text`) read as *text*. Values that
  do not compare as numbers compare as text, by Unicode code point.
* Bytes, arrays and key-value lists read as neither: every comparison with them is false, including
  ``!=``. The exception is ``contains`` on an array, which tests membership.
* For a missing attribute (None), ``!=`` is true and everything else false.
* NaN is not equal to anything: ``!=`` is true; ``==``, ``in`` and the orderings are false.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import re2

from betrace.service.rules.syntax import Literal, Number

AttributeValue = str | bool | int | float | bytes | list[Any] | dict[str, Any] | None
"""An attribute's value, one of OTLP's AnyValue; None if the attribute is missing."""

MAX_NUMBER_CHARS = 4000
"""Longer text does not read as a number, because the cost of reading an integer grows with the
square of its length, and Python refuses more than 4300 digits."""

# Of RE2, for one pattern: program and cached states. Patterns whose states do not fit are searched
# state by state, which more memory does not make faster.
_PATTERN_MEMORY = 256 * 1024
_LARGE_PATTERN_MEMORY = 8 * 1024 * 1024

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII)
_INFINITY = float("inf")


def read_number(text: str) -> Number | None:
    """Read a number: optional sign, digits, optional fraction, optional exponent.

    An int if there is neither fraction nor exponent, else the nearest float. None for everything
    else: spaces, underscores, ``inf``, ``nan``, hexadecimal, digits of other scripts, values that
    overflow a float, and more than :data:`MAX_NUMBER_CHARS` characters.
    """
    # Most strings are not numbers; the first character shows that without the pattern.
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

    A float with an integral value is written as that integer, with all its digits; any other float
    as the shortest decimal that reads back as the same float, without an exponent. The remaining
    values are written as in OTLP JSON: ``NaN``, ``Infinity``, ``-Infinity``.
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
    """The text of a string, bool or number; None for other values."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return number_text(value)
    return None


def compile_pattern(pattern: str) -> Any:
    """The RE2 program of ``pattern``, which searches UTF-8 bytes.

    Raises :exc:`re2.error` with RE2's explanation if the pattern does not compile.
    """
    return _compile(pattern.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=2048)
def _compile(pattern: bytes) -> Any:
    options = re2.Options()
    options.never_capture = True
    options.log_errors = False
    options.max_mem = _PATTERN_MEMORY
    try:
        return re2.compile(pattern, options)
    except re2.error:  # perhaps only because it is large
        options.max_mem = _LARGE_PATTERN_MEMORY
        return re2.compile(pattern, options)


def compare(value: AttributeValue, op: str, literals: Sequence[Literal]) -> bool:
    """Whether ``value op literal`` holds; ``op`` as in
    :class:`betrace.service.rules.syntax.Compare`.

    Only ``in`` uses more than the first literal. Never raises, whatever the value.
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

    A string of digits counts as a string, so it does not hold.
    """
    if isinstance(value, str):
        return value == "true"
    return isinstance(value, int | float) and value != 0


def _number(value: AttributeValue) -> Number | None:
    """The number that ``value`` reads as, or None."""
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


# Exact values, with which relational rules compare and calculate.

Exact = int | Fraction

_EXACT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?", re.ASCII)
MAX_EXPONENT = 400


def exact_number(text: str) -> Exact | None:
    """The exact number that a text is written as, also with ``+``, ``.5`` or ``5.``; None for other
    text, exponents beyond ±:data:`MAX_EXPONENT`, and more than :data:`MAX_NUMBER_CHARS` characters.
    """
    if not text or text[0] not in "0123456789+-." or len(text) > MAX_NUMBER_CHARS:
        return None
    found = _EXACT.fullmatch(text)
    if found is None:
        return None
    exponent = found.group(1)
    if exponent is None and "." not in text:
        return int(text)
    if exponent is not None and abs(int(exponent)) > MAX_EXPONENT:
        return None
    return simple(Fraction(Decimal(text)))


def simple(number: Exact) -> Exact:
    """The number as an int if it is one."""
    return number.numerator if number.denominator == 1 else number


def exact_float(number: float) -> Exact | None:
    """The shortest decimal that reads back as the double; None for NaN and infinities."""
    return simple(Fraction(Decimal(repr(number)))) if math.isfinite(number) else None


def exact_text(number: Exact) -> str:
    """The decimal without trailing zeros. A number that has none, such as 1/3, as a fraction."""
    if number.denominator == 1:
        return str(number.numerator)
    rest, twos, fives = number.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{number.numerator}/{number.denominator}"
    places = max(twos, fives)
    digits = str(abs(number.numerator) * 10**places // number.denominator).zfill(places + 1)
    return f"{'-' * (number < 0)}{digits[:-places]}.{digits[-places:]}"
