"""A query node stores what the partitions decided, once, whatever happens to it."""

from __future__ import annotations

import shutil

import orjson
import pytest
import trio

from betrace.service.api.app import create_api
from betrace.service.api.components import components
from betrace.service.cluster import output
from betrace.service.cluster.query.applied import read_cursors
from betrace.service.otlp.partition import partition_of
from betrace.service.storage.jetstream.bucket import Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.generations import (
    PARTITIONS_KEY,
    Finished,
    Generations,
    finished_key,
)
from betrace.service.storage.paths import tenant_directory
from betrace.service.storage.undecided import UndecidedTrace
from betrace.service.traces.verdicts import Decided
from tests.support.failing_stores import due, signal
from tests.support.inprocess import ledger_signals, running, settings, write_rules
from tests.support.query_nodes import FedNode, ListedOut, retraction


@pytest.fixture
def config(tmp_path):
    write_rules(tmp_path, {"many": "count(a) > 1"}, "acme")
    return settings(tmp_path)


def decided(*numbers, tenant="acme", signals=()):
    found = due(*numbers, tenant=tenant)
    return Decided(tenant, [signal(n, tenant) for n in signals], found if numbers else None)


def stored(service, tenant="acme"):
    signals, _ = service.store.signals(tenant)
    return {each.signal.id: each.status for each in signals}


async def test_what_was_decided_reaches_the_ledger_and_duckdb(config):
    node = FedNode()
    node.outs[0].add_bytes(b"")  # the record of an epoch
    node.outs[0].add(decided(1, 2, signals=[1]))
    node.outs[1].add(decided(3), decided(4, tenant="shop", signals=[4]))
    async with node.running(config) as service:
        await node.applied(service)
        assert {each.id for each in ledger_signals(service, "acme")} == {signal(1).id}
        assert {each.id for each in ledger_signals(service, "shop")} == {signal(4, "shop").id}
        assert stored(service) == {signal(1).id: "active"}
        assert service.store.counts("acme").traces == 3
        assert service.store.counts("shop").traces == 1
        assert service.node.positions.all() == {0: 2, 1: 1}


async def test_it_says_how_far_each_partition_is(config):
    node = FedNode()
    node.outs[0].add(decided(1))
    async with node.running(config) as service:
        await node.applied(service)
        with trio.fail_after(60):
            while (shown := service.node.shown())["partitions"][0]["last"] != 1:
                await trio.sleep(0.02)
        assert shown["node"] == "query-1"
        assert shown["roles"] == ["query"]
        first, second = shown["partitions"]
        assert first["owner"] == "evaluator-1"
        assert (first["applied"], first["lag"], first["counts"]["evaluated"]) == (1, 0, 1)
        assert (second["applied"], second["owner"], second["counts"]) == (0, None, None)
        assert components(service.sources)["cluster"]["status"] == "ok"
        metrics = (await service.tools.exposition.scrape()).decode()
        assert 'betrace_cluster_applied_sequence{partition="0"} 1.0' in metrics
        assert 'betrace_cluster_node_info{node="query-1",roles="query"} 1.0' in metrics
        assert 'betrace_cluster_applied_items_total{partition="0"} 1.0' in metrics
        values = [line for line in metrics.splitlines() if line.startswith("betrace_span_inges")]
        assert values == ["betrace_span_ingestion_total 77.0"]
        assert components(service.sources)["edge"]["status"] == "ok"


async def test_a_restart_continues_where_it_stopped(config):
    node = FedNode()
    node.outs[0].add(decided(1, signals=[1]))
    async with node.running(config) as service:
        await node.applied(service)
    saved = read_cursors(config.storage.path / "cursors.json")
    assert saved.applied == {0: 1}
    assert saved.tenants == {"acme"}
    node.outs[0].add(decided(2, signals=[2]))
    async with node.running(config) as service:
        await node.applied(service)
        assert service.pipeline.record.counts.repeated == 0
        assert service.pipeline.record.counts.new == 1
        assert len(stored(service)) == 2


async def test_what_is_applied_again_after_a_crash_changes_nothing(config):
    node = FedNode()
    node.outs[0].add(decided(1, 2, signals=[1, 2]))
    node.outs[0].add(Decided("acme", [retraction(signal(2))], None))
    async with node.running(config, die=True) as service:
        await node.applied(service)
        before = stored(service)
    (config.storage.path / "cursors.json").unlink(missing_ok=True)
    async with node.running(config) as service:
        await node.applied(service)
        assert stored(service) == before
        assert sorted(before.values()) == ["active", "retracted", "retracted"]
        counts = service.pipeline.record.counts
        assert (counts.new, counts.repeated) == (0, 3)
        assert service.store.counts("acme").traces == 2
        assert len(ledger_signals(service, "acme")) == 3


async def test_a_lost_duckdb_file_is_applied_again(config):
    node = FedNode()
    node.outs[0].add(decided(1, signals=[1]))
    node.outs[1].add(decided(5, tenant="quiet"))  # without any signal
    async with node.running(config) as service:
        await node.applied(service)
    for tenant in ("acme", "quiet"):
        file = tenant_directory(config.storage.path, tenant) / "betrace.duckdb"
        file.unlink()
    async with node.running(config) as service:
        await node.applied(service)
        with trio.fail_after(60):
            while service.store.counts("acme").traces < 1 or service.store.incomplete:
                await trio.sleep(0.01)
        assert stored(service) == {signal(1).id: "active"}
        assert service.store.counts("quiet").traces == 1
        assert service.pipeline.record.counts.new == 0


async def test_damage_that_is_met_while_it_runs_is_applied_again(config):
    node = FedNode()
    node.outs[0].add(decided(1, signals=[1]))
    async with node.running(config) as service:
        await node.applied(service)
        reads = node.outs[0].reads
        await trio.to_thread.run_sync(service.store.recreate, "acme")
        service.rebuild._add("acme", anew=True)
        await trio.to_thread.run_sync(service.rebuild.run)
        with trio.fail_after(60):
            while service.store.counts("acme").traces < 1:
                await trio.sleep(0.01)
        assert stored(service) == {signal(1).id: "active"}
        await node.applied(service)
        assert node.outs[0].reads > reads


async def test_a_lost_node_is_rebuilt_from_the_streams(config):
    node = FedNode()
    node.outs[0].add(decided(1, signals=[1]))
    async with node.running(config, die=True) as service:
        await node.applied(service)
    shutil.rmtree(config.storage.path)
    async with node.running(config) as service:
        await node.applied(service)
        assert stored(service) == {signal(1).id: "active"}
        assert service.pipeline.record.counts.new == 1


async def test_a_message_that_cannot_be_read_stops_its_partition_only(config):
    node = FedNode()
    node.outs[0].add_bytes(b"junk")
    node.outs[0].add(decided(1))
    node.outs[1].add(decided(2))
    async with node.running(config) as service:
        with trio.fail_after(60):
            while not service.node.positions.get(1) or not service.node.partitions()[0]["problem"]:
                await trio.sleep(0.01)
        assert service.node.positions.get(0) == 0
        assert "damaged" in service.node.partitions()[0]["problem"]
        assert components(service.sources)["cluster"]["status"] == "degraded"


async def test_a_new_cluster_is_applied_from_its_beginning(config):
    node = FedNode()
    for number in (1, 2):
        node.outs[0].add(decided(number, signals=[number]))
    async with node.running(config) as service:
        await node.applied(service)
    for _ in range(2):
        node = FedNode()
        node.identity = "second"
        node.outs[0].add(decided(3, signals=[3]))
        async with node.running(config) as service:
            await node.applied(service)
            assert len(ledger_signals(service, "acme")) == 3


async def test_the_spans_of_the_cluster_are_counted(config):
    node = FedNode()
    counts = [output.Counts(evaluated=number, spans=10 * number) for number in range(1, 5)]
    node.outs[0].add(decided(1), counts=counts[0])
    async with node.running(config) as service:
        node.outs[0].add(decided(2), counts=counts[1])
        await node.applied(service)
        assert service.node.evaluated_spans() == 20
        assert service.tools.performance.metrics()["spansAccepted"] == 20
        service.node.reread()
        await node.applied(service)
        assert service.node.evaluated_spans() == 20
    async with node.running(config) as service:
        node.outs[0].add(decided(3), counts=counts[2])
        node.outs[0].add(decided(4), counts=counts[3])
        await node.applied(service)
        assert service.node.evaluated_spans() == 10  # the first message says where to begin


async def test_reading_goes_on_once_nats_answers_again(config, monkeypatch):
    monkeypatch.setattr("betrace.service.cluster.query.feed.RETRY_SECONDS", 0.01)
    node = FedNode()
    node.outs[0].failure = NatsUnavailable("no quorum")
    node.outs[0].add(decided(1))
    async with node.running(config) as service:
        with trio.fail_after(60):
            while service.node.partitions()[0]["problem"] != "no quorum":
                await trio.sleep(0.01)
        node.outs[0].failure = None
        await node.applied(service)
        with trio.fail_after(60):
            while service.node.partitions()[0]["problem"] is not None:
                await trio.sleep(0.01)


async def test_what_could_not_be_judged_is_shown(config):
    node = FedNode()
    trace = UndecidedTrace(signal(1).trace_id, "r", "v", "too many spans", 5)
    dead = output.DeadMessage(4, "", "damaged")
    node.outs[0].add(undecided=[output.NotJudged("acme", trace)], dead=[dead])
    async with node.running(config) as service:
        await node.applied(service)
        assert service.tools.undecided.page("acme")[0] == [trace]


async def test_nothing_is_stored_for_deleted_tenants(config):
    node = FedNode()
    async with node.running(config) as service:
        service.gate.closed.add("acme")
        trace = UndecidedTrace(signal(1).trace_id, "r", "v", "too many spans", 5)
        node.outs[0].add(decided(1), undecided=[output.NotJudged("acme", trace)])
        await node.applied(service)
        assert service.store.counts("acme").traces == 0
        assert service.tools.undecided.page("acme")[0] == []


async def test_rules_are_published(config):
    node = FedNode()
    async with node.running(config):
        with trio.fail_after(60):
            while "rules.acme" not in node.bucket.values:
                await trio.sleep(0.01)
    assert [each["id"] for each in orjson.loads(node.bucket.values["rules.acme"])] == ["many"]


async def test_an_open_trace_is_shown_by_its_owner(config):
    node = FedNode()
    trace_id = signal(1).trace_id
    partition = partition_of("acme", bytes.fromhex(trace_id), 2)
    node.open[partition, "acme", trace_id] = due(1, closed=False)
    async with node.running(config) as service:
        reader = service.tools.reader
        found = await trio.to_thread.run_sync(reader.trace, "acme", trace_id)
        assert (found["state"], found["spans"], found["missing"]) == ("open", 1, 1)
        assert await trio.to_thread.run_sync(reader.trace, "shop", trace_id) is None
        node.owner_is_away = True
        assert await trio.to_thread.run_sync(reader.trace, "acme", trace_id) is None


async def test_a_closed_trace_is_shown_from_its_row(config):
    node = FedNode()
    node.outs[0].add(decided(1, signals=[1]))
    async with node.running(config) as service:
        await node.applied(service)
        found = await trio.to_thread.run_sync(
            service.tools.reader.trace, "acme", signal(1).trace_id
        )
        assert (found["state"], found["missing"]) == ("closed", 1)  # its message was deleted
        assert [each["id"] for each in found["signals"]] == [signal(1).id]


async def test_the_api_of_a_query_node(config):
    node = FedNode()
    node.outs[0].add(decided(1, signals=[1]))
    async with node.running(config) as service:
        await node.applied(service)
        client = create_api(service.tools, None, frozenset()).test_client()
        found = await (await client.get("/api/cluster")).get_json()
        assert [each["applied"] for each in found["partitions"]] == [1, 0]
        assert found["nodes"] == [{"name": "query-1", "roles": ["query"], "draining": False}]
        for action, state in (("pause", "paused"), ("resume", "open")):
            answer = await client.post(f"/api/admin/pipeline/{action}")
            assert (answer.status_code, (await answer.get_json())["ingestion"]) == (200, state)
        missing = await client.get(f"/api/v1/traces/{'ab' * 16}")
        assert missing.status_code == 404
        assert "query-1" in (await missing.get_json())["error"]["hint"]


async def test_the_epoch_of_the_owner_is_shown(config):
    node = FedNode()
    node.outs[0].add(decided(1, signals=[1]))
    async with node.running(config) as service:
        await node.applied(service)

        async def shown(*epochs):
            with trio.fail_after(60):
                while tuple(each["epoch"] for each in service.node.partitions()) != epochs:
                    await trio.sleep(0.01)

        await shown(0, 1)
        node.outs[0].add_bytes(b"")  # a takeover
        await shown(1, 1)


async def test_a_service_without_a_cluster_has_no_partitions(config):
    async with running(config) as service:
        client = create_api(service.tools, None, frozenset()).test_client()
        assert (await client.get("/api/cluster")).status_code == 404


def resized(node):
    """Change the cluster from 2 to 4 partitions."""
    grown = Generations.of(2).grown(4)
    node.outs |= {partition: ListedOut() for partition in grown.current.partitions}
    node.partitions.note(Entry(PARTITIONS_KEY, grown.to_json(), 1))


def finish(node, partition):
    end = Finished(1, len(node.outs[partition].messages))
    node.partitions.note(Entry(finished_key(partition), end.to_json(), 2))


async def test_a_partitions_output_is_applied_after_that_of_its_parent(config):
    node = FedNode()
    node.outs[0].add(decided(1, signals=[1]))
    async with node.running(config) as service:
        await node.applied(service)
        resized(node)
        node.outs[2].add_bytes(b"")
        node.outs[2].add(Decided("acme", [retraction(signal(1))], None))
        node.outs[0].add(decided(2, signals=[2]))
        finish(node, 1)
        with trio.fail_after(60):
            while len(service.node.partitions()) != 5:  # without 1, which has ended
                await trio.sleep(0.02)
            while service.node.positions.get(0) < 2:
                await trio.sleep(0.01)
        await trio.sleep(0.3)
        assert node.outs[2].reads == 0
        finish(node, 0)
        await node.applied(service)
        before = stored(service)
        assert [each for each, status in before.items() if status == "active"] == [signal(2).id]
        assert before[signal(1).id] == "retracted"
        assert [each["partition"] for each in service.node.partitions()] == [2, 3, 4, 5]
        service.node.reread()
        await node.applied(service)
        assert stored(service) == before
        assert service.node.positions.all() == {0: 2, 2: 2}
    saved = read_cursors(config.storage.path / "cursors.json")
    assert saved.applied == {0: 2, 2: 2}
    reads = node.outs[0].reads
    node.outs[2].add(decided(3, signals=[3]))
    async with node.running(config) as service:
        await node.applied(service)
        assert stored(service) == before | {signal(3).id: "active"}
        assert node.outs[0].reads == reads
