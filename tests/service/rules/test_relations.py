"""Verdicts of relational rules on whole traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from betrace.service.rules.parse import parse
from betrace.service.rules.relations import Judgement, judge
from tests.support.relational_strategies import case_traces, relational_rules
from tests.support.relations_oracle import breaks
from tests.support.trace_spans import case_trace

CASES = Path(__file__).parents[3] / "../shared/cases"


def verdict(rule: str, spans: list[dict[str, Any]], **limits: int) -> Judgement:
    tree = case_trace(spans, 0xF000)
    return judge(parse(rule, relational=True), tree, **limits)


@pytest.mark.parametrize("name", ["rules-verdict.json", "rules3-verdict.json"])
def test_shared_cases(name: str) -> None:
    if not (CASES / name).exists():
        pytest.skip("the shared cases are not beside the repository")
    wrong = []
    for case in json.loads((CASES / name).read_text())["cases"]:
        found = verdict(case["rule"], case["spans"])
        assert found.undecided is None
        if (found.clause is not None) != case["breach"]:
            wrong.append((case["name"], case["rule"]))
    assert wrong == []


@given(relational_rules(), case_traces())
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_verdicts_are_those_of_the_naive_reading(rule: str, spans: list[dict[str, Any]]) -> None:
    found = verdict(rule, spans)
    assert found.undecided is None
    assert (found.clause is not None) == breaks(parse(rule, relational=True), spans)


def spans(*names: str, **attributes: Any) -> list[dict[str, Any]]:
    """Spans a millisecond apart, each the child of the one before."""
    return [
        {
            "name": name,
            "span_id": f"{number:016x}",
            "parent_id": f"{number - 1:016x}" if number > 1 else "",
            "start_ms": number,
            "attributes": attributes | {"number": number},
        }
        for number, name in enumerate(names, 1)
    ]


def test_the_groups_that_broke_the_rule_are_shown() -> None:
    found = verdict(
        "for each pay by x, span:parentId as p always { count(p) > 1 } never { p:x == 1 }",
        spans(*["pay"] * 8, x=2),
    )
    assert found.clause == "always"
    assert found.counts == {"pay": 8}
    assert found.groups is not None
    assert (found.groups["broken"], found.groups["of"]) == (7, 7)  # the first has no parent
    assert len(found.groups["examples"]) == 5
    assert found.groups["examples"][0] == {
        "key": {"x": "2", "span:parentId": f"{1:016x}"},
        "clause": "always",
        "spans": [f"{2:016x}"],
    }


def test_counts_are_of_the_spans_that_are_the_same_for_all_groups() -> None:
    rule = "when { z or a } for each a as p always { b.where(number == p:number) or count(c) > 1 }"
    found = verdict(rule, spans("a", "b", "c"))
    assert found.counts == {"a": 1, "z": 0, "c": 1}
    assert found.evidence == {"a": [f"{1:016x}"], "c": [f"{3:016x}"]}


LONG = "x" * 70_000


@pytest.mark.parametrize(
    ("rule", "clause", "unknown"),
    [
        ('never { a.where(t matches "y") }', None, True),
        ('never { a.where(t matches "y") or b }', "never", False),
        ('never { a.where(t matches "y" and number > 9) }', None, False),
        ('never { a.where(number > 9 or t matches "y") and zzz }', None, False),
        ('always { a.where(t matches "y") } never { b }', "never", False),
        ('for each a as p never { p:t matches "y" or p:number == 3 }', "never", False),
        ('for each a as p never { p:t matches "y" }', None, True),
        ('never { count(a.where(t matches "y")) > 5 }', None, True),
    ],
)
def test_the_search_of_a_very_long_text_is_unknown(
    rule: str, clause: str | None, unknown: bool
) -> None:
    found = verdict(rule, spans("a", "b", "a", t=LONG))
    assert found.clause == clause
    assert (found.undecided is not None) == unknown


def test_a_rule_that_compares_all_spans_with_each_other_is_undecided() -> None:
    rule = "for each a as p never { a.where(number < p:number and number > p:number) }"
    assert verdict(rule, spans(*["a"] * 30)).undecided is None
    found = verdict(rule, spans(*["a"] * 1500))
    assert found.clause is None
    assert "too much work" in (found.undecided or "")


def test_a_verdict_that_is_not_found_in_time_is_undecided() -> None:
    tree = case_trace(spans(*["a"] * 3000))
    found = judge(parse("never { a.where(.number < 0) }"), tree, until=0.0)
    assert "too little time" in (found.undecided or "")


@pytest.mark.parametrize(
    "rule",
    [
        "for each a as p always { b.where(number == p:number + 1 and k != p:k) }",
        "for each a by number as p never { count(p) > 1 }",
        "never { a.where(not ancestor(z) and not descendant(z) and not sibling(z)) and zzz }",
        "never { a.where(followed_by(a within 1ns)) }",
        "for each a as p never { b.where(ancestor(p)) and b.where(parent(p)) and zzz }",
    ],
)
def test_large_traces_take_a_time_linear_in_their_size(rule: str) -> None:
    """The number of steps is bounded by a multiple of the size."""
    wide = spans(*["a", "b"] * 4000)
    for span in wide[1:]:
        span["parent_id"] = wide[0]["span_id"]
    assert verdict(rule, wide).undecided is None


# Cycles


def test_spans_that_are_their_own_ancestors() -> None:
    ring = spans(*"abc", "d")
    ring[0]["parent_id"] = ring[2]["span_id"]  # a, b and c in a ring, d below c
    for rule, holds in [
        ("a.where(ancestor(b) and ancestor(c) and not ancestor(a))", True),
        ("a.where(descendant(b) and descendant(d) and count(descendant(*)) == 3)", True),
        ("d.where(ancestor(a) and ancestor(b) and ancestor(c) and not ancestor(d))", True),
        ("d.where(descendant(*))", False),
    ]:
        assert (verdict(rule, ring).clause is not None) == holds, rule
