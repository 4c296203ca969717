"""betrace cluster drain, on a real server: members and leases are written by the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import trio
from click.testing import CliRunner, Result

from betrace.service.cli.main import cli
from betrace.service.cluster.lease_keys import lease_key
from betrace.service.cluster.membership import Membership, drain_key
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Lease, Leases
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers, connected


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSettings]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats")) as servers:
        settings = servers.settings(prefix="drain", partitions=3)

        async def prepare() -> None:
            async with connected(settings):
                pass

        trio.run(prepare)
        yield settings


class Node:
    """An evaluator that has the leases 0 and 1, and gives them up when it is drained."""

    def __init__(self, settings: ClusterSettings, gives_up: bool = True) -> None:
        self.settings = settings
        self.gives_up = gives_up
        self.ready = threading.Event()
        self.stop = threading.Event()
        self.saw: list[bool] = []
        self.thread = threading.Thread(target=lambda: trio.run(self.main))

    async def main(self) -> None:
        client = await NatsClient.connect(self.settings, "node")
        layout = Layout.of(self.settings)
        bucket = ConfigBucket(client, layout.leases_bucket)
        leases = Leases(bucket, self.settings.lease_seconds)
        members = ConfigBucket(client, layout.members_bucket)
        membership = Membership(members, "one", ("evaluator",), 2, 0.5)
        held: list[Lease] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(membership.run)
            await membership.ready.wait()
            for partition in (0, 1):
                lease = await leases.acquire(lease_key(partition), "one")
                assert lease is not None
                held.append(lease)
            self.ready.set()
            while not self.stop.is_set():
                draining = membership.alive()["one"].draining
                self.saw.append(draining)
                if held and draining and self.gives_up:
                    await leases.release(held.pop())
                await trio.sleep(0.02)
            for lease in held:
                await leases.release(lease)
            await membership.leave()
            nursery.cancel_scope.cancel()
        await client.close()

    def __enter__(self) -> Node:
        self.thread.start()
        assert self.ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def run(settings: ClusterSettings, *arguments: str) -> Result:
    environment = {
        "BETRACE_CLUSTER__SERVERS": settings.servers,
        "BETRACE_CLUSTER__PREFIX": settings.prefix,
        "BETRACE_CLUSTER__PARTITIONS": str(settings.partitions),
    }
    return CliRunner().invoke(cli, ["cluster", "drain", *arguments], env=environment)


def test_draining_waits_until_the_node_has_no_partitions(settings: ClusterSettings) -> None:
    with Node(settings):
        found = run(settings, "one", "--wait", "60s")
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-1] == "one has 0 partitions"


def test_a_node_that_keeps_its_partitions_is_reported(settings: ClusterSettings) -> None:
    with Node(settings, gives_up=False) as node:
        found = run(settings, "one", "--wait", "1s")
        assert found.exit_code == 1, found.output
        assert "one still has the partitions 0, 1" in found.output
        undone = run(settings, "one", "--undo")
        assert undone.output == "one may have partitions again\n"
        until = time.monotonic() + 60
        while node.saw[-1]:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_an_unknown_node_is_an_error(settings: ClusterSettings) -> None:
    alone = run(settings, "two")
    assert alone.exit_code == 3
    assert "no node of the cluster is running" in alone.stderr
    with Node(settings):
        other = run(settings, "two")
    assert other.exit_code == 3
    assert "there is no node two in the cluster; the nodes are one" in other.stderr


def test_a_node_that_stops_in_order_is_no_longer_drained(settings: ClusterSettings) -> None:
    with Node(settings):
        run(settings, "one")

    async def look() -> None:
        client = await NatsClient.connect(settings, "test")
        members = ConfigBucket(client, Layout.of(settings).members_bucket)
        assert await members.get(drain_key("one")) is None
        await client.close()

    trio.run(look)
