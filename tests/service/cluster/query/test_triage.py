"""What people decide at one query node is known at all of them."""

from __future__ import annotations

import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.query import shared_triage
from betrace.service.cluster.query.shared_triage import SharedTriage, TriageShard, triage_key
from betrace.service.cluster.query.tenant_names import TenantNames
from betrace.service.storage.triage import KEPT_NS, TriageStore
from betrace.service.storage.undecided import UndecidedTrace
from betrace.service.traces.verdicts import Decided
from tests.support.api_client import ApiClient
from tests.support.cluster_fakes import FakeBucket, FakeNats, FakeNode
from tests.support.failing_stores import signal
from tests.support.inprocess import settings, write_rules
from tests.support.query_nodes import FedNode, until

HOUR = 3_600 * 10**9


class Clock:
    now = 1_000 * HOUR

    def __call__(self):
        return self.now


class Node:
    """The triage of a query node."""

    def __init__(self, nats, path, clock):
        self.store = TriageStore(path, clock)
        self.bucket = FakeBucket(FakeNode(nats, path.name), "query")
        self.threads = ThreadRunner("test", 1)
        self.shared = SharedTriage(
            self.bucket, self.store, self.threads, TenantNames({}, frozenset()), clock
        )

    async def do(self, function, *args):
        return await self.threads.run(function, *args)


@pytest.fixture
async def nodes(tmp_path, nursery):
    nats, clock = FakeNats(), Clock()
    found = [Node(nats, tmp_path / name, clock) for name in ("one", "two")]
    for node in found:
        nursery.start_soon(node.shared.watch)
    yield (*found, clock)
    nursery.cancel_scope.cancel()
    for node in found:
        node.threads.close()
        node.store.close()


async def test_a_mute_holds_everywhere_and_ends_everywhere(nodes):
    one, two, clock = nodes
    mute = await one.do(one.shared.mute, "acme", "r", HOUR, "repairs", "ann")
    assert one.store.current_mute("acme", "r") == mute
    await until(lambda: two.store.current_mute("acme", "r") == mute)
    assert two.store.muted("acme", "r", clock.now)
    clock.now += 1
    again = await two.do(two.shared.mute, "acme", "r", 2 * HOUR, "longer", "bob")
    await until(lambda: one.store.current_mute("acme", "r") == again)
    clock.now += 1
    assert await one.do(one.shared.unmute, "acme", "r")
    assert not await one.do(one.shared.unmute, "acme", "r")
    await until(lambda: two.store.current_mute("acme", "r") is None)
    assert two.store.muted("acme", "r", mute.since_ns)  # it was muted then


async def test_an_acknowledgement_is_replaced_everywhere(nodes):
    one, two, _ = nodes
    await one.do(one.shared.acknowledge, "acme", "s1", "mine", "ann")
    await until(lambda: two.store.acknowledgements("acme", ["s1"]))
    found = await two.do(two.shared.acknowledge, "acme", "s1", "no, mine", "bob")
    await until(lambda: one.store.acknowledgements("acme", ["s1"]) == {"s1": found})


async def test_changes_at_the_same_time_are_both_kept(nodes, monkeypatch):
    monkeypatch.setattr(shared_triage, "SHARDS", 1)
    one, two, _ = nodes
    async with trio.open_nursery() as nursery:
        for node, name in ((one, "s1"), (two, "s2")):
            nursery.start_soon(node.do, node.shared.acknowledge, "acme", name, "", name)
    for node in (one, two):
        await until(lambda node=node: len(node.store.acknowledgements("acme", ["s1", "s2"])) == 2)


async def test_a_new_node_gets_what_the_bucket_has(nodes, tmp_path, nursery):
    one, _two, clock = nodes
    await one.do(one.shared.acknowledge, "acme", "s1", "mine", "ann")
    await one.do(one.shared.mute, "acme", "r", HOUR, "repairs", "ann")
    new = Node(one.bucket.node.nats, tmp_path / "new", clock)
    nursery.start_soon(new.shared.watch)
    await until(lambda: new.store.current_mute("acme", "r") is not None)
    await until(lambda: new.store.acknowledgements("acme", ["s1"]))
    new.threads.close()
    new.store.close()


async def test_the_bucket_keeps_the_latest(nodes, monkeypatch):
    monkeypatch.setattr(shared_triage, "SHARDS", 1)
    monkeypatch.setattr(shared_triage, "KEPT", 3)
    one, _, clock = nodes
    for number in range(5):
        await one.do(one.shared.acknowledge, "acme", f"s{number}", "", "ann")
    await one.do(one.shared.mute, "acme", "r", HOUR, "repairs", "ann")
    clock.now += KEPT_NS + 2 * HOUR
    await one.do(one.shared.mute, "acme", "q", HOUR, "repairs", "ann")
    entry = one.bucket.entries_by_key[triage_key("acme", "s0")]
    shard = TriageShard.unpack(entry.value)
    assert [each for each, _ in shard.acknowledgements] == ["s2", "s3", "s4"]
    assert [each for each, _ in shard.mutes] == ["q"]
    assert len(one.store.acknowledgements("acme", [f"s{n}" for n in range(5)])) == 5


async def test_damaged_entries_are_replaced(nodes, caplog):
    one, two, _ = nodes
    await two.bucket.put(triage_key("acme", "s1"), b"nonsense")
    await one.do(one.shared.acknowledge, "acme", "s1", "mine", "ann")
    await until(lambda: two.store.acknowledgements("acme", ["s1"]))
    assert any("is damaged" in each.getMessage() for each in caplog.records)


async def test_the_api_of_every_node_answers_alike(tmp_path):
    node = FedNode()
    write_rules(tmp_path / "one", {"r": "never { x }"}, "acme")
    one, two = (settings(tmp_path / name) for name in ("one", "two"))
    (tmp_path / "two" / "rules").mkdir(parents=True)
    node.outs[0].add(Decided("acme", [signal(1)], None))
    async with node.running(one) as first, node.running(two, name="query-2") as second:
        apis = [TenantsApi(service) for service in (first, second)]
        for service in (first, second):
            await node.applied(service)
        await until(lambda: second.registry.store.rules("acme"))
        await apis[0].ask("PUT", "/api/v1/rules/r/mute", 200, {"for": "1h", "reason": "x"})
        await until(lambda: second.tools.triage.current_mute("acme", "r"))
        path = f"/api/v1/signals/{signal(1).id}"
        await apis[1].ask("POST", f"{path}/acknowledge", 200, {"note": "mine"})
        await until(lambda: first.tools.triage.acknowledgements("acme", [signal(1).id]))
        assert await apis[0].get(path) == await apis[1].get(path)
        await apis[1].ask("PUT", "/api/v1/rules/more", 201, {"condition": "never { y }"})
        await until(lambda: len(first.registry.store.rules("acme")) == 2)
        answers = [await api.get("/api/v1/rules") for api in apis]
        assert answers[0] == answers[1]
        await apis[1].get("/api/v1/signals")
        assert apis[1].headers["BeTrace-Applied"] == "1,0"
        await until(lambda: first.node.shown()["duties"])
        assert (await ApiClient(first).get("/api/cluster"))["duties"] == {"alerts": "query-1"}
        assert "BeTrace-Applied" not in (await ask_operator(first)).headers


async def ask_operator(service):
    client = ApiClient(service)
    await client.get("/api/cluster")
    return client


class TenantsApi(ApiClient):
    """The API as the tenant acme uses it."""

    async def ask(self, method, path, status=200, body=None, **headers):
        return await super().ask(method, path, status, body, X_Scope_OrgID="acme", **headers)


async def test_a_cursor_of_another_node_is_refused(tmp_path):
    node = FedNode()
    traces = [UndecidedTrace(f"{n:032x}", "r", "v", "too long", n) for n in range(3)]
    async with (
        node.running(settings(tmp_path / "one", rules={})) as one,
        node.running(settings(tmp_path / "two", rules={}), name="query-2") as two,
    ):
        for service in (one, two):
            service.tools.undecided.add("acme", traces)
        first = await TenantsApi(one).get("/api/v1/undecided?limit=2")
        path = f"/api/v1/undecided?limit=2&cursor={first['next']}"
        assert len((await TenantsApi(one).get(path))["undecided"]) == 1
        error = await TenantsApi(two).get(path, 400)
        assert "another query node" in error["message"]
