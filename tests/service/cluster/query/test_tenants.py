"""Tenants are created, changed and deleted at query nodes of a cluster."""

from __future__ import annotations

import pytest
import trio

from betrace.service.api.audit import Operator
from betrace.service.cluster import output
from betrace.service.cluster.rule_keys import rules_key
from betrace.service.cluster.tenant_entries import (
    INGESTION_KEY,
    pack_tenant,
    tenant_key,
    unpack_tenant,
)
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.undecided import UndecidedTrace
from betrace.service.tenancy import changes
from betrace.service.tenancy.changes import TenantConflictError, UnknownTenantError
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.tenant import Tenant, TenantState
from betrace.service.tenants import log_name
from betrace.service.traces.verdicts import Decided
from tests.support.api_client import ApiClient
from tests.support.failing_stores import due, signal
from tests.support.inprocess import settings, write_rules
from tests.support.query_nodes import LAST_SPANS, FedNode, until
from tests.support.tenant_keys import new_key, raw

WHO = Operator("test", "")


@pytest.fixture
def node():
    return FedNode()


def decided(name, *numbers):
    """A signal and a trace for each number, as the evaluators name the tenant."""
    return Decided(name, [signal(n, name) for n in numbers], due(*numbers, tenant=name))


def undecided(number):
    return UndecidedTrace(f"{number:032x}", "r", "v", "it is too large", 1)


def entry(node, name):
    return unpack_tenant(node.bucket.latest[tenant_key(name)])


async def test_a_change_at_one_node_is_followed_by_the_others(node, tmp_path):
    key = raw(new_key())
    async with (
        node.running(settings(tmp_path / "1")) as one,
        node.running(settings(tmp_path / "2")) as two,
    ):
        made = await one.tools.tenants.create(WHO, "acme", 500, None)
        assert (made["state"], made["quota"]) == ("active", 500)
        await until(lambda: two.gate.quotas.rate("acme") == 500)
        changed = await two.node.tenants.change("acme", changes.add_key(key, 0))
        [kid] = [each.kid for each in changed.keys]
        await until(lambda: one.gate.directory.public_key("acme", kid) is not None)
        with pytest.raises(TenantConflictError, match="exists"):
            await two.tools.tenants.create(WHO, "acme", None, None)
        await one.tools.tenants.revoke_key(WHO, "acme", kid)
        await until(lambda: two.gate.directory.public_key("acme", kid) is None)
        with pytest.raises(UnknownTenantError):
            await two.tools.tenants.revoke_key(WHO, "acme", kid)


async def test_two_changes_at_once_are_both_made(node, tmp_path):
    keys = [raw(new_key()), raw(new_key())]
    async with (
        node.running(settings(tmp_path / "1")) as one,
        node.running(settings(tmp_path / "2")) as two,
    ):
        await one.node.tenants.change("acme", changes.create(None, None))
        async with trio.open_nursery() as nursery:
            for service, key in zip((one, two), keys, strict=True):
                change = changes.add_key(key, 3600)
                nursery.start_soon(service.node.tenants.change, "acme", change)
        assert {each.public for each in entry(node, "acme").keys} == set(keys)


async def test_the_tenants_of_the_first_node_are_published(node, tmp_path):
    key = raw(new_key())
    config = settings(tmp_path)
    config.storage.path.mkdir(parents=True)
    directory = TenantDirectory(config.storage.path / "tenants.sqlite")
    directory.change("acme", changes.create(7, key))
    directory.change("known", changes.create(7, key))
    directory.begin_deletion("gone")
    directory.finish_deletion("gone")
    directory.close()
    there = Tenant("known", TenantState.ACTIVE, 1, 99)
    await node.bucket.put(tenant_key("known"), pack_tenant(there), 0)
    async with node.running(config) as service:
        await until(lambda: service.gate.revisions.keys() == {"acme", "known", "gone"})
        assert [each.public for each in entry(node, "acme").keys] == [key]
        assert entry(node, "gone").state is TenantState.DELETED
        assert service.gate.quotas.rate("known") == 99  # others were there first
        assert "gone" in service.gate.closed


async def test_a_deleted_tenant_has_no_data_at_any_node(node, tmp_path):
    node.outs[0].add(decided("acme", 1), decided("beta", 1))
    async with (
        node.running(settings(tmp_path / "1")) as one,
        node.running(settings(tmp_path / "2")) as two,
    ):
        await node.applied(one)
        await node.applied(two)
        await one.node.tenants.change("acme", changes.create(None, None))
        assert await two.tools.tenants.delete(WHO, "acme", 60)
        await until(lambda: one.gate.revisions["acme"] == entry(node, "acme").revision)
        for service in (one, two):
            assert service.store.tenants() == ["beta"]
            assert "acme" in service.gate.closed
            assert await service.tools.tenants.get("acme") is None
        node.outs[0].add(decided("acme", 2), decided("beta", 2))  # decided before
        await node.applied(one)
        assert one.store.tenants() == ["beta"]
        with pytest.raises(UnknownTenantError):
            await one.tools.tenants.delete(WHO, "acme", 60)


async def test_a_tenant_that_is_created_again_sees_nothing_from_before(node, tmp_path):
    node.outs[0].add(decided("acme", 1))
    async with node.running(settings(tmp_path / "1")) as one:
        await node.applied(one)
        assert await one.tools.tenants.delete(WHO, "acme", 60)  # was never created
        again = log_name("acme", entry(node, "acme").generation)
        assert again != "acme"
        await one.tools.tenants.create(WHO, "acme", None, None)
        assert entry(node, "acme").generation == one.gate.generations["acme"]
        judged = [output.NotJudged(each, undecided(n)) for n, each in enumerate(("acme", again))]
        node.outs[0].add(decided("acme", 2), decided(again, 3), undecided=judged)
        await node.applied(one)
        signals, _ = one.store.signals("acme")
        assert [each.signal.id for each in signals] == [signal(3, "acme").id]
        assert one.store.counts("acme").traces == 1
        found, _ = one.tools.undecided.page("acme")
        assert [each.trace_id for each in found] == [undecided(1).trace_id]
    async with node.running(settings(tmp_path / "2")) as two:  # reads everything from OUT
        await node.applied(two)
        assert two.store.counts("acme").traces == 1


async def test_a_node_that_was_away_deletes_its_data_before_it_reads_on(node, tmp_path):
    node.outs[0].add(decided("acme", 1))
    async with node.running(settings(tmp_path)) as service:
        await node.applied(service)
        await service.node.tenants.change("acme", changes.create(None, None))
    gone = Tenant("acme", TenantState.DELETED, 1, None)
    revision = await node.bucket.put(tenant_key("acme"), pack_tenant(gone))
    again = Tenant("acme", TenantState.ACTIVE, 2, 5, generation=revision)
    await node.bucket.put(tenant_key("acme"), pack_tenant(again))
    node.outs[0].add(decided(log_name("acme", revision), 2))
    async with node.running(settings(tmp_path)) as service:
        await node.applied(service)
        signals, _ = service.store.signals("acme")
        assert [each.signal.id for each in signals] == [signal(2, "acme").id]
        assert "acme" not in service.gate.closed
        assert service.gate.quotas.rate("acme") == 5


async def test_without_a_quorum_nothing_is_changed(node, tmp_path):
    async with node.running(settings(tmp_path)) as service:
        await service.node.tenants.change("acme", changes.create(5, None))
        node.bucket.unavailable = True
        with pytest.raises(NatsUnavailable):
            await service.node.tenants.change("acme", changes.set_quota(6))
        with pytest.raises(NatsUnavailable):
            await service.node.tenants.delete("acme")
        assert service.gate.quotas.rate("acme") == 5
        assert "acme" not in service.gate.closed


async def test_ingestion_is_paused_and_resumed_at_all_edges(node, tmp_path):
    async with node.running(settings(tmp_path)) as service:
        api = ApiClient(service)
        paused = await api.post("/api/admin/pipeline/pause")
        assert paused["ingestion"] == "paused"
        assert node.bucket.values[INGESTION_KEY] == b'{"paused":true}'
        assert (await api.post("/api/admin/pipeline/resume"))["ingestion"] == "open"
        assert node.bucket.values[INGESTION_KEY] == b'{"paused":false}'


async def test_a_drain_waits_for_edges_and_evaluators(node, tmp_path):
    async with node.running(settings(tmp_path)) as service:
        api = ApiClient(service)
        assert not (await api.post("/api/admin/pipeline/drain?wait=0", 202))["drained"]
        assert node.spans.appended == []  # an edge still has spans
        node.paused_edges = node.bucket.revision + 1
        found = []

        async def drain():
            found.append(await api.post("/api/admin/pipeline/drain?wait=60"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await until(lambda: node.spans.appended == [0])
            node.outs[0].add(decided("acme", 1), upto=LAST_SPANS - 1)
            node.outs[0].add(upto=LAST_SPANS)
            await until(lambda: node.spans.appended == [0, 1])
            assert not found
            node.outs[1].add(upto=LAST_SPANS)
        assert found[0]["drained"]
        assert found[0]["ingestion"] == "paused"
        assert service.store.counts("acme").traces == 1


def rule_ids(service):
    return [rule.id for rule in service.registry.store.rules("acme")]


async def test_mutes_of_a_deleted_tenant_do_not_come_back(node, tmp_path):
    def muted(service):
        return service.tools.triage.current_mute("acme", "many") is not None

    async def mute(service):
        write = service.tools.triage_writer.mute
        await trio.to_thread.run_sync(write, "acme", "many", 10**12, "a test", "me")

    async with node.running(settings(tmp_path / "1")) as one:
        async with node.running(settings(tmp_path / "2"), name="query-2") as two:
            await one.node.tenants.change("acme", changes.create(None, None))
            await until(lambda: two.gate.revisions)
            await mute(two)
            await until(lambda: muted(one))
            assert await one.tools.tenants.delete(WHO, "acme", 60)
            await until(lambda: two.gate.revisions == one.gate.revisions)
            await one.node.tenants.change("acme", changes.create(None, None))
            await until(lambda: two.gate.revisions == one.gate.revisions)
            assert not muted(one)
            assert not muted(two)
        async with node.running(settings(tmp_path / "3"), name="query-3") as three:
            await mute(one)
            await until(lambda: muted(three))
            mutes = three.tools.triage._mutes["acme", "many"]
            assert len(mutes) == 1  # not the one of the deleted tenant


async def test_rules_of_a_tenant_that_is_created_again_stay(node, tmp_path):
    write_rules(tmp_path / "1", {"many": "count(a) > 1"}, "acme")
    async with node.running(settings(tmp_path / "1")) as one:
        async with node.running(settings(tmp_path / "2"), name="query-2") as two:
            await one.node.tenants.change("acme", changes.create(None, None))
            await until(lambda: rule_ids(two) == ["many"] and two.gate.revisions)
            await two.node.rules.exchange()
        assert await one.tools.tenants.delete(WHO, "acme", 60)
        assert rule_ids(one) == []
        await until(lambda: node.bucket.values[rules_key("acme")] == b"[]")
        await one.node.tenants.change("acme", changes.create(None, None))
        write_rules(tmp_path / "1", {"many": "count(a) > 1"}, "acme")  # the same
        await until(lambda: rule_ids(one) == ["many"])
        await until(lambda: node.bucket.values[rules_key("acme")] != b"[]")
        async with node.running(settings(tmp_path / "2"), name="query-2") as two:
            await until(lambda: two.gate.revisions == one.gate.revisions)  # its own are deleted
            await until(lambda: rule_ids(two) == ["many"])
            for service in (two, one, two):
                await service.node.rules.exchange()
            assert rule_ids(one) == rule_ids(two) == ["many"]
            assert node.bucket.values[rules_key("acme")] != b"[]"
