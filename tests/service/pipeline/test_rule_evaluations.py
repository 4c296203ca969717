"""Outcomes of rules, counted by rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from betrace.service.otlp.columns import Rows
from betrace.service.pipeline import rule_evaluations
from betrace.service.pipeline.rule_evaluations import OTHER, RuleEvaluations
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import Rule, make_rule
from betrace.service.traces.decide import OUTCOMES, outcomes_when_empty
from tests.support.inprocess import closed, running, send, settings, write_rules
from tests.support.spans import S

RULES = {
    "applies": "when { a } always { b }",
    "empty-kept": "never { c }",
    "empty-broken": "always { d }",
}


def rule(rule_id: str, condition: str = "a", **more: Any) -> Rule:
    return make_rule({"id": rule_id, "condition": condition, **more})


def compiled(*ids: str) -> CompiledRules:
    return compile_rules([rule(each) for each in ids], ",".join(ids))


def rows(*numbers: tuple[int, int, int, int]) -> Rows:
    return np.array(numbers, np.int64)


def by_rule(found: list[tuple[tuple[str, str, str], int]]) -> dict[tuple[str, str], list[int]]:
    shown: dict[tuple[str, str], list[int]] = {}
    for (tenant, rule_id, _), number in found:
        shown.setdefault((tenant, rule_id), []).append(number)
    return shown


def test_outcomes_of_a_trace_without_matching_spans() -> None:
    rules = compile_rules([rule(name, text) for name, text in RULES.items()])
    names = [OUTCOMES[each] for each in outcomes_when_empty(rules)]
    assert names == ["not_applicable", "kept", "broken"]


def test_untouched_traces_count_as_traces_without_matching_spans() -> None:
    counted = RuleEvaluations(100)
    rules = compiled("a", "b")
    for _ in range(2):
        counted.add("acme", rules, rows((0, 1, 2, 0), (0, 0, 0, 1)), 10)
    known = {"acme": (rule("a"), rule("b"))}
    shown = by_rule(counted.counts(known))
    # The rule `count(a) >= 1`, in short `a`, is kept by a trace without an a.
    assert shown == {("acme", "a"): [0, 16, 4, 0], ("acme", "b"): [0, 18, 0, 2]}
    assert by_rule(counted.counts(known)) == shown
    counted.add("acme", rules, rows((0, 0, 1, 0), (0, 0, 0, 0)), 1)
    assert by_rule(counted.counts(known))["acme", "a"] == [0, 16, 5, 0]


def test_series_exist_from_the_load_of_a_rule_until_its_deletion() -> None:
    counted = RuleEvaluations(100)
    both = {"acme": (rule("a"), rule("off", enabled=False)), "b": (rule("a"),)}
    assert by_rule(counted.counts(both)) == {("acme", "a"): [0] * 4, ("b", "a"): [0] * 4}
    counted.add("acme", compiled("a"), rows((1, 1, 1, 1)), 4)
    assert by_rule(counted.counts(both))["acme", "a"] == [1] * 4
    assert by_rule(counted.counts({"b": both["b"]})) == {("b", "a"): [0] * 4}
    assert by_rule(counted.counts(dict(both)))["acme", "a"] == [0] * 4


def test_rules_beyond_the_maximum_are_counted_together() -> None:
    counted = RuleEvaluations(8)
    ids = [f"r{number}" for number in range(5)]
    known = {"acme": tuple(map(rule, ids))}
    counted.counts(known)
    counted.add("acme", compiled(*ids), rows(*[(0, 0, 1, 0)] * 5), 1)
    shown = by_rule(counted.counts(known))
    assert shown == {
        ("acme", "r0"): [0, 0, 1, 0],
        ("acme", "r1"): [0, 0, 1, 0],
        (OTHER, OTHER): [0, 0, 3, 0],
    }


def test_nothing_is_lost_when_many_versions_of_rules_are_in_use(monkeypatch: Any) -> None:
    monkeypatch.setattr(rule_evaluations, "_MOST_SETS", 2)
    counted = RuleEvaluations(100)
    for number in range(10):
        version = compile_rules([rule("a")], f"{number % 5}")
        counted.add("acme", version, rows((0, 0, 1, 0)), 1)
    assert by_rule(counted.counts({"acme": (rule("a"),)})) == {("acme", "a"): [0, 0, 10, 0]}


async def test_the_running_service_counts_closed_traces(tmp_path: Path) -> None:
    write_rules(tmp_path, RULES | {"related": "never { c.where(not ancestor(a)) }"})
    async with running(settings(tmp_path)) as service:
        await send(service, [S(1, "a", bytes([1] * 16)), S(2, "b", bytes([1] * 16))])
        await send(service, [S(3, "a", bytes([2] * 16)), S(4, "c", bytes([3] * 16))])
        await send(service, [S(5, "a", bytes([4] * 16)), S(6, "c", bytes([4] * 16), parent=5)])
        await closed(service)
        counts = service.pipeline.evaluate.evaluations.counts(service.registry.store.all_rules())
        shown = {key[1]: numbers for key, numbers in by_rule(counts).items()}
        assert shown["applies"] == [1, 1, 2, 0]
        assert shown["empty-kept"] == [0, 2, 2, 0]
        assert shown["empty-broken"] == [0, 0, 4, 0]
        assert shown["related"] == [0, 3, 1, 0]  # two were candidates
        exposition = (await service.tools.exposition.scrape()).decode()
    assert (
        'betrace_rule_evaluations_total{outcome="not_applicable",rule="applies",'
        'tenant="default"} 1.0'
    ) in exposition
