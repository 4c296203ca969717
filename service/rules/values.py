"""Numbers, texts and patterns in attributes and rules.

Numbers are exact: an integer, or a fraction whose value is the decimal that was written. A double
is the shortest decimal that reads back as it.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import re2

from betrace.service.rules.syntax import Number

AttributeValue = str | bool | int | float | bytes | list[Any] | dict[str, Any] | None
"""An attribute's value, one of OTLP's AnyValue; None if the attribute is missing."""

MAX_EXPONENT = 400
MAX_NUMBER_CHARS = 4000
"""Longer text does not read as a number, because the cost of reading an integer grows with the
square of its length, and Python refuses more than 4300 digits."""

# Of RE2, for one pattern: program and cached states. Patterns whose states do not fit are searched
# state by state, which more memory does not make faster.
_PATTERN_MEMORY = 256 * 1024
_LARGE_PATTERN_MEMORY = 8 * 1024 * 1024


def value_text(value: AttributeValue) -> str | None:
    """The text of a string, bool or number; None for other values."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return number_text(value)
    return None


def number_text(number: Number | float) -> str:
    """The text of a number, in plain decimal notation without trailing zeros: ``1000``, ``0.5``.
    A double that is not a number is written as in OTLP JSON: ``NaN``, ``Infinity``, ``-Infinity``.
    """
    if isinstance(number, float):
        exact = exact_float(number)
        if exact is None:
            return "NaN" if number != number else "Infinity" if number > 0 else "-Infinity"
        return exact_text(exact)
    return exact_text(number)


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


_EXACT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?", re.ASCII)


def exact_number(text: str) -> Number | None:
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


def simple(number: Number) -> Number:
    """The number as an int if it is one."""
    return number.numerator if number.denominator == 1 else number


def exact_float(number: float) -> Number | None:
    """The shortest decimal that reads back as the double; None for NaN and infinities."""
    return simple(Fraction(Decimal(repr(number)))) if math.isfinite(number) else None


def exact_text(number: Number) -> str:
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
