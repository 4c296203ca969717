"""The numbers of /api/performance: rates, latencies, stages."""

from __future__ import annotations

import json

import pytest
import trio

from betrace.service.api import performance
from betrace.service.telemetry.window import RELATIVE_ERROR
from tests.support.inprocess import closed, folded, running, send, settings, write_rules
from tests.support.spans import S

STAGES = ("span-ingestion", "trace-correlation", "rule-evaluation", "storage-write", "projection")


@pytest.mark.one_process("ingestion and evaluation are stages of other nodes")
async def test_rates_and_latencies_after_work(tmp_path):
    write_rules(tmp_path, {"r": "never { a }"})
    async with running(settings(tmp_path)) as service:
        before = service.tools.performance.metrics()
        assert before["spanIngestionRate"] == 0
        assert before["ruleEvaluationP99"] is None
        assert before["stages"]["projection"]["latencyMs"] == {
            "p50": None,
            "p95": None,
            "p99": None,
        }
        began = trio.current_time()
        for number in range(30):
            await send(service, [S(number), S(number)])
        await folded(service)
        await closed(service)
        await trio.sleep(performance.SHARED_SECONDS)
        found = service.tools.performance.metrics()
        elapsed = trio.current_time() - began
        assert found["spanIngestionRate"] == pytest.approx(60 / elapsed, rel=0.9)
        assert found["duckDBInsertThroughput"] > 0
        for name in ("ruleEvaluationP99", "tigerBeetleWriteLatency", "duckDBWriteLatency"):
            assert 0 < found[name] < 10_000, name
        assert found["endToEndP99"] > 0
        assert found["activeTenants"] == 1
        assert found["memoryUsageMB"] > 10
        assert found["uptime"] > 0
        assert found["windowSeconds"] == 60
        assert set(found["spansRefused"]) >= {"overloaded", "quota"}
        for name in STAGES:
            stage = found["stages"][name]
            assert stage["in"] == stage["out"] > 0
            assert stage["unitsIn"] == stage["unitsOut"] >= stage["out"]
            assert stage["rate"] > 0
            latency = stage["latencyMs"]
            assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
            assert stage["errors"] == stage["dead"] == 0
            assert stage["lastError"] is None
            assert stage["lastProgress"] > 1.6e9
        assert found["stages"]["span-ingestion"]["unit"] == "spans"
        assert json.loads(json.dumps(found)) == found


async def test_a_latency_is_as_exact_as_documented(tmp_path):
    async with running(settings(tmp_path)) as service:
        observe = service.latencies.ledger.observe
        for milliseconds in range(1, 101):
            observe(milliseconds / 1000)
        found = service.tools.performance.metrics()["tigerBeetleWriteLatency"]
        assert found == pytest.approx(99, rel=RELATIVE_ERROR)


@pytest.mark.one_process("ingestion and evaluation are stages of other nodes")
async def test_simultaneous_requests_share_quantiles_but_not_totals(tmp_path, monkeypatch):
    monkeypatch.setattr(performance, "SHARED_SECONDS", 60)
    async with running(settings(tmp_path)) as service:
        service.latencies.ledger.observe(0.01)
        first = service.tools.performance.metrics()
        service.latencies.ledger.observe(1)
        await send(service, [S(1)])
        await folded(service)
        again = service.tools.performance.metrics()
        assert again["tigerBeetleWriteLatency"] == first["tigerBeetleWriteLatency"]
        assert again["spansAccepted"] == first["spansAccepted"] + 1
        monkeypatch.setattr(performance, "SHARED_SECONDS", 0)
        service.latencies.ledger.observe(1)
        service.latencies.ledger.observe(1)
        assert service.tools.performance.metrics()["tigerBeetleWriteLatency"] > 900


async def test_the_window_moves_in_a_running_service(tmp_path):
    config = settings(tmp_path, metrics={"address": "off", "window_seconds": 1})
    async with running(config) as service:
        service.latencies.ledger.observe(1)
        assert service.tools.performance.metrics()["tigerBeetleWriteLatency"] > 900
        with trio.fail_after(60):
            while service.tools.performance.metrics()["tigerBeetleWriteLatency"] is not None:
                await trio.sleep(0.05)


async def test_channels_caches_and_the_process(client):
    path = "/api/performance"
    queues = (await client.get(f"{path}/queue-stats"))["queues"]
    assert [queue["name"] for queue in queues] == list(STAGES)
    assert [queue["unit"] for queue in queues] == ["spans", "spans", "traces", "rows", "rows"]
    assert await client.get(f"{path}/queue-stats/span-ingestion") == queues[0]
    error = await client.get(f"{path}/queue-stats/span-ingest", 404)
    assert error["hint"] == "did you mean span-ingestion?"
    assert (await client.get(f"{path}/metrics"))["spanIngestionRate"] == 0
    assert (await client.get(f"{path}/trace-windows"))["activeWindows"] == 0
    system = await client.get(f"{path}/system-stats")
    assert system.keys() == {"memory", "cpu", "threads", "gc", "uptime"}
    assert system["threads"] > 0
    assert (await client.get(f"{path}/cache-stats"))["ruleContainers"]["hitCount"] == 0
