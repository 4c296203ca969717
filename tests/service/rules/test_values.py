"""Comparisons of values: examples, and agreement with the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.rules import exact
from betrace.service.rules.exact import compare_literals, matches, truthy
from betrace.service.rules.syntax import Literal
from betrace.service.rules.values import MAX_NUMBER_CHARS, exact_number, number_text
from tests.support import comparison_oracle, oracle, strategies

NAN = float("nan")
INF = float("inf")


def literal(value: Any) -> Literal:
    if isinstance(value, str):
        return strategies.literal_of_text(value)
    return strategies.literal_of_number(value)


def compare(value: Any, op: str, literals: Sequence[Literal]) -> bool:
    if op == "matches":
        return matches(exact.normal(value), literals[0].text)
    return compare_literals(value, op, literals)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("-0", 0),
        ("+7", 7),
        ("007", 7),
        ("9007199254740993", 2**53 + 1),
        ("1.0", 1),
        ("-2.50", Fraction(-5, 2)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1e3", 1000),
        ("1E+3", 1000),
        ("1.5e-3", Fraction(3, 2000)),
        ("1e400", 10**400),
        ("0.10000000000000000001", Fraction("0.10000000000000000001")),
        ("9" * MAX_NUMBER_CHARS, 10**MAX_NUMBER_CHARS - 1),
    ],
)
def test_numbers(text: str, number: float) -> None:
    assert exact_number(text) == number
    assert type(exact_number(text)) is type(number)


NOT_NUMBERS = ["", "-", "+", ".", "1e", "1e+", "e3", " 1", "1 ", "1\n", "1_000", "1,000", "0x10"]
NOT_NUMBERS += ["inf", "-inf", "nan", "Infinity", "١", "1²", "--1", "1e999", "-1e401", "1e-401"]
NOT_NUMBERS += ["true", "1s", "9" * (MAX_NUMBER_CHARS + 1)]


@pytest.mark.parametrize("text", NOT_NUMBERS, ids=lambda text: ascii(text[:20]))
def test_texts_that_are_not_numbers(text: str) -> None:
    assert exact_number(text) is None


@given(strategies.texts() | st.text("0123456789.eE+-", max_size=12))
def test_reading_numbers_agrees_with_the_oracle(text: str) -> None:
    assert exact_number(text) == comparison_oracle.as_number(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1000, "1000"),
        (1000.0, "1000"),
        (0.5, "0.5"),
        (-0.0, "0"),
        (1e-7, "0.0000001"),
        (1e22, "1" + "0" * 22),
        (2**64, "18446744073709551616"),
        (0.1, "0.1"),
        (123456.789, "123456.789"),
        (NAN, "NaN"),
        (INF, "Infinity"),
        (-INF, "-Infinity"),
    ],
)
def test_text_of_numbers(number: float, text: str) -> None:
    assert number_text(number) == text


@given(st.floats() | st.integers(-(2**63), 2**63))
def test_text_of_numbers_agrees_with_the_oracle(number: float) -> None:
    text = number_text(number)
    exact_one = comparison_oracle.exact(number)
    assert text == comparison_oracle.as_text(exact_one)
    if math.isfinite(number):
        assert exact_number(text) == exact_one


@pytest.mark.parametrize(
    ("value", "op", "right", "holds"),
    [
        # numbers, exactly
        ("1500", ">", 1000, True),
        ("1500", "==", "1500.0", False),  # two texts
        ("1500.0", "==", 1500, True),
        (1500, "==", "1.5e3", True),
        ("abc", ">", 1000, False),  # a text is neither more nor less than a number
        ("", "<", 1000, False),
        (2**53 + 1, "==", 2**53, False),
        (2**53 + 1, "==", 2.0**53, False),
        (2**53 + 1, ">", float(2**53), True),
        ("9007199254740993", ">", 2**53, True),
        (9, "<", 10, True),
        ("9", "<", "10", False),  # two texts
        ("9", "<", 10, True),
        (".5", "==", 0.5, True),
        ("5.", "==", 5, True),
        (0.1, "==", Fraction("0.1"), True),
        (0.1, "<", Fraction("0.10000000000000000001"), True),
        (0.1, "==", "0.1", True),
        (-0.0, "==", 0, True),
        (INF, ">", 10**300, False),
        (INF, "!=", 10**300, True),
        # text, by code point
        ("9", "<", "10a", False),
        ("b", ">", "abc", True),
        ("\uffff", "<", "\U00010000", True),
        (INF, "==", "Infinity", False),
        (1000.0, "==", "1000x", False),
        (1000.0, "contains", "00", True),
        (1000.0, "matches", "^1000$", True),
        # bools are text
        (True, "==", "true", True),
        (True, "!=", "true", False),
        (True, "==", 1, False),
        (False, "<", "true", False),
        (True, ">", 5, False),
        ("true", "==", "true", True),
        (True, "contains", "ru", True),
        (False, "matches", "^f", True),
        # missing
        (None, "!=", "x", True),
        (None, "==", "x", False),
        (None, "<", "x", False),
        (None, "contains", "", False),
        (None, "matches", "", False),
        (None, "in", "x", False),
        # NaN is not equal to anything
        (NAN, "==", "NaN", False),
        (NAN, "in", "NaN", False),
        (NAN, "!=", 1, True),
        (NAN, "!=", "NaN", True),
        (NAN, "<", 1, False),
        (NAN, ">=", "A", False),
        (NAN, "contains", "aN", True),
        # values that are neither numbers nor text
        (b"x", "==", "x", False),
        (b"x", "!=", "x", True),
        (b"x", "contains", "x", False),
        ({"x": 1}, "!=", "x", True),
        ({"x": 1}, "contains", "x", False),
        (["x"], "==", "x", False),
        (["x"], "!=", "y", True),
        (["x"], "matches", "x", False),
        (["x"], "in", "x", False),
        # membership
        (["x", 2], "contains", "2.0", True),
        (["x", "2"], "contains", 2, True),
        (["xyz"], "contains", "y", False),
        ([True], "contains", "true", True),
        ([True], "contains", 1, False),
        ([NAN], "contains", "NaN", False),
        ([None, [1], b"1", {}], "contains", 1, False),
        ([], "contains", "", False),
        # search
        ("a\nb", "matches", "^b", False),
        ("a\nb", "matches", "(?m)^b", True),
        ("a\0b", "matches", r"\x00b$", True),
        ("日本", "matches", "^..$", True),
        ("\ud800", "matches", "x", False),
        ("abc", "contains", "", True),
    ],
)
def test_comparisons(value: Any, op: str, right: Any, holds: bool) -> None:
    assert compare(value, op, (literal(right),)) is holds


def test_in_is_equality_with_any_member() -> None:
    members = (literal("USD"), literal(5), literal("true"))
    assert compare("USD", "in", members)
    assert compare("5.0", "in", members)
    assert compare(True, "in", members)
    assert not compare("usd", "in", members)
    assert not compare(["USD"], "in", members)


OPS = st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "contains", "in"])


@given(strategies.values(), OPS, st.lists(strategies.literals(), min_size=1, max_size=3))
def test_comparison_agrees_with_the_oracle(value: Any, op: str, literals: list[Literal]) -> None:
    assert compare(value, op, literals) is oracle.compares(value, op, literals)


@given(strategies.values(), st.sampled_from(strategies.PATTERNS))
def test_search_agrees_with_the_oracle(value: Any, pattern: str) -> None:
    literals = [literal(pattern)]
    assert compare(value, "matches", literals) is oracle.compares(value, "matches", literals)


@pytest.mark.parametrize("value", [True, "true", 1, -0.5, INF, 2**70])
def test_values_that_hold(value: Any) -> None:
    assert truthy(value)


@pytest.mark.parametrize(
    "value",
    [False, "false", "TRUE", "1", "", NAN, 0, 0.0, -0.0, None, b"true", [True], {"true": 1}],
)
def test_values_that_do_not_hold(value: Any) -> None:
    assert not truthy(value)


@given(strategies.values())
def test_truth_agrees_with_the_oracle(value: Any) -> None:
    assert truthy(value) is oracle.is_true(value)
