"""The caches of a running service: filled, emptied, counted, and never wrong."""

from __future__ import annotations

import orjson
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from betrace.service.tenancy import changes
from tests.support.api_client import ApiClient
from tests.support.inprocess import closed, folded, running, send, settings, write_rules
from tests.support.spans import S

NAMES = ("ruleContainers", "publicKeys", "traceMetadata")


@pytest.fixture
def config(tmp_path):
    write_rules(tmp_path, {"many": "count(a) > 1", "no-b": "not b"})
    write_rules(tmp_path, {"many": "count(a) > 1"}, "acme")
    return settings(tmp_path, caches={"warm_up_seconds": 0.1})


async def look(service, tenant="default"):
    """The traces of the tenant's signals, as a user opens them."""
    client = ApiClient(service)
    signals = (await client.get("/api/v1/signals", x_scope_orgid=tenant))["signals"]
    return {
        each: await client.get(f"/api/v1/traces/{each}", x_scope_orgid=tenant)
        for each in {signal["trace_id"] for signal in signals}
    }


def stats(service, name="traceMetadata"):
    return service.caches.statistics()[name]


async def test_caches_are_warm_soon_after_the_start(config, caplog):
    caplog.set_level("INFO", "service")
    async with running(config) as service:
        with trio.fail_after(60):
            while "caches are warm" not in caplog.text:
                await trio.sleep(0.02)
        assert stats(service, "ruleContainers")["size"] == 2
        assert stats(service, "ruleContainers")["missCount"] == 0
        await send(service, [S(1)], "acme")
        await folded(service)
        assert stats(service, "ruleContainers")["hitCount"] >= 1


async def test_a_warm_up_loads_rules_keys_and_traces(config, tmp_path):
    path = "/api/performance/cache-invalidate"

    async def dropped(cache):
        return (await ApiClient(service).post(f"{path}/{cache}", x_operator="kim"))["invalidated"]

    key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    async with running(config) as service:
        service.gate.directory.change("acme", changes.create(None, key))
        await send(service, [S(1), S(2)], "acme")
        await closed(service)
        for name in NAMES:
            await dropped(name)
        found = await ApiClient(service).post("/api/admin/cache-warmup")
        assert found["failed"] == 0
        assert {name: stats(service, name)["size"] for name in NAMES} == {
            "ruleContainers": 2,
            "publicKeys": 1,
            "traceMetadata": 1,
        }
        assert found["loaded"] >= 4
        await look(service, "acme")
        assert (stats(service)["hitCount"], stats(service)["missCount"]) == (1, 0)
        assert await dropped("publicKeys?tenantId=default") == 0
        assert await dropped("publicKeys?tenantId=acme") == 1
        assert await dropped("ruleContainers?tenantId=acme") == 1
        assert stats(service, "ruleContainers")["size"] == 1
    audit = [orjson.loads(x) for x in (tmp_path / "data/audit.jsonl").read_bytes().splitlines()]
    assert {each["action"] for each in audit} == {"cache.invalidate", "cache.warm-up"}
    assert {"cache": "publicKeys", "tenant": "acme", "operator": "kim"}.items() <= audit[-2].items()


@pytest.mark.also_on_cluster
async def test_a_second_view_of_a_trace_is_a_hit(config):
    async with running(config) as service:
        await send(service, [S(1), S(2)])
        await closed(service)
        first = await look(service)
        assert len(first) == 1
        again = await look(service)
        assert again == first
        assert (stats(service)["hitCount"], stats(service)["missCount"]) == (1, 1)


async def test_traces_of_new_signals_are_loaded_ahead_for_tenants_with_viewers(config):
    async with running(config) as service:
        await look(service)
        await send(service, [S(1), S(2)])
        await send(service, [S(1), S(2)], "acme")
        await closed(service)
        with trio.fail_after(60):
            while not stats(service)["size"]:
                await trio.sleep(0.02)
        assert await look(service)
        assert (stats(service)["hitCount"], stats(service)["missCount"]) == (1, 0)
        assert stats(service)["size"] == 1  # nobody views acme


async def test_a_trace_viewed_while_open_is_loaded_when_it_closes(config):
    async with running(config) as service:
        await send(service, [S(1), S(2)])
        seen = None
        with trio.fail_after(60):
            while seen is None:  # the trace is open, its early signal may not be stored yet
                trace = S(1).trace.hex()
                seen = await trio.to_thread.run_sync(service.tools.reader.trace, "default", trace)
            while not stats(service)["size"]:
                await trio.sleep(0.02)
        asked = stats(service)["missCount"]
        (after,) = (await look(service)).values()
        assert after["state"] == "closed"
        assert (stats(service)["hitCount"], stats(service)["missCount"]) == (1, asked)


async def test_late_spans_are_visible_and_verdicts_are_as_without_a_cache(config, tmp_path):
    """A trace viewed before and after late spans, after it left memory."""
    config = settings(tmp_path, caches={"trace_metadata": 1})
    async with running(config) as service:
        await send(service, [S(1)])
        await closed(service)
        (before,) = (await look(service)).values()
        assert before["spans"] == 1
        assert before["verdicts"]["no-b"]["verdict"] == "breach"
        await send(service, [S(9, name="x", trace=b"\2" * 16)], "acme")
        with trio.fail_after(60):
            while service.pipeline.open_traces.tenants["default"].closed_count:
                await trio.sleep(0.1)
        (before,) = (await look(service)).values()
        await send(service, [S(2), S(3, name="b")])
        await closed(service)
        (after,) = (await look(service)).values()
        assert service.pipeline.history.recalled == 1
        assert after["spans"] == 3
        assert len(after["signals"]) == 3
        assert after["verdicts"]["many"]["verdict"] == "breach"
        assert after["verdicts"]["no-b"]["verdict"] == "kept"
        service.trace_metadata.cache.invalidate_where()
        assert list((await look(service)).values()) == [after]
