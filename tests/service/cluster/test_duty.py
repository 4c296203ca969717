"""A duty in virtual time: one node has it, and another takes it over."""

from __future__ import annotations

from contextlib import asynccontextmanager

import trio

from betrace.service.cluster.duty import Duty, DutyTimes
from betrace.service.cluster.lease_keys import owners_by_duty, owners_by_partition
from betrace.service.storage.jetstream.leases import Leases
from tests.support import virtual
from tests.support.cluster_fakes import FakeBucket, FakeNats, FakeNode

TIMES = DutyTimes(lease_seconds=6, renew_seconds=2)


class Nodes:
    """Processes that want the duty, and who worked when."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nats = FakeNats()
        self.nursery = nursery
        self.scopes: dict[str, trio.CancelScope] = {}
        self.working: list[str] = []
        self.began: list[str] = []

    def start(self, name: str) -> tuple[FakeNode, Duty]:
        node = FakeNode(self.nats, name)
        duty = Duty(FakeBucket(node, "leases"), "exports", name, TIMES, trio.current_time)

        async def work() -> None:
            self.began.append(name)
            self.working.append(name)
            try:
                await trio.sleep_forever()
            finally:
                self.working.remove(name)

        async def run() -> None:
            with trio.CancelScope() as self.scopes[name]:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(duty.run)
                    nursery.start_soon(duty.perform, work)

        self.nursery.start_soon(run)
        return node, duty


@asynccontextmanager
async def some_nodes():
    async with trio.open_nursery() as nursery:
        yield Nodes(nursery)
        nursery.cancel_scope.cancel()


in_virtual_time = virtual.with_world(some_nodes)


@in_virtual_time
async def test_one_node_has_the_duty_for_as_long_as_it_lives(nodes):
    _, one = nodes.start("one")
    await trio.sleep(0.1)
    _, two = nodes.start("two")
    await trio.sleep(60)
    assert (one.held, two.held) == (True, False)
    assert nodes.began == ["one"]
    owners = await Leases(FakeBucket(FakeNode(nodes.nats, "x"), "leases"), 2).owners()
    assert owners_by_duty(owners) == {"exports": "one"}
    assert owners_by_partition(owners) == {}


@in_virtual_time
async def test_a_killed_node_is_replaced_after_the_lease(nodes):
    nodes.start("one")
    await trio.sleep(0.1)
    _, two = nodes.start("two")
    await trio.sleep(10)
    nodes.scopes["one"].cancel()
    await trio.sleep(5)
    assert not two.held
    await trio.sleep(5)
    assert two.held
    assert nodes.working == ["two"]


@in_virtual_time
async def test_a_node_that_stops_gives_the_duty_up_at_once(nodes):
    _, one = nodes.start("one")
    await trio.sleep(0.1)
    nodes.start("two")
    await trio.sleep(10)
    await one.stop()
    assert nodes.working == []
    await trio.sleep(2.1)
    assert nodes.working == ["two"]
    assert not one.held


@in_virtual_time
async def test_a_node_without_the_servers_stops_working_before_another_begins(nodes):
    node, one = nodes.start("one")
    await trio.sleep(0.1)
    nodes.start("two")
    await trio.sleep(10)
    node.unavailable = True
    seen = []
    for _ in range(200):
        await trio.sleep(0.1)
        seen.append(tuple(nodes.working))
    assert ("one", "two") not in seen
    assert ("two", "one") not in seen
    assert seen[0] == ("one",)
    assert seen[-1] == ("two",)
    node.unavailable = False
    await trio.sleep(20)
    assert nodes.working == ["two"]
    assert not one.held


@in_virtual_time
async def test_the_work_begins_again_when_there_is_doubt(nodes):
    _, one = nodes.start("one")
    await trio.sleep(1)
    one.doubt()
    assert not one.held
    await trio.sleep(1)
    assert one.held
    assert nodes.began == ["one", "one"]


@in_virtual_time
async def test_work_that_ends_is_not_repeated(nodes):
    node = FakeNode(nodes.nats, "one")
    duty = Duty(FakeBucket(node, "leases"), "once", "one", TIMES, trio.current_time)
    nodes.nursery.start_soon(duty.run)
    calls = []

    async def work() -> None:
        calls.append(duty.held)

    await duty.perform(work)
    assert calls == [True]
    await duty.stop()
    assert not duty.held
