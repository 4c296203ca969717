"""The stages together, in this process: from the request to the ledger, and back from failures."""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np
import pytest
import trio

from betrace.service.pipeline import scanning
from betrace.service.pipeline.request import Done, Refused
from betrace.service.storage.spanlog.errors import LogWriteError
from betrace.service.storage.spanlog.log import LogSyncError
from tests.support.inprocess import (
    active_signals,
    closed,
    folded,
    ledger_signals,
    request,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.spans import TRACE, S, body

RULES = {"many": "count(a) > 2", "no-b": "always { b }", "one": "count(a) == 1"}
TRACE_ID = TRACE.hex()
OTHER = b"\2" * 16


@pytest.fixture
def config(tmp_path):
    write_rules(tmp_path, RULES)
    return settings(tmp_path)


async def test_from_a_request_to_the_ledger_and_the_index(config):
    async with running(config) as service:
        outcome = await send(service, [S(1), S(2), S(3), S(9, trace=OTHER)])
        assert outcome == Done(4)
        await closed(service)
        assert active_signals(service) == {
            (TRACE_ID, "many"),
            (TRACE_ID, "no-b"),
            (OTHER.hex(), "no-b"),
            (OTHER.hex(), "one"),
        }
        early = {s.rule_id for s in ledger_signals(service) if s.early}
        assert early == {"many"}
        found = await trio.to_thread.run_sync(
            service.store.find_traces, "default", [TRACE_ID, OTHER.hex(), "f" * 32]
        )
        assert {trace: row.spans for trace, row in found.items()} == {TRACE_ID: 3, OTHER.hex(): 1}


async def test_tenants_are_isolated(config, tmp_path):
    write_rules(tmp_path, {"any": "a"}, tenant="shop")
    async with running(config) as service:
        await send(service, [S(1), S(2, "b")], tenant="shop")
        await send(service, [S(1), S(2, "b")])
        await send(service, [S(1)], tenant="nobody")
        await closed(service)
        assert active_signals(service, "shop") == {(TRACE_ID, "any")}
        assert active_signals(service) == {(TRACE_ID, "one")}
        assert active_signals(service, "nobody") == set()


async def test_closing_drains_what_was_accepted(config):
    async with running(config) as service:
        for number in range(50):
            trace = bytes([number + 1]) * 16
            asked = request(body(*(S(i, trace=trace) for i in range(1, 5))), weight=4)
            await service.pipeline.requests.send(asked)
        await send(service, [S(1)])
        service.pipeline.close()
        with trio.fail_after(60):
            await service.pipeline.finished.wait()
        assert len(service.pipeline.in_flight) == 0
        raised = {s.trace_id for s in ledger_signals(service) if s.rule_id == "many"}
        assert len(raised) == 50  # early; the rest waits in the traces that are still open


@pytest.mark.parametrize(
    ("data", "more", "status"),
    [
        (b"\xff", {}, 400),
        (b"{", {"content_type": "json"}, 400),
        (b"no gzip", {"encoding": "gzip"}, 400),
        (gzip.compress(b"\0" * 30_000_000), {"encoding": "gzip"}, 413),
    ],
    ids=["protobuf", "json", "gzip", "too large"],
)
async def test_only_the_request_that_cannot_be_decoded_is_refused(config, data, more, status):
    async with running(config) as service:
        bad = request(data, **more)
        good = request(body(S(1)))
        for asked in (bad, good):
            await service.pipeline.requests.send(asked)
        refused = await bad.reply.wait()
        assert isinstance(refused, Refused)
        assert refused.status == status
        assert await good.reply.wait() == Done(1)
        assert service.pipeline.ingest.counts.refused_requests == 1
        assert service.log.statistics().frames == 1


async def test_spans_with_invalid_ids_are_rejected(config):
    async with running(config) as service:
        outcome = await send(service, [S(1), S(0), S(2, trace=b"\0" * 16)])
        assert isinstance(outcome, Done)
        assert (outcome.spans, outcome.rejected) == (1, 2)
        assert "1 spans have a trace id" in outcome.message
        assert "1 spans have a span id" in outcome.message
        nothing = await send(service, [S(0)])
        assert isinstance(nothing, Done)
        assert nothing.spans == 0
        assert await send(service, []) == Done(0)
        assert service.log.statistics().frames == 1
        counts = service.pipeline.ingest.counts
        assert (counts.accepted, counts.rejected) == (1, 3)


async def test_requests_are_refused_without_a_trace_if_the_log_cannot_be_written(
    config, monkeypatch
):
    async with running(config) as service:

        def fail(*_: Any) -> None:
            raise LogWriteError("the disk is full")

        with monkeypatch.context() as broken:
            broken.setattr(service.log, "append", fail)
            refused = await send(service, [S(1), S(2), S(3)])
        assert isinstance(refused, Refused)
        assert refused.status == 503
        assert service.sources.account().in_flight == 0
        assert service.pipeline.progress.snapshot() == {}
        assert service.pipeline.ingest.counts.accepted == 0
        assert await send(service, [S(1)]) == Done(1)
        await closed(service)
        assert active_signals(service) == {(TRACE_ID, "one"), (TRACE_ID, "no-b")}


async def test_ack_synced_waits_for_the_disk(tmp_path, monkeypatch):
    write_rules(tmp_path, RULES)
    async with running(settings(tmp_path, log={"ack": "synced"})) as service:
        synced: list[Any] = []
        sync = service.log.sync

        def note(tenants: Any = None) -> int:
            done = sync(tenants)
            synced.append(tenants)
            return done

        monkeypatch.setattr(service.log, "sync", note)
        assert await send(service, [S(1)]) == Done(1)
        assert {"default"} in synced
        assert service.log.synced("default") == service.log.end("default")


async def test_a_failed_sync_refuses_the_affected_requests(tmp_path, monkeypatch):
    write_rules(tmp_path, RULES)
    async with running(settings(tmp_path, log={"ack": "synced"})) as service:

        def fail(tenants: Any) -> int:
            if tenants is None or "default" in tenants:
                raise LogSyncError(["default"], OSError(5, "I/O error"))
            return 0

        with monkeypatch.context() as broken:
            broken.setattr(service.log, "sync", fail)
            bad, good, odd = request(body(S(1))), request(body(S(1)), "other"), request(b"\xff")
            for asked in (bad, good, odd):
                await service.pipeline.requests.send(asked)
            refused = await bad.reply.wait()
            assert isinstance(refused, Refused)
            assert refused.status == 503
            assert await good.reply.wait() == Done(1)
            wrong = await odd.reply.wait()
            assert isinstance(wrong, Refused)
            assert wrong.status == 400  # a retry would not help
        # The client sends it again, and it counts once.
        assert await send(service, [S(1)]) == Done(1)
        await closed(service)
        assert (TRACE_ID, "one") in active_signals(service)
        assert service.sources.account().balance == 0


async def test_a_redelivered_batch_is_folded_once(tmp_path, monkeypatch):
    write_rules(tmp_path, {"two": "count(a) > 1", "one": "count(a) == 1"})
    config = settings(tmp_path, redelivery={"delay_seconds": 0.01})
    async with running(config) as service:
        open_traces = service.pipeline.open_traces
        fold = open_traces.fold
        failures = 0

        def sometimes(*args: Any) -> Any:
            nonlocal failures
            failures += 1
            if failures in (2, 3):
                raise RuntimeError("injected")
            return fold(*args)

        monkeypatch.setattr(open_traces, "fold", sometimes)
        for number in range(1, 6):
            trace = bytes([number]) * 16
            # More spans than are remembered, so that folding twice would count them twice.
            spans = [S(i, "x", trace=trace) for i in range(1, 1200)] + [S(5000, trace=trace)]
            await service.pipeline.requests.send(request(body(*spans), weight=1200))
        await closed(service)
        assert failures > 3
        assert {rule for _, rule in active_signals(service)} == {"one"}
        assert len(active_signals(service)) == 5
        repeated = sum(int(t.arrays.slots[:, 9].sum()) for t in tables(service))
        assert repeated == 0
        assert open_traces.counts.folded == 6000


def tables(service: Any) -> list[Any]:
    return [
        table for traces in service.pipeline.open_traces.tenants.values() for table in traces.tables
    ]


async def test_only_the_request_that_makes_the_stage_fail_is_refused(config, monkeypatch):
    async with running(config) as service:
        decode = scanning.decode

        def fail(asked: Any, most: int, quick: bool = False) -> Any:
            if asked.body == b"poison":
                raise RuntimeError("injected")
            return decode(asked, most, quick)

        monkeypatch.setattr(scanning, "decode", fail)
        asked = [request(body(S(1))), request(b"poison", "bad"), request(body(S(2)), "other")]
        for each in asked:
            await service.pipeline.requests.send(each)
        outcomes = [await each.reply.wait() for each in asked]
        assert outcomes[0] == outcomes[2] == Done(1)
        assert isinstance(outcomes[1], Refused)
        assert outcomes[1].status == 503
        await closed(service)
        # Frames appended before the failure do not stay pending forever.
        assert all(not pending for _, pending in service.pipeline.progress.snapshot().values())
        assert service.log.statistics().frames == 2


@pytest.mark.parametrize("capacity", [1, 5000])
async def test_the_service_stops_in_time_even_if_a_stage_hangs(tmp_path, monkeypatch, capacity):
    write_rules(tmp_path, RULES)
    config = settings(
        tmp_path,
        shutdown={"delay_seconds": 0, "grace_seconds": 1},
        pipeline={"evaluate_capacity_traces": capacity, "evaluate_batch_traces": 1},
    )
    release = trio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        await release.wait()

    with trio.fail_after(60):
        async with running(config) as service:
            monkeypatch.setattr(service.pipeline.evaluate._threads, "run", hang)
            for number in range(1, 30):
                await send(service, [S(1, trace=bytes([number]) * 16)])
            await trio.sleep(0.5)


async def test_changed_rules_apply_to_new_traces(config, tmp_path):
    async with running(config) as service:
        await send(service, [S(1)])
        await folded(service)
        write_rules(tmp_path, {"new": "a"})
        await service.reload_rules()
        await send(service, [S(2), S(3, trace=OTHER)])
        await closed(service)
        assert active_signals(service) == {(TRACE_ID, "no-b"), (OTHER.hex(), "new")}


async def test_late_spans_retract(config):
    async with running(config) as service:
        await send(service, [S(1)])
        await closed(service)
        assert active_signals(service) == {(TRACE_ID, "one"), (TRACE_ID, "no-b")}
        await send(service, [S(2, "b"), S(3)])
        await closed(service)
        assert active_signals(service) == set()
        kinds = [(s.rule_id, str(s.kind)) for s in ledger_signals(service)]
        assert sorted(kinds) == [
            ("no-b", "raised"),
            ("no-b", "retracted"),
            ("one", "raised"),
            ("one", "retracted"),
        ]


async def test_a_trace_can_be_looked_up_while_it_is_open_and_after(config):
    async with running(config) as service:
        await send(service, [S(1), S(2)])
        look_up = service.pipeline.open_traces.look_up
        with trio.fail_after(60):
            while (found := await trio.to_thread.run_sync(look_up, "default", TRACE_ID)) is None:
                await trio.sleep(0.01)
        assert not found.closed
        assert len(found) == 1
        await closed(service)
        found = await trio.to_thread.run_sync(look_up, "default", TRACE_ID)
        assert found is not None
        assert found.closed
        assert np.array_equal(found.trace_ids()[0], np.frombuffer(TRACE, np.uint8))
        assert look_up("default", "f" * 32) is None
        assert look_up("nobody", TRACE_ID) is None
