"""Verdicts of the oracle that the engine is tested with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from betrace.service.rules.parse import parse
from tests.support.oracle import OracleSpan, breach, name_matches

CASES = Path(__file__).parents[3] / "../shared/cases/rules-verdict.json"


def case_span(number: int, span: dict[str, Any]) -> OracleSpan:
    """A span in the format of the shared cases."""
    start = round(span.get("start_ms", 0) * 1_000_000)
    service = {"service.name": span["service"]} if "service" in span else {}
    return OracleSpan(
        name=span["name"],
        span_id=bytes.fromhex(span["span_id"]) if "span_id" in span else number.to_bytes(8),
        start=start,
        end=start + round(span.get("duration_ms", 1) * 1_000_000),
        kind=span.get("kind", "internal"),
        status=span.get("status", "unset"),
        attributes=span["attributes"],
        resource=service | span.get("resource", {}),
    )


def test_shared_cases() -> None:
    if not CASES.exists():
        pytest.skip("the shared cases are not beside the repository")
    wrong = []
    for case in json.loads(CASES.read_text())["cases"]:
        spans = [case_span(number, span) for number, span in enumerate(case["spans"], 1)]
        if (breach(parse(case["rule"]), spans) is not None) != case["breach"]:
            wrong.append(case["name"])
    assert wrong == []


def spans(*names: str) -> list[OracleSpan]:
    return [OracleSpan(name, span_id=i.to_bytes(8), start=i) for i, name in enumerate(names, 1)]


@pytest.mark.parametrize(
    ("rule", "names", "clause"),
    [
        ("when {a} always {b} never {c}", "a", "always"),
        ("when {a} always {b} never {c}", "a b c", "never"),
        ("when {a} always {b} never {c}", "a c", "always"),
        ("when {a} always {b} never {c}", "a b", None),
        ("when {a} always {b} never {c}", "c", None),
        ("always {b}", "a", "always"),
        ("never {b}", "b", "never"),
        ("not b", "a", "never"),
        ("count(a) == 2", "a b a", "never"),
        ("count(a) > count(b)", "a b a", "never"),
        ("a before b", "a b a", "never"),
        ("a before b", "b a b", None),
        ("a before a", "a a", None),
        ("count(*) < 2.5", "a b", "never"),
    ],
)
def test_clauses_and_conditions(rule: str, names: str, clause: str | None) -> None:
    verdict = breach(parse(rule), spans(*names.split()))
    assert (verdict.clause if verdict else None) == clause


def test_a_verdict_counts_all_checks() -> None:
    verdict = breach(parse("when { a or x } never { count(a) > 1 }"), spans("a", "b", "a"))
    assert verdict is not None
    assert verdict.counts == {"a": 2, "x": 0}
    assert verdict.matched == {"a": [(1).to_bytes(8), (3).to_bytes(8)], "x": []}


def test_duplicates_count_once() -> None:
    twice = spans("a") * 2
    assert breach(parse("count(a) == 1"), twice) is not None


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*", "", True),
        ("db.*", "db.", True),
        ("db.*", "db", False),
        ("*.retry", "a.b.retry", True),
        ("a*b*c", "abc", True),
        ("a*b*c", "a-c-b-c", True),
        ("a*b*c", "acb", False),
        ("a**", "a", True),
        ("ab", "a", False),
    ],
)
def test_wildcards(pattern: str, name: str, matches: bool) -> None:
    assert name_matches(pattern, name) is matches
