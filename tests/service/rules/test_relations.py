"""Verdicts of relational rules on whole traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from betrace.service.rules.parse import parse
from betrace.service.rules.relations import Judgement, judge
from betrace.service.rules.trace_tree import TraceTree
from tests.support.relational_strategies import case_traces, relational_rules
from tests.support.relations_oracle import breaks
from tests.support.trace_spans import case_span

CASES = Path(__file__).parents[3] / "../shared/cases"


def verdict(rule: str, spans: list[dict[str, Any]], **limits: int) -> Judgement:
    tree = TraceTree(case_span(0xF000 + number, span) for number, span in enumerate(spans))
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
