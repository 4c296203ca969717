"""The running service with rules that relate spans: late spans, restarts, and what is undecided."""

from __future__ import annotations

import pytest
import trio

from betrace.service.app.service import Service
from betrace.service.signals import Kind
from betrace.service.storage.duck.schema import StoreError
from betrace.service.traces.reading_pace import ReadingPace
from tests.support.inprocess import (
    active_signals,
    closed,
    ledger_signals,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.spans import TRACE, S

RULES = {
    "checked": "for each pay as p always { check.where(x == p:x) }",
    "below": "never { pay.where(not ancestor(auth)) }",
    "plain": "when { pay } always { check }",
}
OTHER = b"\2" * 16


def broken(service: Service) -> set[str]:
    return {rule for _, rule in active_signals(service)}


async def reopened(service: Service, times: int) -> None:
    with trio.fail_after(60):
        while service.pipeline.open_traces.counts.reopened < times:
            await trio.sleep(0.01)


async def test_late_spans_retract_and_raise_again(tmp_path):
    write_rules(tmp_path, RULES)
    async with running(settings(tmp_path)) as service:
        await send(service, [S(1, "pay", x="1"), S(2, "pay", x="2"), S(3, "check", x="1")])
        await closed(service)
        assert broken(service) == {"checked", "below"}
        (signal,) = [s for s in ledger_signals(service) if s.rule_id == "checked"]
        assert signal.clause == "always"
        assert signal.counts == {"pay": 2}
        assert signal.context is not None
        assert signal.context["groups"] == {
            "broken": 1,
            "of": 2,
            "examples": [{"key": {}, "clause": "always", "spans": [f"{2:016x}"]}],
        }
        await send(service, [S(4, "check", x="2")])
        await closed(service)
        assert broken(service) == {"below"}
        await send(service, [S(5, "pay", x="5")])
        await closed(service)
        assert broken(service) == {"checked", "below"}
        kinds = [(s.kind, s.episode) for s in ledger_signals(service) if s.rule_id == "checked"]
        assert kinds == [(Kind.RAISED, 0), (Kind.RETRACTED, 0), (Kind.RAISED, 1)]


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "replay"])
async def test_a_signal_from_before_a_crash_is_retracted(tmp_path, saved):
    write_rules(tmp_path, RULES)
    config = settings(tmp_path)
    async with running(config, die=True) as service:
        await send(service, [S(2, "pay", parent=1, x="1"), S(3, "check", x="1")])
        await closed(service)
        assert broken(service) == {"below"}
        if saved:
            assert await service.recovery.save()
    async with running(config) as service:
        await send(service, [S(1, "auth", parent=0)])
        await closed(service)
        assert broken(service) == set()
        below = [s for s in ledger_signals(service) if s.rule_id == "below"]
        assert [s.kind for s in below] == [Kind.RAISED, Kind.RETRACTED]


async def test_long_traces_are_read_from_all_their_frames(tmp_path):
    write_rules(tmp_path, {"twice": "for each pay by x as p never { count(p) > 1 }"})
    config = settings(tmp_path, traces={"idle_seconds": 2})  # longer than between two requests
    async with running(config) as service:
        for number in range(1, 31):
            await send(service, [S(number, "pay", x=str(number % 29))])
        await closed(service)
        (signal,) = ledger_signals(service)
        assert signal.context is not None
        assert signal.context["groups"]["broken"] == 1
        assert signal.context["groups"]["of"] == 29
        (example,) = signal.context["groups"]["examples"]
        assert example["key"] == {"x": "1"}
        assert sorted(example["spans"]) == [f"{1:016x}", f"{30:016x}"]
        assert "1 of 29: x 1" in signal.message


async def test_a_trace_that_is_too_large_is_undecided(tmp_path, caplog):
    write_rules(tmp_path, RULES)
    traces = {"idle_seconds": 0.2, "relational_spans_max": 2}
    async with running(settings(tmp_path, traces=traces)) as service:
        await send(service, [S(n, "pay", x="1") for n in range(1, 4)])
        await send(service, [S(4, "pay", trace=OTHER, x="1")])
        await closed(service)
        trace, other = TRACE.hex(), OTHER.hex()
        assert active_signals(service) == {
            (trace, "plain"),
            (other, "plain"),
            (other, "checked"),
            (other, "below"),
        }
        assert service.pipeline.evaluate.counts.undecided == 2
        assert len(service.pipeline.evaluate._undecided.page("default")[0]) > 0
        assert "the trace has 3 spans; at most 2 are read back" in caplog.text


async def test_traces_that_the_fold_decides_are_not_read(tmp_path, monkeypatch):
    write_rules(tmp_path, RULES)
    async with running(settings(tmp_path)) as service:
        await send(service, [S(1, "check"), S(2, "auth")])
        await closed(service)
        assert service.pipeline.open_traces.counts.closed == 1
        assert service.pipeline.evaluate._read_back.read == 0


async def test_without_earlier_signals_nothing_is_raised_or_retracted(tmp_path, monkeypatch):
    write_rules(tmp_path, RULES)

    def fail(*_: object) -> None:
        raise StoreError("says the test", transient=True)

    async with running(settings(tmp_path)) as service:
        await send(service, [S(1, "pay", x="1"), S(3, "check", x="1")])
        await closed(service)
        assert broken(service) == {"below"}
        store = service.pipeline.evaluate._read_back._store
        monkeypatch.setattr(store, "raised_of", fail)
        await send(service, [S(4, "pay", x="2"), S(5, "auth", parent=0)])
        await closed(service)
        assert broken(service) == {"below"}
        assert service.pipeline.evaluate.counts.undecided == 2
        assert len(service.pipeline.evaluate._undecided.page("default")[0]) > 0


async def test_what_no_later_span_can_undo_is_signalled_at_once(tmp_path):
    rules = {"n-plus-one": "for each query by x as q never { count(q) > 3 }"}
    write_rules(tmp_path, rules)
    config = settings(tmp_path, traces={"idle_seconds": 3600})
    async with running(config) as service:
        service.pipeline.evaluate._relational._pace = ReadingPace(burst_ns=3600 * 10**9)
        await send(service, [S(number, "query", x="1") for number in range(1, 4)])
        await send(service, [S(4, "query", x="2")])
        assert not ledger_signals(service)
        await send(service, [S(5, "query", x="1")])
        with trio.fail_after(60):
            while not ledger_signals(service):
                await trio.sleep(0.01)
        (signal,) = ledger_signals(service)
        assert signal.early
        assert signal.context["groups"]["broken"] == 1
        assert signal.context["groups"]["of"] == 2
        await send(service, [S(6, "query", x="2", complete=True)])
        await closed(service)
        assert len(ledger_signals(service)) == 1
        assert service.pipeline.evaluate.counts.raised == 1


async def test_an_incomplete_trace_is_read_once_to_judge_and_to_mark_it(tmp_path):
    write_rules(tmp_path, {"checked": RULES["checked"]})
    async with running(settings(tmp_path)) as service:
        await send(service, [S(1, "pay", x="1", parent=9), S(2, "pay", x="2", parent=1)])
        await closed(service)
        (signal,) = ledger_signals(service)
        assert signal.missing_parents == 1
        assert signal.reason == "the trace is incomplete: 1 parent never came"
        assert service.pipeline.evaluate._read_back.read == 1
