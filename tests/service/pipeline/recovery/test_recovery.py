"""A crash at any point: everything answered with 200 is evaluated exactly once."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import pytest
import trio

from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.pipeline.request import Done
from betrace.service.rules.parse import parse
from tests.support.api_client import ApiClient
from tests.support.inprocess import (
    active_signals,
    closed,
    folded,
    ledger_signals,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.oracle import OracleSpan, breach
from tests.support.spans import TRACE, S

RULES = {
    "many": "count(a) > 3",
    "no-b": "when { a } always { b }",
    "two": "count(a) == 2",
    "few-b": "when { a } always { count(b) < 2 }",
    "more-a": "count(a) > count(b)",
}
TRACE_ID = TRACE.hex()


@pytest.fixture
def config(tmp_path):
    write_rules(tmp_path, RULES)
    return settings(tmp_path)


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


async def spans_in_index(service: Any, traces: set[str]) -> dict[str, int]:
    found = await trio.to_thread.run_sync(service.store.find_traces, "default", sorted(traces))
    return {trace: row.spans for trace, row in found.items()}


@pytest.mark.parametrize("seed", range(int(os.environ.get("BETRACE_CRASHES", "2"))))
async def test_any_interleaving_of_spans_checkpoints_and_crashes(tmp_path, seed):
    rng = random.Random(seed)
    write_rules(tmp_path, RULES)
    config = settings(tmp_path, traces={"idle_seconds": rng.choice([0.1, 0.4, 60])})
    sent: list[S] = []
    number = 0
    for _ in range(4):
        async with running(config, die=rng.random() < 0.8) as service:
            for _ in range(rng.randrange(1, 6)):
                spans = []
                for _ in range(rng.randrange(1, 6)):
                    number += 1
                    trace = bytes([rng.randrange(1, 6)]) * 16
                    spans.append(S(number, rng.choice("aab"), trace=trace, start=rng.randrange(9)))
                assert await send(service, spans) == Done(len(spans))
                sent += spans
                if rng.random() < 0.3:
                    sent.append(rng.choice(sent))  # a client's retry
                    await send(service, [sent[-1]])
                what = rng.choice(["nothing", "nothing", "fold", "checkpoint", "close", "both"])
                if what in ("fold", "checkpoint", "both"):
                    await folded(service)
                if what in ("close", "both") and config.traces.idle_seconds < 1:
                    await closed(service)
                if what in ("checkpoint", "both"):
                    with trio.fail_after(60):
                        assert await service.recovery.save()
            await trio.sleep(rng.choice([0, 0, 0.3]))
    async with running(settings(tmp_path)) as service:
        await closed(service)
        assert active_signals(service) == expected(sent)
        ids = [s.id for s in ledger_signals(service)]
        assert len(ids) == len(set(ids))
        distinct = {(s.trace.hex(), s.id) for s in sent}
        counted = await spans_in_index(service, {trace for trace, _ in distinct})
        assert counted == Counter(trace for trace, _ in distinct)


async def test_a_verdict_that_changes_back_is_active_again(tmp_path):
    write_rules(tmp_path, {"more-a": "count(a) > count(b)"})
    async with running(settings(tmp_path)) as service:
        for span in (S(1, "a"), S(2, "b"), S(3, "a")):
            await send(service, [span])
            await closed(service)
        assert active_signals(service) == {(TRACE_ID, "more-a")}


async def test_acknowledged_spans_are_found_in_the_log(config):
    async with running(config, die=True) as service:
        assert await send(service, [S(1), S(2)]) == Done(2)
    async with running(config) as service:
        assert service.recovery.replayed.spans == 2
        await closed(service)
        assert (TRACE_ID, "two") in active_signals(service)


async def test_nothing_is_replayed_after_a_clean_stop(config):
    async with running(config) as service:
        await send(service, [S(1)])
        await folded(service)
    async with running(config) as service:
        assert service.recovery.replayed.spans == 0
        await send(service, [S(2)])
        await closed(service)
        assert (TRACE_ID, "two") in active_signals(service)
        assert (await spans_in_index(service, {TRACE_ID}))[TRACE_ID] == 2


async def test_an_operator_saves_a_checkpoint_and_sees_what_it_covers(config, monkeypatch):
    path = "/api/admin/checkpoint"
    async with running(config) as service:
        await send(service, [S(1), S(2), S(3, trace=b"\2" * 16)])
        await folded(service)
        client = ApiClient(service)
        before = await client.get(path)
        assert before["toReplayBytes"] > 100
        shown = await client.post(path)
        covers = shown["covers"]
        assert covers["openTraces"] + covers["closedTraces"] == 2
        assert (covers["tenants"], covers["requestsNotFolded"]) == (1, 0)
        assert 0 <= shown["ageSeconds"] < 20
        assert shown["bytes"] > 0
        assert shown["toReplayBytes"] <= before["toReplayBytes"]
        assert "checkpoint.save" in (config.storage.path / "audit.jsonl").read_text()
        ticket = service.pipeline.in_flight.enter()
        with monkeypatch.context() as impatient:
            seconds = "betrace.service.api.endpoints.checkpoints.CHECKPOINT_SECONDS"
            impatient.setattr(seconds, 0.1)
            error = await client.post(path, 503)
        assert ("behind" in error["message"], "/readyz" in error["hint"]) == (True, True)
        service.pipeline.in_flight.leave(ticket)
        await client.post(path)
    async with running(config) as service:
        assert (await ApiClient(service).get(path))["covers"]["tenants"] == 1


async def test_a_checkpoint_covers_everything_before_it(config):
    async with running(config, die=True) as service:
        await send(service, [S(i) for i in range(1, 2000)])
        await folded(service)
        assert await service.recovery.save()
        await send(service, [S(5000, "b")])
        await folded(service)
    async with running(config) as service:
        assert service.recovery.replayed.spans == 1
        await closed(service)
        assert (await spans_in_index(service, {TRACE_ID}))[TRACE_ID] == 2000


async def test_a_verdict_changed_by_late_spans_around_a_crash_is_retracted(config):
    """After the last checkpoint the trace was closed, its breach was stored, a late span arrived,
    and the process died."""
    async with running(config, die=True) as service:
        await send(service, [S(1), S(2)])
        await closed(service)
        assert (TRACE_ID, "two") in active_signals(service)
        await send(service, [S(3)])
    async with running(config) as service:
        await closed(service)
        assert (TRACE_ID, "two") not in active_signals(service)
        assert active_signals(service) == expected([S(1), S(2), S(3)])


async def test_a_long_trace_closed_before_a_crash_is_not_counted_twice(config):
    """More spans than are remembered by id are read from the log again."""
    spans = [S(i, "x") for i in range(1, 3001)]
    async with running(config, die=True) as service:
        await send(service, spans)
        await closed(service)
        assert (await spans_in_index(service, {TRACE_ID}))[TRACE_ID] == 3000
    for _ in range(2):
        async with running(config, die=True) as service:
            await closed(service)
            assert (await spans_in_index(service, {TRACE_ID}))[TRACE_ID] == 3000


async def test_a_damaged_checkpoint_is_skipped(config, caplog):
    async with running(config, die=True) as service:
        await send(service, [S(1), S(2)])
        await folded(service)
        await service.recovery.save()
    for path in (config.storage.path / "checkpoints").glob("*.checkpoint"):
        path.write_bytes(path.read_bytes()[:-10])
    async with running(config) as service:
        assert service.recovery.replayed.spans == 2
        await closed(service)
        assert (TRACE_ID, "two") in active_signals(service)
    assert "skipped checkpoint" in caplog.text


async def test_a_checkpoint_that_cannot_be_used_loses_nothing(config, monkeypatch, caplog):
    """Its rules compile to other checks, as in another version, so the whole log is read."""
    async with running(config, die=True) as service:
        await send(service, [S(1), S(2)])
        await send(service, [S(1)], tenant="other")
        await folded(service)
        await service.recovery.save()

    def refuse(*_: Any) -> None:
        raise ValueError("compile to other checks now")

    monkeypatch.setattr("betrace.service.traces.tenant_traces.TenantTraces.restored", refuse)
    async with running(config) as service:
        assert service.recovery.replayed.spans == 3
        await closed(service)
        assert (TRACE_ID, "two") in active_signals(service)
    assert "cannot be used" in caplog.text


async def test_checkpoints_that_cannot_be_written_are_counted(config, monkeypatch, caplog):
    async with running(config, die=True) as service:

        def full(*_: Any) -> None:
            raise OSError(28, "no space left on device")

        monkeypatch.setattr("betrace.service.pipeline.recovery.recovery.write_checkpoint", full)
        before = service.recovery.failures, service.recovery.saved_at
        assert not await service.recovery.save()
        assert service.recovery.failures > before[0]
        assert service.recovery.saved_at == before[1]
    assert "check the disk" in caplog.text


async def test_a_checkpoint_waits_until_everything_that_left_the_traces_is_stored(config):
    async with running(config, die=True) as service:
        ticket = service.pipeline.in_flight.enter()
        with trio.move_on_after(0.3) as waited:
            await service.recovery.save()
        assert waited.cancelled_caught
        service.pipeline.in_flight.leave(ticket)
        with trio.fail_after(60):
            assert await service.recovery.save()


async def test_checkpoints_are_saved_while_the_service_runs(tmp_path):
    config = settings(tmp_path, checkpoint={"interval_seconds": 0.2})
    async with running(config) as service:
        with trio.fail_after(60):
            while service.recovery.saved_at is None:
                await trio.sleep(0.05)
        assert list((tmp_path / "data/checkpoints").glob("*.checkpoint"))


async def test_a_checkpoint_waits_while_a_restart_would_read_little(tmp_path, monkeypatch):
    config = settings(tmp_path, checkpoint={"interval_seconds": 0.1, "max_interval_seconds": 9e6})
    looks, beyond = [], 0
    monkeypatch.setattr(Recovery, "_beyond", lambda self, progress: looks.append(1) or beyond)
    async with running(config) as service:
        with trio.fail_after(60):
            while len(looks) < 3:
                await trio.sleep(0.02)
            first, beyond = service.recovery.saved_at, config.checkpoint.log_bytes
            while service.recovery.saved_at == first:
                await trio.sleep(0.02)
    assert first is not None


async def test_a_damaged_frame_does_not_hide_the_others(config):
    async with running(config, die=True) as service:
        for number in (1, 2, 3):
            await send(service, [S(number, "x" * 50)])
        await folded(service)
    segment = max(config.storage.path.rglob("*.seg"), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    middle = data.index(b"x" * 50, data.index(b"x" * 50) + 50)
    data[middle] ^= 1
    segment.write_bytes(data)
    async with running(config) as service:
        await closed(service)
        assert (await spans_in_index(service, {TRACE_ID}))[TRACE_ID] == 2


async def test_a_lower_body_limit_does_not_prevent_reading_the_log(tmp_path):
    async with running(settings(tmp_path), die=True) as service:
        assert await send(service, [S(i, "x" * 200) for i in range(1, 200)]) == Done(199)
    smaller = settings(tmp_path, ingest={"address": "off", "max_body_bytes": 10_000})
    async with running(smaller) as service:
        assert service.recovery.replayed.spans == 199
        await closed(service)
        assert (await spans_in_index(service, {TRACE_ID}))[TRACE_ID] == 199
