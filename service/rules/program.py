"""Compiles predicates to programs for the kernel in :mod:`betrace.service.rules.match`.

A predicate becomes instructions of an accumulator machine: a leaf sets the accumulator to true or
false, and ``JUMP_FALSE`` and ``JUMP_TRUE`` implement the short circuits of ``and`` and ``or``. A
leaf's literal is converted to a form that the kernel can compare without arithmetic: the range of
64-bit integers and the range of doubles that satisfy it, its text, and its outcome for ``true``,
``false`` and a missing attribute. All of these are computed with the Python comparisons of
:mod:`betrace.service.rules.exact`, so that there is only one definition of their meaning.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import numpy as np

from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.rules.exact import compare_literals, matches, truthy
from betrace.service.rules.syntax import (
    FIELDS,
    KINDS,
    STATUSES,
    And,
    Attribute,
    Compare,
    Literal,
    Node,
    Not,
    Number,
    Or,
    Predicate,
    Scope,
    Truthy,
)
from betrace.service.rules.values import exact_float, exact_number

# Instructions: rows (op, argument).
LEAF, NEGATE, JUMP_FALSE, JUMP_TRUE, END = range(5)

# Leaf operations.
EQ, NE, LT, LE, GT, GE, MATCHES, CONTAINS, TRUTHY = range(9)
_OPS = {"==": EQ, "!=": NE, "<": LT, "<=": LE, ">": GT, ">=": GE}

# What a leaf compares: an attribute of the span or its resource, of the resource alone, or, with
# FIELD + n, the span's field syntax.FIELDS[n].
ANY, RESOURCE_ONLY, FIELD = range(3)

# Columns of a leaf row.
(
    L_SCOPE,
    L_KEY_OFF,  # key in the text arena
    L_KEY_LEN,
    L_OP,
    L_NUMERIC,  # whether the literal is a number
    L_INT_LO,  # integers that satisfy the comparison (== for !=), an inclusive range
    L_INT_HI,
    L_FLOAT_LO,  # doubles that do, as ordered_bits, an inclusive range
    L_FLOAT_HI,
    L_TEXT_OFF,  # the literal's text in the text arena
    L_TEXT_LEN,
    L_OUTCOMES,  # bit set: IF_FALSE, IF_TRUE, IF_MISSING; for span:kind and span:status, bit n
) = range(12)  #            is the outcome for the n-th kind or status
LEAF_COLUMNS = 12

IF_FALSE, IF_TRUE, IF_MISSING = 1, 2, 4

# L_NUMERIC: the literal is text, a number, or text that reads as a number. Only numbers compare
# with numeric text as numbers; two texts compare as texts.
NOT_NUMERIC, NUMBER, NUMERIC_TEXT = range(3)

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
_LARGEST = sys.float_info.max
EMPTY = (1, 0)


def ordered_bits(value: float) -> int:
    """The bits of a double as an int64 with the same order as the doubles; -0.0 and 0.0 are equal,
    and a NaN is outside ``ordered_bits(-inf) .. ordered_bits(inf)``."""
    bits = int(np.float64(value).view(np.int64))
    return bits if bits >= 0 else INT_MIN - bits


def int_range(op: int, number: Number) -> tuple[int, int]:
    """The inclusive range of int64 values x with ``x op number``."""
    low, high = math.floor(number), math.ceil(number)
    lo, hi = {
        EQ: (high, low),
        LT: (INT_MIN, high - 1),
        LE: (INT_MIN, low),
        GT: (low + 1, INT_MAX),
        GE: (high, INT_MAX),
    }[op]
    lo, hi = max(lo, INT_MIN), min(hi, INT_MAX)
    return (lo, hi) if lo <= hi else EMPTY


def float_range(op: int, number: Number) -> tuple[int, int]:
    """The inclusive range of finite doubles d with ``d op number``, as ``ordered_bits``. A double
    is the shortest decimal that reads back as it, so doubles have the order of their decimals."""
    nearest = _nearest(number)
    exact = exact_float(nearest)
    assert exact is not None
    if op == EQ:
        bits = ordered_bits(nearest)
        return (bits, bits) if exact == number else EMPTY
    lo, hi = -_LARGEST, _LARGEST
    if op in (LT, LE):
        if exact > number or (op == LT and exact == number):
            if nearest == -_LARGEST:
                return EMPTY
            hi = math.nextafter(nearest, -math.inf)
        else:
            hi = nearest
    elif exact < number or (op == GT and exact == number):
        if nearest == _LARGEST:
            return EMPTY
        lo = math.nextafter(nearest, math.inf)
    else:
        lo = nearest
    return ordered_bits(lo), ordered_bits(hi)


def _nearest(number: Number) -> float:
    """The finite double that is closest to a number."""
    try:
        return max(-_LARGEST, min(float(number), _LARGEST))
    except OverflowError:
        return _LARGEST if number > 0 else -_LARGEST


@dataclass(slots=True)
class ProgramBuilder:
    """Collects the programs of many predicates, which share equal leaves."""

    code: list[tuple[int, int]] = field(default_factory=list)
    leaves: list[list[int]] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    _known: dict[tuple[Attribute, str, Literal | None], int] = field(default_factory=dict)
    _texts: dict[bytes, int] = field(default_factory=dict)

    def add(self, predicate: Predicate) -> int:
        """Append the program of ``predicate``; returns the index of its first instruction."""
        start = len(self.code)
        self._emit(predicate)
        self.code.append((END, 0))
        return start

    def arrays(self) -> tuple[Rows, Rows, Bytes]:
        """``(code, leaves, text)`` as arrays for the kernel."""
        code = np.array(self.code, np.int64).reshape(-1, 2)
        leaves = np.array(self.leaves, np.int64).reshape(-1, LEAF_COLUMNS)
        return code, leaves, np.frombuffer(bytes(self.text) or b"\0", np.uint8)

    def intern(self, data: bytes) -> int:
        """The offset of ``data`` in the text arena."""
        if data not in self._texts:
            self._texts[data] = len(self.text)
            self.text += data
        return self._texts[data]

    def _emit(self, node: Node) -> None:
        match node:
            case And(items) | Or(items):
                jump = JUMP_FALSE if isinstance(node, And) else JUMP_TRUE
                self._emit_chain(items, jump)
            case Not(item):
                self._emit(item)
                self.code.append((NEGATE, 0))
            case Compare(attribute, "in", literals):
                members = tuple(Compare(attribute, "==", (literal,)) for literal in literals)
                self._emit_chain(members, JUMP_TRUE)
            case Compare(attribute, op, (literal,)):
                self.code.append((LEAF, self._leaf(attribute, op, literal)))
            case Truthy(attribute):
                self.code.append((LEAF, self._leaf(attribute, "truthy", None)))
            case _:
                raise TypeError(f"not a predicate: {node!r}")

    def _emit_chain(self, items: tuple[Node, ...], jump: int) -> None:
        holes = []
        for i, item in enumerate(items):
            self._emit(item)
            if i < len(items) - 1:
                holes.append(len(self.code))
                self.code.append((jump, 0))
        for hole in holes:
            self.code[hole] = (jump, len(self.code))

    def _leaf(self, attribute: Attribute, op: str, literal: Literal | None) -> int:
        known = (attribute, op, literal)
        if known not in self._known:
            self._known[known] = len(self.leaves)
            self.leaves.append(self._leaf_row(attribute, op, literal))
        return self._known[known]

    def _leaf_row(self, attribute: Attribute, op: str, literal: Literal | None) -> list[int]:
        row = [0] * LEAF_COLUMNS
        key = attribute.name.encode("utf-8", "surrogatepass")
        if attribute.scope is Scope.FIELD:
            row[L_SCOPE] = FIELD + FIELDS.index(attribute.name)
        else:
            row[L_SCOPE] = ANY if attribute.scope is Scope.ANY else RESOURCE_ONLY
            row[L_KEY_OFF], row[L_KEY_LEN] = self.intern(key), len(key)

        def outcome(value: str | bool | None) -> bool:
            if literal is None:
                return truthy(value)
            if op == "matches":
                return matches(value, literal.text)
            return compare_literals(value, op, (literal,))

        if literal is None:
            row[L_OP] = TRUTHY
            numeric: Number | None = None
        else:
            row[L_OP] = _OPS.get(op, MATCHES if op == "matches" else CONTAINS)
            text = literal.text.encode("utf-8", "surrogatepass")
            row[L_TEXT_OFF], row[L_TEXT_LEN] = self.intern(text), len(text)
            numeric = exact_number(literal.text) if literal.number is None else literal.number
        if row[L_SCOPE] == FIELD + FIELDS.index("kind"):
            row[L_OUTCOMES] = sum(outcome(kind) << n for n, kind in enumerate(KINDS))
            return row
        if row[L_SCOPE] == FIELD + FIELDS.index("status"):
            row[L_OUTCOMES] = sum(outcome(status) << n for n, status in enumerate(STATUSES))
            return row
        row[L_OUTCOMES] = (
            IF_FALSE * outcome(False) | IF_TRUE * outcome(True) | IF_MISSING * outcome(None)
        )
        if literal is not None and numeric is not None and row[L_OP] <= GE:
            compared = EQ if row[L_OP] == NE else row[L_OP]
            row[L_NUMERIC] = NUMERIC_TEXT if literal.number is None else NUMBER
            row[L_INT_LO], row[L_INT_HI] = int_range(compared, numeric)
            row[L_FLOAT_LO], row[L_FLOAT_HI] = float_range(compared, numeric)
        return row
