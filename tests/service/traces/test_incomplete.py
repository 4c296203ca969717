"""Rules that skip incomplete traces, in any order of spans, with late spans and restarts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.rules.parse import parse
from betrace.service.rules.relations import judge
from betrace.service.signals import Kind, incomplete_text
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.relational import RelationalRules
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.trial import Trial
from betrace.service.traces.verdicts import decide_due, marked_incomplete
from tests.support.examples import examples
from tests.support.relational_engine import RelationalEngine
from tests.support.relational_strategies import case_traces, encode_cases, relational_rules
from tests.support.spans import S, batch, body
from tests.support.trace_spans import case_trace

pytestmark = pytest.mark.kernel

IDS = [bytes([i]) * 16 for i in (1, 2)]
TENANTS = (f"i{number}" for number in itertools.count())
PLAIN = ["never { a }", "when { a } always { b }", "count(*) > 2", "a before b"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpanLog]:
    with SpanLog(tmp_path_factory.mktemp("log")) as log:
        yield log


def breaks(rule: str, spans: list[dict[str, Any]]) -> bool:
    """Whether the trace is complete and breaks the rule."""
    known = {span["span_id"] for span in spans}
    if any(span["parent_id"] and span["parent_id"] not in known for span in spans):
        return False
    return judge(parse(rule, relational=True), case_trace(spans)).clause is not None


def engine(rules: list[str], log: SpanLog) -> RelationalEngine:
    return RelationalEngine([parse(rule) for rule in rules], log, next(TENANTS), "skip")


@given(
    st.lists(
        st.sampled_from(PLAIN) | relational_rules().filter(lambda rule: parse(rule).relational),
        min_size=1,
        max_size=3,
    ),
    st.lists(case_traces(), min_size=1, max_size=2),
    st.integers(0, 2**32),
    st.lists(st.sampled_from(["go on", "close", "forget", "restart"]), min_size=5, max_size=5),
)
@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    max_examples=examples(50),
)
def test_verdicts_are_those_of_whole_traces(log, rules, traces, seed, between):
    rng = random.Random(seed)
    spans = [(trace_id, span) for trace_id, of in zip(IDS, traces, strict=False) for span in of]
    spans += rng.choices(spans, k=2)
    rng.shuffle(spans)
    cuts = sorted(rng.randint(0, len(spans)) for _ in range(4))
    tried = engine(rules, log)
    for (a, b), then in zip(pairwise([0, *cuts, len(spans)]), between, strict=True):
        if b > a:
            tried.send(*(encode_cases([span], trace_id) for trace_id, span in spans[a:b]))
        if then in ("close", "forget"):
            tried.close()
        if then == "forget":
            tried.forget()
        if then == "restart":
            tried.restart()
    tried.close()
    assert tried.active == {
        (trace_id.hex(), f"r{number}")
        for trace_id, of in zip(IDS, traces, strict=False)
        for number, rule in enumerate(rules)
        if breaks(rule, of)
    }


def test_a_late_parent_completes_the_trace(log):
    tried = engine(["never { a }"], log)
    tried.send(body(S(2, "a", parent=1)))
    tried.close()
    assert not tried.signals
    tried.send(body(S(1, "root", parent=0)))
    tried.close()
    assert [signal.kind for signal in tried.signals] == [Kind.RAISED]
    assert not tried.signals[0].early


def test_a_late_span_that_makes_the_trace_incomplete_retracts_the_signal(log):
    tried = engine(["never { a }"], log)
    tried.send(body(S(1, "a", parent=0)))
    tried.close()
    assert len(tried.active) == 1
    tried.send(body(S(3, "b", parent=2)))
    tried.close()
    assert not tried.active
    tried.send(body(S(2, "b", parent=1)))
    tried.close()
    assert len(tried.active) == 1
    assert [signal.episode for signal in tried.signals] == [0, 0, 1]


def test_a_trace_that_cannot_be_read_is_undecided():
    made = make_rule({"id": "r", "condition": "never { a }", "incomplete": "skip"})
    traces = TenantTraces("t", compile_rules([made]))
    traces.fold(batch(S(1, "a", parent=0)), now=1)
    (due,) = traces.close_due(now=2, idle_ns=0)
    relational = RelationalRules(lambda due, ks: [[(k, "it is gone") for k in ks]])
    decided = decide_due(due, 3, relational)
    assert [each.reason for each in decided.undecided] == ["it is gone"]
    assert not decided.signals


def test_a_trial_says_that_it_skipped_the_trace():
    rules = compile_rules(
        [
            make_rule({"id": "skips", "condition": "never { a }", "incomplete": "skip"}),
            make_rule({"id": "judges", "condition": "never { a }"}),
        ]
    )
    trial = Trial(rules)
    trial.add(body(S(2, "a", parent=1), S(3, "a", parent=1), S(5, "b", parent=4)))
    skips, judges = trial.verdicts()
    assert (skips.breach, skips.skipped) == (
        False,
        "the trace is incomplete: 2 parents never came",
    )
    assert (judges.breach, judges.skipped) == (True, None)
    assert trial.missing_parents == 2
    assert skips.to_json()["skipped"] == skips.skipped
    assert "skipped" not in judges.to_json()


@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=6), max_size=4))
def test_a_trial_counts_each_missing_parent_once(bodies):
    trial = Trial(compile_rules([]))
    for spans in bodies:
        trial.add(body(*(S(span, "a", parent=parent) for span, parent in spans)))
    ids = {span for spans in bodies for span, _ in spans}
    parents = {parent for spans in bodies for _, parent in spans if parent}
    assert trial.missing_parents == len(parents - ids)


def test_counting_missing_parents_does_not_keep_the_interpreters_lock(monkeypatch):
    def keeps_the_lock(*_: Any, **__: Any) -> None:
        raise AssertionError("all threads wait while NumPy hashes the values of a long trace")

    for name in ("unique", "setdiff1d", "isin", "intersect1d", "union1d"):
        monkeypatch.setattr(np, name, keeps_the_lock)
    trial = Trial(compile_rules([]), trace_id="01" * 16)
    trial.add(body(S(2, "a", parent=1), S(3, "a", parent=2), S(5, "b", parent=4)))
    assert trial.missing_parents == 2


def test_signals_of_incomplete_traces_say_so(log):
    tried = RelationalEngine([parse("when { a } always { b }")], log, next(TENANTS))
    tried.send(body(S(2, "a", parent=1)))
    tried.close()
    (signal,) = tried.signals
    assert signal.missing_parents == 0
    marked = marked_incomplete(signal, 1)
    assert marked.missing_parents == 1
    assert marked.reason == incomplete_text(1) == "the trace is incomplete: 1 parent never came"
    assert marked_incomplete(marked, 2).reason == f"{incomplete_text(1)}; {incomplete_text(2)}"
