"""Signals that DuckDB may not have yet."""

from __future__ import annotations

from dataclasses import replace

from betrace.service.api.unstored_signals import UnstoredSignals
from betrace.service.signals import Kind, raised_id
from tests.support.api_records import OTHER, TRACE, make_signal


def test_signals_are_found_until_newer_ones_displace_them() -> None:
    known = UnstoredSignals(most=2)
    first, second, third = (make_signal(n, f"rule-{n}") for n in range(3))
    known.add([first, second])
    assert known.find("default", first.id) == (first, True)
    assert known.find("other", first.id) is None
    known.add([third])
    found = [known.find("default", each.id) for each in (first, second, third)]
    assert found.count(None) == 1
    assert known.find("default", third.id) == (third, True)


def test_a_retraction_makes_its_signal_inactive() -> None:
    known = UnstoredSignals()
    raised, retraction = make_signal(), make_signal(1, kind=Kind.RETRACTED)
    assert raised_id(retraction) == raised.id
    known.add([raised, retraction])
    assert known.find("default", raised.id) == (raised, False)
    assert known.find("default", retraction.id) == (retraction, False)


def test_signals_are_found_by_trace_and_forgotten_with_their_tenant() -> None:
    known = UnstoredSignals()
    mine, foreign = make_signal(), replace(make_signal(), tenant="other")
    known.add([mine, foreign, make_signal(1, kind=Kind.RETRACTED)])
    assert mine in known.of_trace("default", TRACE)
    assert known.of_trace("default", OTHER) == []
    known.forget("default")
    assert known.of_trace("default", TRACE) == []
    assert known.find("other", foreign.id) == (foreign, True)
