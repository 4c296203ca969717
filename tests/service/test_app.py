"""The service as a whole: its states, what it reports, and how it stops."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest
import trio

from betrace.service.api.components import components
from betrace.service.app.builder import open_service
from betrace.service.pipeline.request import Done
from betrace.service.storage.spanlog.log import LogSyncError
from tests.support.inprocess import closed, folded, running, send, settings, write_rules
from tests.support.spans import TRACE, S


@pytest.fixture
def config(tmp_path):
    write_rules(tmp_path, {"many": "count(a) > 1", "no-b": "always { b }"})
    return settings(tmp_path)


async def test_it_is_ready_only_while_it_runs(config):
    with ExitStack() as stack:
        service = open_service(config, stack)()
        assert not service.sources.ready
        assert components(service.sources)["service"]["status"] == "starting"
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(service.run)
            assert set(dataclasses.astuple(addresses)) == {None}
            assert service.sources.ready
            assert components(service.sources)["service"]["status"] == "ok"
            service.stop()
        assert not service.sources.ready
        service.close()


async def test_readiness_ends_before_the_drain(tmp_path):
    config = settings(tmp_path, shutdown={"delay_seconds": 0.3, "grace_seconds": 20})
    async with running(config) as service:
        service.stop()
        await trio.sleep(0.1)
        assert not service.sources.ready
        assert components(service.sources)["service"]["status"] == "stopping"
        assert await send(service, [S(1)]) == Done(1)  # requests during the delay are accepted


async def test_listeners_have_addresses(tmp_path):
    anywhere = {"address": "127.0.0.1:0"}
    ingest = anywhere | {"grpc_address": "127.0.0.1:0"}
    config = settings(tmp_path, ingest=ingest, api=anywhere, metrics=anywhere)
    with ExitStack() as stack:
        service = open_service(config, stack)()
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(service.run)
            urls = set(dataclasses.astuple(addresses))
            assert len(urls) == 4
            assert all(url.startswith("http://127.0.0.1:") for url in urls)
            service.stop()
        service.close()


async def test_everything_it_reports_adds_up(config):
    async with running(config) as service:
        await send(service, [S(1), S(2), S(2)])
        await folded(service)
        assert service.sources.account().in_flight == 0
        await closed(service)
        numbers = service.tools.performance.metrics()
        assert numbers["spansAccepted"] == numbers["spansEvaluated"] == 3
        assert numbers["spansInFlight"] == 0
        assert numbers["signalsRaised"] == 2
        assert numbers["stages"]["storage-write"]["out"] >= 1
        assert numbers["stages"]["storage-write"]["errors"] == 0
        rows = {row["name"]: row for row in service.tools.performance.queues()}
        assert rows["span-ingestion"]["capacity"] == config.pipeline.ingest_capacity_spans
        assert rows["span-ingestion"]["peak"] >= 1
        assert rows["span-ingestion"]["currentSize"] == 0
        assert service.tools.performance.system()["threads"] > 1
        assert service.tools.performance.trace_windows()["memoryBytes"] >= 0
        assert all(part["status"] == "ok" for part in components(service.sources).values())
        assert {"hitCount", "missCount"} <= service.caches.statistics()["ruleContainers"].keys()


async def test_signals_are_sent_to_subscribers(config):
    async with running(config) as service:
        mine, other = service.subscriptions.open("default"), service.subscriptions.open("other")
        await send(service, [S(1), S(2)])
        with trio.fail_after(60):
            told = {(await mine.receive()).rule_id for _ in range(2)}
        assert told == {"many", "no-b"}
        service.stop()
        with trio.fail_after(60), pytest.raises(trio.EndOfChannel):
            await other.receive()


async def test_a_wrong_rule_file_is_reported_and_the_old_rules_stay_in_force(
    config, tmp_path, caplog
):
    async with running(config) as service:
        (tmp_path / "rules/default/rules.yaml").write_text("rules: [{id: x, condition: '('}]")
        await service.reload_rules()
        await service.reload_rules()
        assert components(service.sources)["rules"]["status"] == "degraded"
        assert caplog.text.count("rule file rejected") == 1  # once for each problem
        await send(service, [S(1), S(2)])
        await closed(service)
        assert service.tools.performance.metrics()["signalsRaised"] == 2
        write_rules(tmp_path, {"many": "count(a) > 5"})
        await service.reload_rules()
        assert components(service.sources)["rules"]["status"] == "ok"


async def test_a_disk_that_does_not_sync_is_reported(config, monkeypatch):
    async with running(config) as service:
        sync, error = service.pipeline.sync, LogSyncError(["default"], OSError("away"))
        sync._note(error)
        assert components(service.sources)["span-log"]["status"] == "degraded"
        sync._note(None)
        assert components(service.sources)["span-log"]["status"] == "ok"
        assert "1 sync failures" in components(service.sources)["span-log"]["detail"]


async def test_a_stage_that_is_paused_or_stalls_is_reported(tmp_path):
    config = settings(tmp_path, pipeline={"stall_seconds": 0.2})
    async with running(config) as service:
        stage = service.pipeline.stages["trace-correlation"]
        stage.pause()
        assert components(service.sources)["trace-correlation"]["status"] == "degraded"
        await send(service, [S(1)])
        assert service.sources.account().in_flight == 1
        stage.resume()
        release = trio.Event()
        handler = stage._handler

        async def slow(items: object) -> None:
            await release.wait()
            await handler(items)  # type: ignore[arg-type]

        await folded(service)
        stage._handler = slow  # type: ignore[assignment]
        await send(service, [S(2)])
        with trio.fail_after(60):
            while components(service.sources)["trace-correlation"]["status"] != "failed":
                await trio.sleep(0.05)
        release.set()
        await folded(service)
        assert components(service.sources)["trace-correlation"]["status"] == "ok"


async def test_open_traces_continue_after_a_restart(tmp_path):
    write_rules(tmp_path, {"two": "count(a) == 2"})
    config = settings(tmp_path, traces={"idle_seconds": 60})
    async with running(config) as service:
        await send(service, [S(1)])
    async with running(config) as service:
        assert service.recovery.replayed.spans == 0
        assert sum(t.open_count for t in service.pipeline.open_traces.tenants.values()) == 1
        await send(service, [S(2, complete=True)])
        await closed(service)
        assert service.tools.performance.metrics()["signalsRaised"] == 1
        found = await trio.to_thread.run_sync(service.store.find_traces, "default", [TRACE.hex()])
        assert found[TRACE.hex()].spans == 2


async def test_a_new_data_directory_has_a_rules_directory_and_no_problems(tmp_path):
    config = settings(tmp_path, rules={"directory": ""})
    async with running(config) as service:
        assert components(service.sources)["rules"]["status"] == "ok"
    assert (config.storage.path / "rules").is_dir()
