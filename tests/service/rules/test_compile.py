"""Compiled rules: shared checks, thresholds, and rules that an empty trace breaks."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import orjson
import pytest

from betrace.service.rules.compile import COUNT_NUMBER, R_EARLY, R_EARLY_ON_EMPTY, compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.rules.parse import parse
from betrace.service.rules.syntax import And, CountCompare, SpanSet
from tests.support.engine import compiled


def thresholds(text: str) -> dict[str, list[int]]:
    rules = compiled([parse(text)])
    values, starts = rules.thresholds
    return {
        name: values[starts[c] : starts[c + 1]].tolist() for c, name in enumerate(rules.check_names)
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", {"a": [1]}),
        ("count(a) > 3", {"a": [4]}),
        ("count(a) >= 3", {"a": [3]}),
        ("count(a) > 2.5", {"a": [3]}),
        ("count(a) >= 2.5", {"a": [3]}),
        ("3 < count(a)", {"a": [4]}),
        ("count(a) != 3", {"a": [4]}),
        ("always { count(a) < 3 }", {"a": [3]}),
        ("always { count(a) <= 3 }", {"a": [4]}),
        ("always { count(a) <= 2.5 }", {"a": [3]}),
        ("always { count(a) < 2.5 }", {"a": [3]}),
        ("always { count(a) == 3 }", {"a": [4]}),
        ("when { a } always { count(b) < 2 }", {"a": [1], "b": [2]}),
        # certain only at the close
        ("always { a }", {"a": []}),
        ("count(a) < 3", {"a": []}),
        ("a before b", {"a": [], "b": []}),
        ("count(a) > count(b)", {"a": [], "b": []}),
        ("a and not b", {"a": [], "b": []}),
        ("when { a before b } never { count(a) > 5 }", {"a": [], "b": []}),
        ("a or count(a) > 9 or b before a", {"a": [1, 10], "b": []}),
    ],
)
def test_thresholds(text, expected):
    assert thresholds(text) == expected


@pytest.mark.parametrize(
    ("text", "breaks"),
    [
        ("a", False),
        ("not a", True),
        ("always { a }", True),
        ("when { a } always { b }", False),
        ("when { not a } always { b }", True),
        ("never { count(a) < 1 }", True),
        ("count(a) == 0", True),
        ("count(a) != 0", False),
        ("count(a) == count(b)", True),
        ("count(a) < count(b)", False),
        ("a before b", False),
        ("always { a before b }", True),
        ("count(a) >= 0", True),
        ("count(a) < 0", False),
    ],
)
def test_rules_that_a_trace_without_matches_breaks(text, breaks):
    assert compiled([parse(text)]).on_empty.tolist() == ([0] if breaks else [])


@pytest.mark.parametrize(
    ("text", "early", "early_on_empty"),
    [
        ("count(a) >= 0", True, True),
        ("count(a) > -1", True, True),
        ("-0.5 < count(a)", True, True),
        ("count(a) != 0.5", True, True),
        ("count(a) == 0.5", False, False),
        ("count(a) < -3", False, False),
        ("always { count(a) < 0 }", True, True),
        ("when { a } never { count(a) >= 0 }", True, False),
        ("not a", False, False),
    ],
)
def test_comparisons_that_are_certain_from_the_beginning(text, early, early_on_empty):
    row = compiled([parse(text)]).rule_rows[0]
    assert bool(row[R_EARLY]) is early
    assert bool(row[R_EARLY_ON_EMPTY]) is early_on_empty


def test_rules_share_equal_checks():
    rules = compiled(
        [
            parse("a.where(x > 1) and b"),
            parse("when { b } always { a.where(x > 1) }"),
            parse("a.where(x > 1.0) or a.where(x > 2) or c.where(x > 2)"),
        ]
    )
    assert len(rules.checks) == len(set(rules.checks)) == len(rules.check_names)
    assert rules.checks_of_rule[0] == (0, 1)
    assert rules.checks_of_rule[1] == (1, 0)
    # Equal predicates share a program, even with different span names.
    by_name = dict(zip(rules.check_names, rules.predicates.tolist(), strict=True))
    assert by_name["c.where(x > 2)"] == by_name["a.where(x > 2)"]
    assert by_name["b"] == -1


def test_numbers_beyond_any_count_stay_within_int64():
    for number in (
        10**30,
        2**63,
        Fraction(2 * 10**30 + 1, 2),
        -(10**30),
        -Fraction(2 * 10**30 + 1, 2),
    ):
        for op in ("==", "!=", "<", "<=", ">", ">="):
            node = CountCompare(SpanSet("a"), op, number)
            rule = parse("a")
            rules = compiled([type(rule)(None, None, And((node, node)), False)])
            for row in rules.programs.tolist():
                if row[0] == COUNT_NUMBER:
                    assert 0 <= row[3] <= 2**62


def test_disabled_rules_are_left_out():
    on = make_rule({"id": "on", "condition": "a", "labels": {"team": "größe"}})
    off = make_rule({"id": "off", "condition": "b", "enabled": False})
    rules = compile_rules([off, on, off], "v")
    assert rules.rules == (on,)
    assert [make_rule(each) for each in orjson.loads(rules.definitions)] == [on]
    assert rules.check_names == ("a",)
    assert rules.version == "v"


def test_an_empty_set_of_rules_has_arrays_for_the_kernels():
    rules = compile_rules([])
    for array in (rules.predicates, rules.code, rules.leaves, rules.rule_rows, rules.programs):
        assert array.dtype == np.int64
        assert len(array) == 0
    assert rules.thresholds[1].tolist() == [0]


def test_an_invalid_syntax_tree_is_rejected():
    syntax = SimpleNamespace(when="x", always=None, never=None, relational=False)
    rule = SimpleNamespace(enabled=True, syntax=syntax)
    with pytest.raises(TypeError, match="not a condition"):
        compile_rules([rule])
