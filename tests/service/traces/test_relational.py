"""Relational rules through the engine, with candidates read back from a span log."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from betrace.service.rules.parse import parse
from betrace.service.rules.relations import judge
from betrace.service.storage.spanlog.log import SpanLog
from tests.support.relational_engine import RelationalEngine
from tests.support.relational_strategies import case_traces, encode_cases, relational_rules
from tests.support.trace_spans import case_trace

pytestmark = pytest.mark.kernel

CASES = Path(__file__).parents[3] / "../shared/cases/rules3-verdict.json"
IDS = [bytes([i]) * 16 for i in (1, 2)]
TENANTS = (f"t{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpanLog]:
    with SpanLog(tmp_path_factory.mktemp("log")) as log:
        yield log


def breaks(rule: str, spans: list[dict[str, Any]]) -> bool:
    tree = case_trace(spans)
    found = judge(parse(rule), tree)
    assert found.undecided is None
    return found.clause is not None


def relational(rule: str) -> bool:
    return parse(rule).relational


@given(
    st.lists(relational_rules().filter(relational), min_size=1, max_size=3),
    st.lists(case_traces(), min_size=1, max_size=2),
    st.integers(0, 2**32),
    st.lists(st.sampled_from(["go on", "close", "forget", "restart"]), min_size=5, max_size=5),
)
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_verdicts_are_those_of_whole_traces(log, rules, traces, seed, between):
    rng = random.Random(seed)
    spans = [(trace_id, span) for trace_id, of in zip(IDS, traces, strict=False) for span in of]
    spans += rng.choices(spans, k=2)
    rng.shuffle(spans)
    cuts = sorted(rng.randint(0, len(spans)) for _ in range(4))
    engine = RelationalEngine([parse(rule) for rule in rules], log, next(TENANTS))
    for (a, b), then in zip(pairwise([0, *cuts, len(spans)]), between, strict=True):
        if b > a:
            engine.send(*(encode_cases([span], trace_id) for trace_id, span in spans[a:b]))
        if then in ("close", "forget"):
            engine.close()
        if then == "forget":
            engine.forget()
        if then == "restart":
            engine.restart()
    engine.close()
    assert engine.active == {
        (trace_id.hex(), f"r{number}")
        for trace_id, of in zip(IDS, traces, strict=False)
        for number, rule in enumerate(rules)
        if breaks(rule, of)
    }
