"""The signals active in the end are those of the oracle, whatever failed, crashed or was late."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import trio

from betrace.channels import TransientError
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.request import Done
from betrace.service.rules.parse import parse
from betrace.service.storage.duck.queries import SignalFilter
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from tests.support.inprocess import active_signals, closed, running, send, settings, write_rules
from tests.support.oracle import OracleSpan, breach
from tests.support.spans import TRACE, S

TRACE_ID = TRACE.hex()


class Fault:
    """While ``on``, spans cannot be folded."""

    on = False


@pytest.fixture
def fold_fault(monkeypatch):
    fault = Fault()
    fold = OpenTraces.fold

    def fail(self: OpenTraces, *args: Any) -> Any:
        if fault.on:
            raise TransientError("the test makes these spans fail")
        return fold(self, *args)

    monkeypatch.setattr(OpenTraces, "fold", fail)
    return fault


async def dead(service, spans):
    """Return when ``spans`` spans are in dead letters and none in progress."""
    with trio.fail_after(60):
        while service.pipeline.letters.book.spans < spans or service.sources.account().in_flight:
            await trio.sleep(0.01)


async def test_a_breach_undone_by_spans_that_were_dead_letters_before_and_after_a_crash(
    tmp_path, fold_fault
):
    """The whole trace arrives after the last checkpoint, its breach is stored, and all its spans
    become dead letters when the log is read again: no trace is open after the replay."""
    write_rules(tmp_path, {"no-b": "when { a } always { b }"})
    retry = {"attempts": 1, "delay_seconds": 0.01, "transient_retry_seconds": 3600}
    config = settings(tmp_path, redelivery=retry)
    async with running(config, die=True) as service:
        await send(service, [S(9, "other", trace=bytes(15) + b"9")])
        await closed(service)
        assert await service.recovery.save()
        await send(service, [S(1, "a")])
        await closed(service)
        assert active_signals(service) == {(TRACE_ID, "no-b")}
        fold_fault.on = True
        assert await send(service, [S(2, "b")]) == Done(1)
        await dead(service, 1)
    async with running(config) as service:
        await dead(service, 2)
        fold_fault.on = False
        await service.pipeline.letters.retry()
        with trio.fail_after(60):
            while service.pipeline.letters.book.spans:
                await trio.sleep(0.01)
        await closed(service)
        assert active_signals(service) == set()


RULES = {
    "no-b": "when { a } always { b }",
    "two": "count(a) == 2",
    "more-a": "count(a) > count(b)",
    "many": "count(a) > 3",
}


def expected(spans: list[S]) -> set[tuple[str, str]]:
    """The oracle's verdict on the traces of the spans."""
    traces: dict[bytes, list[OracleSpan]] = {}
    for span in spans:
        traces.setdefault(span.trace, []).append(
            OracleSpan(span.name, span.trace, span.id.to_bytes(8, "big"), span.start, span.end)
        )
    return {
        (trace.hex(), rule)
        for trace, own in traces.items()
        for rule, text in RULES.items()
        if breach(parse(text), own)
    }


@pytest.fixture
def ledger_fault(monkeypatch):
    """While it is on, the ledger records but raises an error."""
    fault = Fault()
    record = SqliteLedger.record

    def late(self: SqliteLedger, signals: Any) -> Any:
        found = record(self, signals)
        if fault.on:
            raise LedgerError("recorded, but the test raises an error", transient=True)
        return found

    monkeypatch.setattr(SqliteLedger, "record", late)
    return fault


async def quiet(service):
    """Return when everything that can be stored is stored; dead letters may be left."""
    with trio.move_on_after(2):
        await closed(service)


@pytest.mark.parametrize("seed", range(int(os.environ.get("BETRACE_CRASHES", "2"))))
async def test_any_interleaving_of_faults_dead_letters_and_crashes(
    tmp_path, fold_fault, ledger_fault, seed
):
    """Few traces, whose verdicts change repeatedly. Spans that fail become dead letters and are
    retried in any order, before and after crashes. The ledger's answers get lost."""
    rng = random.Random(seed)
    write_rules(tmp_path, RULES)
    config = settings(
        tmp_path,
        traces={"idle_seconds": 0.1},
        redelivery={"attempts": 1, "delay_seconds": 0.01, "transient_retry_seconds": 3600},
        caches={"trace_metadata": 2, "trace_metadata_ttl_seconds": 1},
        breakers={"storage": {"open_seconds": 0.1}},
    )
    sent: list[S] = []
    number = 0
    for _ in range(5):
        async with running(config, die=rng.random() < 0.8) as service:
            for _ in range(rng.randrange(1, 7)):
                fold_fault.on = rng.random() < 0.3
                ledger_fault.on = rng.random() < 0.2
                spans = []
                for _ in range(rng.randrange(1, 4)):
                    number += 1
                    trace = bytes([rng.randrange(1, 5)]) * 16
                    spans.append(S(number, rng.choice("aab"), trace=trace, start=rng.randrange(9)))
                assert await send(service, spans) == Done(len(spans))
                sent += spans
                what = rng.choice(["nothing", "close", "close", "retry", "checkpoint", "wait"])
                if what in ("close", "checkpoint"):
                    await quiet(service)
                if what == "retry":
                    await service.pipeline.letters.retry()
                if what == "checkpoint":
                    with trio.move_on_after(5):
                        await service.recovery.save()
                if what == "wait":
                    await trio.sleep(rng.choice([0.3, 2.5]))  # in which traces are forgotten
            fold_fault.on = rng.random() < 0.5
    fold_fault.on = ledger_fault.on = False
    async with running(config) as service:
        with trio.fail_after(60):
            while service.pipeline.letters.book.total:
                await service.pipeline.letters.retry()
                await trio.sleep(0.05)
        await closed(service)
        with trio.fail_after(60):
            while service.pipeline.record.fallback.pending:
                await trio.sleep(0.05)
        assert active_signals(service) == expected(sent)
        shown, _ = service.store.signals("default", SignalFilter(status="active"), limit=1000)
        assert {(s.signal.trace_id, s.signal.rule_id) for s in shown} == expected(sent)
        assert len(shown) == len(expected(sent))
