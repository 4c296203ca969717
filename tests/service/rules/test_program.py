"""Literals as ranges of integers and doubles agree with Python's exact comparison."""

from __future__ import annotations

import math
import operator
import struct
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from betrace.service.rules.program import (
    EMPTY,
    EQ,
    GE,
    GT,
    INT_MAX,
    INT_MIN,
    L_KEY_OFF,
    L_NUMERIC,
    L_OP,
    L_TEXT_LEN,
    LE,
    LT,
    NE,
    ProgramBuilder,
    float_range,
    int_range,
    ordered_bits,
)
from betrace.service.rules.syntax import And, Attribute, Compare, Literal, Not, Or, Scope, Truthy

OPERATORS = {
    EQ: operator.eq,
    LT: operator.lt,
    LE: operator.le,
    GT: operator.gt,
    GE: operator.ge,
}
EDGES = (0, 1, 2**52, 2**53, 2**54, 2**62, 2**63, 2**64, 2**70, 10**30, 10**308, 10**400)
HUGE_FLOATS = (0.0, 0.5, 5e-324, 2.0**53, 2.0**63, 2.0**64, 1e300, 1.7976931348623157e308)


def near(number: int) -> list[int]:
    return [sign * number + delta for sign in (1, -1) for delta in (-1, 0, 1)]


INTS = st.one_of(
    st.sampled_from([x for edge in EDGES for x in near(edge)]),
    st.integers(-(2**66), 2**66),
)
DOUBLES = st.one_of(
    st.sampled_from([sign * x for x in HUGE_FLOATS for sign in (1, -1)]),
    st.sampled_from([math.inf, -math.inf, math.nextafter(0, 1), math.nextafter(2.0**53, 0)]),
    st.floats(allow_nan=False),
    INTS.filter(lambda n: abs(n) < 10**308).map(float),
)
FINITE = DOUBLES.filter(math.isfinite)
DECIMALS = FINITE.map(lambda d: Fraction(Decimal(repr(d))))
CLOSE = st.builds(lambda d, e: d + Fraction(e, 10**340), DECIMALS, st.sampled_from([1, -1]))
MIDPOINTS = FINITE.filter(lambda d: abs(d) < 1e308).map(
    lambda d: (Fraction(d) + Fraction(math.nextafter(d, math.inf))) / 2
)
LITERALS = INTS | DECIMALS | CLOSE | MIDPOINTS


def decimal(value: float) -> Fraction:
    return Fraction(Decimal(repr(value)))


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[float, int | Fraction]:
    """A literal, and a double equal or close to it."""
    literal = draw(LITERALS)
    try:
        value = float(literal)
    except OverflowError:
        value = math.inf if literal > 0 else -math.inf
    for _ in range(draw(st.integers(0, 2))):
        value = math.nextafter(value, draw(st.sampled_from([math.inf, -math.inf])))
    return value, literal


@given(st.integers(INT_MIN, INT_MAX) | INTS, LITERALS, st.sampled_from(sorted(OPERATORS)))
@example(2**53 + 1, 2**53, GT)
@example(2**53 + 1, 2**53, EQ)
@example(INT_MAX, 2**63, LT)
@example(INT_MAX, 2**63, EQ)
@example(INT_MIN, -(2**63), EQ)
@example(0, Fraction("5e-324"), LT)
def test_an_integer_is_in_the_range_if_the_comparison_holds(value, literal, op):
    value = max(INT_MIN, min(INT_MAX, value))
    lo, hi = int_range(op, literal)
    assert INT_MIN <= lo <= INT_MAX
    assert INT_MIN <= hi <= INT_MAX
    assert (lo <= value <= hi) is OPERATORS[op](value, literal)


@given(INTS, st.sampled_from([0, 1, -1]), st.sampled_from(sorted(OPERATORS)))
def test_integers_close_to_the_literal(literal, delta, op):
    value = max(INT_MIN, min(INT_MAX, literal + delta))
    lo, hi = int_range(op, literal)
    assert (lo <= value <= hi) is OPERATORS[op](value, literal)


@given(neighbours() | st.tuples(DOUBLES, LITERALS), st.sampled_from(sorted(OPERATORS)))
@example((math.inf, 10**400), LT)
@example((math.inf, 10**400), GT)
@example((-math.inf, -(10**400)), LE)
@example((1.7976931348623157e308, 10**400), LT)
@example((2.0**53, 2**53 + 1), LT)
@example((-0.0, 0), GE)
@example((5e-324, 0), LE)
def test_a_double_is_in_the_range_if_the_comparison_holds(pair, op):
    value, literal = pair
    lo, hi = float_range(op, literal)
    expected = math.isfinite(value) and OPERATORS[op](decimal(value), literal)
    assert (lo <= ordered_bits(value) <= hi) is expected


@pytest.mark.parametrize("op", sorted(OPERATORS))
@pytest.mark.parametrize("literal", [0, Fraction(-3, 2), 10**400, -(10**400), 10**308])
def test_nan_is_in_no_range(op, literal):
    lo, hi = float_range(op, literal)
    for bits in (0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000001):
        nan = struct.unpack("<d", struct.pack("<Q", bits))[0]
        assert not lo <= ordered_bits(nan) <= hi


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_ordered_bits_have_the_order_of_the_doubles(a, b):
    assert (ordered_bits(a) < ordered_bits(b)) is (a < b)
    assert (ordered_bits(a) == ordered_bits(b)) is (a == b)


def test_an_empty_range_contains_nothing():
    assert int_range(EQ, Fraction(1, 2)) == EMPTY
    assert float_range(EQ, 2**53 + 1) == EMPTY
    assert EMPTY[0] > EMPTY[1]


# Programs

X = Attribute(Scope.ANY, "x")


def equals(text: str) -> Compare:
    return Compare(X, "==", (Literal(text, None),))


def test_equal_leaves_and_texts_are_shared():
    builder = ProgramBuilder()
    first = builder.add(And((equals("x"), Not(equals("x")))))
    second = builder.add(Or((equals("x"), Truthy(X))))
    code, leaves, text = builder.arrays()
    assert first == 0
    assert second > first
    assert len(leaves) == 2
    assert leaves[0, L_KEY_OFF] == leaves[1, L_KEY_OFF]
    assert text.tobytes() == b"x"
    assert len(code) == second + 4


def test_in_is_equality_with_any_member():
    builder = ProgramBuilder()
    builder.add(Compare(X, "in", (Literal("a", None), Literal("b", None), Literal("a", None))))
    _, leaves, _ = builder.arrays()
    assert leaves[:, L_OP].tolist() == [EQ, EQ]


def test_an_ordering_with_text_has_no_range():
    builder = ProgramBuilder()
    builder.add(Compare(X, "!=", (Literal("abc", None),)))
    _, leaves, _ = builder.arrays()
    assert leaves[0, L_OP] == NE
    assert leaves[0, L_NUMERIC] == 0
    assert leaves[0, L_TEXT_LEN] == 3


def test_without_predicates_there_are_arrays_for_the_kernel():
    code, leaves, text = ProgramBuilder().arrays()
    assert code.shape == (0, 2)
    assert leaves.shape[0] == 0
    assert len(text) == 1


def test_a_condition_is_not_a_predicate():
    with pytest.raises(TypeError, match="not a predicate"):
        ProgramBuilder().add("x")  # type: ignore[arg-type]
