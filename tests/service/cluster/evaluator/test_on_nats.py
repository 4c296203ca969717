"""Evaluators with real states on a real NATS server: every signal is stored exactly once while
owners are killed, frozen, stopped and replaced."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.app.evaluator import EvaluatorNode, open_evaluator
from betrace.service.cluster.evaluator.evaluator import ROLE
from betrace.service.cluster.membership import Membership
from betrace.service.config.settings import Settings
from betrace.service.config.stages import Checkpoint, Traces
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from tests.support.cluster_load import WAIT, Load
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers

PARTITIONS = range(4)

_prefixes = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[NatsServers]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats")) as servers:
        yield servers


class Node:
    """An evaluator with a client of its own."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.scope = trio.CancelScope()
        self.thaw = threading.Event()
        self.ended = trio.Event()

    async def run(self, task_status=trio.TASK_STATUS_IGNORED) -> None:
        cluster, settings = self.cluster, self.cluster.all_settings
        client = self.client = await NatsClient.connect(settings.cluster, self.name)
        try:
            with self.scope, ThreadRunner(self.name, len(PARTITIONS)) as threads:
                bucket = ConfigBucket(client, cluster.layout.members_bucket)
                seconds = settings.cluster.lease_seconds, settings.cluster.heartbeat_seconds
                membership = Membership(bucket, self.name, (ROLE,), *seconds)
                node = EvaluatorNode(self.name, client, cluster.layout, membership, threads)
                self.evaluator = open_evaluator(settings, node)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(membership.run)
                    await self.evaluator.run(task_status=task_status)
                    await membership.leave()
                    nursery.cancel_scope.cancel()
        finally:
            self.thaw.set()
            client.stop()
            self.ended.set()

    @property
    def owned(self) -> list[int]:
        return self.evaluator.owned

    def kill(self) -> None:
        """End it without any cleanup."""
        self.scope.cancel()

    def freeze(self) -> None:
        """Nothing is received or sent until `thaw` is set."""
        self.client._loop.call_soon_threadsafe(self.thaw.wait)


class Cluster(Load):
    """A load, and the evaluators of this process."""

    def __init__(self, server: NatsServers, nursery: trio.Nursery) -> None:
        cluster = server.settings(
            prefix=f"owners{next(_prefixes)}",
            partitions=len(PARTITIONS),
            lease_seconds=1,
            heartbeat_seconds=0.25,
            tick_seconds=0.25,
        )
        super().__init__(cluster)
        self.servers = server
        self.nursery = nursery
        self.all_settings = Settings(
            cluster=cluster,
            traces=Traces(idle_seconds=1),
            checkpoint=Checkpoint(interval_seconds=1),
        )

    async def start(self, name: str) -> Node:
        node = Node(self, name)
        await self.nursery.start(node.run)
        return node


def on_a_server(test):
    async def run(server: NatsServers) -> None:
        async with trio.open_nursery() as nursery:
            cluster = Cluster(server, nursery)
            await cluster.open()
            try:
                await test(cluster)
            finally:
                nursery.cancel_scope.cancel()
                cluster.client.stop()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def wait_until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT):
        while not condition():
            await trio.sleep(0.02)


def current(*nodes: Node) -> Callable[[], bool]:
    """Whether these nodes own all partitions and have applied what was in the logs."""

    def check() -> bool:
        found = [s for node in nodes for s in node.evaluator.statuses if s.phase == "current"]
        return sorted(status.partition for status in found) == list(PARTITIONS)

    return check


@on_a_server
async def test_a_restarted_evaluator_continues_where_the_killed_one_was(cluster):
    one = await cluster.start("one")
    await wait_until(current(one))
    await cluster.rules_are_known()
    await cluster.send_traces(50)
    await trio.sleep(1)
    one.kill()
    await one.ended.wait()
    await cluster.send_traces(50)
    two = await cluster.start("one")
    await wait_until(current(two))
    await cluster.send_traces(50)
    await cluster.check()


@pytest.mark.slow
@on_a_server
async def test_nothing_is_lost_or_doubled_while_evaluators_come_and_go(cluster):
    one = await cluster.start("one")
    await wait_until(current(one))
    await cluster.rules_are_known()
    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_until, sent)
        two, three = await cluster.start("two"), await cluster.start("three")
        await wait_until(lambda: two.owned != [] and three.owned != [])
        await trio.sleep(1)
        one.kill()
        await wait_until(current(two, three))
        four = await cluster.start("four")
        await wait_until(lambda: four.owned != [])
        lost = two.owned
        two.freeze()
        await wait_until(lambda: set(lost) <= {*three.owned, *four.owned})
        await trio.sleep(1)
        two.thaw.set()
        await wait_until(lambda: two.owned != [])
        four.evaluator.stop()
        await four.ended.wait()
        await wait_until(current(two, three))
        await trio.sleep(1)
        sent.set()
    await cluster.check()
    assert sum(status.fenced for status in two.evaluator.statuses) > 0


@pytest.mark.slow
async def test_nothing_is_lost_or_doubled_when_leaders_are_killed(tmp_path):
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path, 3) as servers:
        await on_a_server(_kill_leaders)(servers)


async def _kill_leaders(cluster: Cluster) -> None:
    one = await cluster.start("one")
    two = await cluster.start("two")
    await wait_until(current(one, two))
    await cluster.rules_are_known()
    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_until, sent)
        await trio.sleep(1)
        for stream in (cluster.layout.spans_stream(0), cluster.layout.out_stream(1)):
            leader = await trio.to_thread.run_sync(cluster.servers.leader, stream)
            await trio.to_thread.run_sync(leader.restart)
            await trio.to_thread.run_sync(cluster.servers.wait_healthy)
            await trio.sleep(1)
        sent.set()
    await cluster.check()
    assert {"one", "two"} == set(one.evaluator._membership.alive())
