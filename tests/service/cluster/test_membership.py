"""Heartbeats in virtual time: who is alive, as each node sees it."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager

import orjson
import trio

from betrace.service.cluster.membership import Membership, beat_key, drain_key
from tests.support import virtual
from tests.support.cluster_fakes import FakeBucket, FakeNats, FakeNode


class Nodes:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nats = FakeNats()
        self.nursery = nursery
        self.scopes: dict[str, trio.CancelScope] = {}

    def start(self, name: str, *roles: str) -> tuple[FakeNode, Membership]:
        node = FakeNode(self.nats, name)
        membership = Membership(FakeBucket(node, "members"), name, roles or ("evaluator",), 2, 0.5)

        async def run() -> None:
            with trio.CancelScope() as self.scopes[name]:
                await membership.run()

        self.nursery.start_soon(run)
        return node, membership


@asynccontextmanager
async def some_nodes():
    async with trio.open_nursery() as nursery:
        yield Nodes(nursery)
        nursery.cancel_scope.cancel()


in_virtual_time = virtual.with_world(some_nodes)


@in_virtual_time
async def test_nodes_see_each_other_by_role(nodes):
    _, one = nodes.start("one", "edge", "evaluator")
    _, two = nodes.start("two", "query")
    await trio.sleep(1)
    assert set(one.alive()) == set(two.alive()) == {"one", "two"}
    assert set(two.alive("evaluator")) == {"one"}
    assert set(two.alive("query")) == {"two"}


@in_virtual_time
async def test_a_killed_node_is_gone_after_the_lease(nodes):
    _, one = nodes.start("one")
    nodes.start("two")
    await trio.sleep(3.1)
    changed = one.changed
    nodes.scopes["two"].cancel()
    await trio.sleep(1.9)
    assert set(one.alive()) == {"one", "two"}
    with trio.fail_after(1.2):
        await changed.wait()
    assert set(one.alive()) == {"one"}


@in_virtual_time
async def test_a_node_that_leaves_is_gone_at_once_and_no_longer_drained(nodes):
    _, one = nodes.start("one")
    _, two = nodes.start("two")
    await trio.sleep(1)
    await FakeBucket(FakeNode(nodes.nats, "operator"), "members").put(drain_key("two"), b"")
    await trio.sleep(0.1)
    assert one.alive()["two"].draining
    await two.leave()
    await trio.sleep(0.1)
    assert set(one.alive()) == {"one"}
    await trio.sleep(3)
    assert set(one.alive()) == {"one"}
    nodes.scopes["two"].cancel()
    nodes.start("two")
    await trio.sleep(1)
    assert not one.alive()["two"].draining


@in_virtual_time
async def test_a_node_tells_that_it_drains(nodes):
    _, one = nodes.start("one")
    _, two = nodes.start("two")
    await trio.sleep(1)
    two.draining = True
    await two.beat()
    await trio.sleep(0.1)
    assert one.alive()["two"].draining
    assert not one.alive()["one"].draining


@in_virtual_time
async def test_a_node_that_was_frozen_believes_that_the_others_live(nodes):
    frozen, one = nodes.start("one")
    nodes.start("two")
    await trio.sleep(2)
    frozen.freeze()
    await trio.sleep(60)
    frozen.thaw()
    for _ in range(50):
        await trio.sleep(0.1)
        assert set(one.alive()) == {"one", "two"}


@in_virtual_time
async def test_entries_of_nodes_that_ended_long_ago_count_for_one_lease(nodes):
    stale = {"roles": ["evaluator"], "draining": False, "boot": "x"}
    bucket = FakeBucket(FakeNode(nodes.nats, "operator"), "members")
    await bucket.put(beat_key("stale"), orjson.dumps(stale))
    _, one = nodes.start("one")
    await one.ready.wait()
    assert set(one.alive()) == {"one", "stale"}
    await trio.sleep(3.5)
    assert set(one.alive()) == {"one"}


def test_a_second_process_of_the_same_name_is_reported(caplog):
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nodes = Nodes(nursery)
            nodes.start("one")
            await trio.sleep(1)
            nodes.start("one")
            await trio.sleep(3)
            nursery.cancel_scope.cancel()

    with caplog.at_level(logging.ERROR):
        virtual.run(main)
    found = [record for record in caplog.records if "name of this node" in record.getMessage()]
    assert len(found) >= 1
