"""Verdicts depend only on the set of spans, not on order, batches, repetition or closing."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.rules.parse import parse
from tests.support.engine import Engine
from tests.support.oracle import OracleSpan, breach
from tests.support.strategies import encode, rules, traces

pytestmark = pytest.mark.kernel

IDS = [bytes([i]) * 16 for i in (1, 2, 3)]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[list[OracleSpan]], list[list[OracleSpan]]]:
    """Traces, and their spans in the order and the requests in which they arrive."""
    all_traces = [draw(traces(trace_id=i)) for i in IDS[: draw(st.integers(1, 3))]]
    spans = [span for trace in all_traces for span in trace]
    spans += draw(st.lists(st.sampled_from(spans), max_size=3)) if spans else []
    random.Random(draw(st.integers(0, 2**32))).shuffle(spans)
    cuts = sorted(draw(st.lists(st.integers(0, len(spans)), max_size=5)))
    bounds = [0, *cuts, len(spans)]
    parts = [spans[a:b] for a, b in pairwise(bounds)]
    return all_traces, parts


@given(
    st.lists(rules(), min_size=1, max_size=4),
    arrivals(),
    st.lists(st.sampled_from(["go on", "close", "forget", "restart"]), min_size=6, max_size=6),
)
def test_verdicts_are_those_of_whole_traces(rule_list, arrived, between):
    all_traces, parts = arrived
    engine = Engine(rule_list)
    for part, then in zip(parts, between, strict=False):
        engine.send(encode(part))
        if then in ("close", "forget"):
            engine.close()
        if then == "forget":
            engine.forget()
        if then == "restart":
            engine.restart()
    engine.close()
    expected = {
        (trace[0].trace_id.hex(), f"r{i}")
        for trace in all_traces
        if trace
        for i, rule in enumerate(rule_list)
        if breach(rule, trace)
    }
    assert engine.active == expected


@given(rules(), traces())
def test_clause_and_counts_are_those_of_the_oracle(rule, trace):
    engine = Engine([rule])
    engine.send(encode(trace))
    engine.close()
    verdict = breach(rule, trace) if trace else None
    final = [s for s in engine.signals if not s.early]
    if verdict is None:
        assert not engine.signals
    elif final:
        assert final[0].clause == verdict.clause
        assert final[0].counts == verdict.counts


def _cases() -> list[dict]:
    path = Path(__file__).parents[3] / "../shared/cases/rules-verdict.json"
    if not path.exists():
        return []
    return json.loads(path.read_text())["cases"]


@pytest.mark.skipif(not _cases(), reason="the shared cases are not next to the repository")
@pytest.mark.parametrize("case", _cases(), ids=lambda case: case["name"])
def test_shared_verdict_cases(case):
    spans = [
        OracleSpan(
            trace_id=b"\1" * 16,
            span_id=bytes.fromhex(span["span_id"]) if "span_id" in span else i.to_bytes(8, "big"),
            name=span["name"],
            start=10**18 + int(span.get("start_ms", 0) * 10**6),
            end=10**18 + int((span.get("start_ms", 0) + span.get("duration_ms", 1)) * 10**6),
            kind=span.get("kind", "internal"),
            status=span.get("status", "unset"),
            status_message="",
            attributes=span["attributes"],
            resource={
                **({"service.name": span["service"]} if span.get("service") else {}),
                **span.get("resource", {}),
            },
            scope="",
        )
        for i, span in enumerate(case["spans"], 1)
    ]
    engine = Engine([parse(case["rule"])])
    engine.send(encode(spans))
    engine.close()
    assert bool(engine.active) == case["breach"]
    assert len(engine.signals) <= 1
