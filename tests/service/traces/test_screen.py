"""Only the candidates that may break a relational rule are judged span by span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from betrace.service.rules.parse import parse
from betrace.service.rules.relations import judge
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces import relational
from betrace.service.traces.screen import Screen
from tests.support.relational_engine import RelationalEngine
from tests.support.spans import S, body

RULE = "never { a.where(not parent(z)) and b.where(parent(a)) }"  # not decided early
TRACES = [number.to_bytes(16, "big") for number in range(1, 31)]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the traces that were judged span by span."""
    found: list[int] = []

    def counted(rule: Any, trace: Any, **options: Any) -> Any:
        found.append(len(trace.spans))
        return judge(rule, trace, **options)

    monkeypatch.setattr(relational, "judge", counted)
    return found


def closed(tmp_path: Path, rule: str, traces: list[list[S]], **options: Any) -> RelationalEngine:
    with SpanLog(tmp_path) as log:
        engine = RelationalEngine([parse(rule)], log, "t", **options)
        engine.relational._screen = Screen()
        engine.send(*(body(*spans) for spans in traces))
        engine.close()
    return engine


def pairs(broken: int) -> list[list[S]]:
    """Thirty traces of two spans; in the last ``broken`` of them the second is the first's
    child."""
    return [
        [S(1, trace=each, parent=0), S(2, "b", trace=each, parent=1 if k >= 30 - broken else 7)]
        for k, each in enumerate(TRACES)
    ]


@pytest.mark.kernel
@pytest.mark.parametrize("broken", [0, 2])
def test_traces_that_keep_a_rule_are_not_judged_one_by_one(tmp_path, judged, broken):
    engine = closed(tmp_path, RULE, pairs(broken))
    assert len(engine.active) == len(judged) == broken
    assert engine.read_back.read == 30


def test_few_spans_are_judged_one_by_one(tmp_path, judged):
    assert not closed(tmp_path, RULE, pairs(0)[:3]).active
    assert judged == [2, 2, 2]


def test_traces_of_rules_that_skip_incomplete_ones_are_judged(tmp_path, judged):
    engine = closed(tmp_path, RULE, pairs(2), incomplete="skip")
    assert len(engine.active) == 2
    assert judged == [2, 2]  # the others are incomplete
