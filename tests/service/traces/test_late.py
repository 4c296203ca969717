"""Spans that arrive after their trace was closed, or after it was forgotten."""

from __future__ import annotations

import pytest

from betrace.service.rules.parse import parse
from betrace.service.signals import Kind
from tests.support.engine import Engine, compiled
from tests.support.oracle import OracleSpan
from tests.support.strategies import encode

pytestmark = pytest.mark.kernel


def span(name: str, number: int, trace: int = 1) -> OracleSpan:
    return OracleSpan(name, bytes([trace]) * 16, number.to_bytes(8, "big"))


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_late_span_can_retract_a_signal(forgotten):
    engine = Engine([parse("when { pay } always { check }")])
    engine.send(encode([span("pay", 1), span("other", 2)]))
    engine.close()
    assert len(engine.active) == 1
    if forgotten:
        engine.forget()
        assert engine.traces.closed_count == 0
    engine.send(encode([span("check", 3)]))
    engine.close()
    assert not engine.active
    raised, retracted = engine.signals
    assert (raised.kind, retracted.kind) == (Kind.RAISED, Kind.RETRACTED)
    assert raised.trace_id == retracted.trace_id
    assert raised.id != retracted.id
    assert retracted.counts == {"pay": 1, "check": 1}
    assert engine.recalled == int(forgotten)


def test_late_spans_count_with_earlier_ones_and_repeated_spans_do_not_count():
    engine = Engine([parse("count(retry) >= 3")])
    engine.send(encode([span("retry", 1), span("retry", 2)]))
    engine.close()
    engine.forget()
    engine.send(encode([span("retry", 1), span("retry", 2)]))
    engine.close()
    assert not engine.signals
    engine.forget()
    engine.send(encode([span("retry", 3)]))
    assert [s.early for s in engine.signals] == [True]


def test_a_late_span_does_not_reopen_other_traces_in_the_same_frame():
    engine = Engine([parse("count(a) > 1")])
    engine.send(encode([span("a", 1, trace=1), span("a", 2, trace=2)]))
    engine.close()
    engine.forget()
    engine.send(encode([span("a", 3, trace=1)]))
    assert engine.traces.open_count == 1
    engine.close()
    assert engine.active == {(("01" * 16), "r0")}


def test_new_traces_are_not_looked_up():
    engine = Engine([parse("count(a) > 1")])
    for number in range(50):
        engine.send(encode([span("a", number + 1, trace=number + 1)]))
        engine.close()
        engine.forget()
    assert engine.recalled == 0


def test_new_rules_do_not_decide_what_a_forgotten_trace_broke_before():
    engine = Engine([parse("when { a } always { b }"), parse("when { a } always { c }")])
    engine.send(encode([span("a", 1)]))
    engine.close()
    engine.forget()
    assert {s.rule_id for s in engine.signals} == {"r0", "r1"}
    engine.traces.rules = compiled(
        [
            parse("when { a } always { b }"),  # unchanged
            parse("when { a } always { d }"),  # another version: the old one is unknown
            parse("when { a } always { late }"),  # new: was broken, and no longer is
            parse("never { a }"),  # new: certain from the first span on
        ],
        "v2",
    )
    engine.send(encode([span("late", 2), span("b", 3)]))
    engine.close()
    assert engine.recalled == 1
    assert [(s.rule_id, s.kind) for s in engine.signals[2:]] == [
        ("r3", "raised"),
        ("r0", "retracted"),
    ]
