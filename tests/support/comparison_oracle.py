"""A naive reading of how rules compare values, with exact fractions and code points.

It shares nothing with the product. A float here is NaN or infinite, because :func:`exact` makes
decimals of the others.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import re2


def is_number(found: Any) -> bool:
    return isinstance(found, int | Fraction) and not isinstance(found, bool)


def exact(found: Any) -> Any:
    """An attribute as it is compared: doubles as the decimals they are written as."""
    if isinstance(found, float) and math.isfinite(found):
        return Fraction(Decimal(repr(found)))
    return found


def as_number(found: Any) -> Fraction | None:
    if is_number(found):
        return Fraction(found)
    if isinstance(found, str):
        match = re2.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE]([+-]?[0-9]+))?", found)
        if match and len(found) <= 4000 and abs(int(match.group(3) or 0)) <= 400:
            return Fraction(Decimal(found))
    return None


def as_text(found: Any) -> str | None:
    if isinstance(found, bool):
        return str(found).lower()
    if isinstance(found, str):
        return found
    if isinstance(found, float):
        return "NaN" if math.isnan(found) else "Infinity" if found > 0 else "-Infinity"
    if not is_number(found):
        return None
    rest = Fraction(found).denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return str(Fraction(found))  # no decimal, such as 1/3
    whole, places = abs(Fraction(found)), 0
    while whole.denominator != 1:
        whole, places = whole * 10, places + 1
    digits = str(whole.numerator).zfill(places + 1)
    text = digits if not places else f"{digits[:-places]}.{digits[-places:]}"
    return f"-{text}" if found < 0 else text


def alike(one: Any, other: Any) -> bool:
    return as_text(one) is not None and as_text(one) == as_text(other)


def relates(left: Any, op: str, right: Any) -> bool:
    if op == "contains":
        if isinstance(left, list):
            return any(relates(exact(item), "==", right) for item in left)
        texts = as_text(left), as_text(right)
        return None not in texts and str(texts[0]).find(str(texts[1])) >= 0
    if any(as_text(each) is None or isinstance(each, float) for each in (left, right)):
        return op == "!="
    one, other = as_number(left), as_number(right)
    if (is_number(left) or is_number(right)) and one is not None and other is not None:
        order = (one > other) - (one < other)
    elif op in ("==", "!="):
        order = as_text(left) != as_text(right)
    elif isinstance(left, str) and isinstance(right, str):
        points = [[ord(c) for c in text] for text in (left, right)]
        order = (points[0] > points[1]) - (points[0] < points[1])
    else:
        return False
    return {
        "==": order == 0,
        "!=": order != 0,
        "<": order < 0,
        "<=": order <= 0,
        ">": order > 0,
        ">=": order >= 0,
    }[op]
