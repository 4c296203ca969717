"""Edges and servers that are killed while clients send: nothing that was acknowledged is lost."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import httpx
import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.layout import Layout
from tests.support.cluster_processes import Cluster
from tests.support.edges import (
    edge_settings,
    post_until_accepted,
    running_edge,
    stored_spans,
)
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers, connected
from tests.support.spans import S, body

pytestmark = pytest.mark.slow

SPANS = 20  # a request


def spans(number: int) -> bytes:
    ids = range(number * SPANS + 1, (number + 1) * SPANS + 1)
    return body(*(S(n, trace=n.to_bytes(16, "big")) for n in ids))


class Clients:
    """Send requests and repeat them until they are accepted."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.accepted: dict[int, int] = {}
        """Attempts by request."""
        self._next = 0

    async def send(self, until: trio.Event) -> None:
        with httpx.Client(trust_env=False) as http:
            while not until.is_set():
                number, self._next = self._next, self._next + 1
                first = number % len(self.urls)
                urls = self.urls[first:] + self.urls[:first]
                self.accepted[number] = await post_until_accepted(http, urls, spans(number))
                await trio.sleep(0.005)

    async def accept(self, more: int) -> None:
        """Return when so many more requests were accepted."""
        goal = len(self.accepted) + more
        with trio.fail_after(180):
            while len(self.accepted) < goal:
                await trio.sleep(0.01)

    async def check(self, client: NatsClient, cluster: ClusterSettings) -> int:
        """Compare with the log; returns how many spans are stored more than once."""
        stored = await stored_spans(client, cluster)
        assert len(stored) == SPANS * len(self.accepted)
        repeated = 0
        for number, attempts in self.accepted.items():
            for n in range(number * SPANS + 1, (number + 1) * SPANS + 1):
                assert 1 <= stored["default", n] <= attempts
                repeated += stored["default", n] > 1
        return repeated


@pytest.fixture
async def three(tmp_path) -> AsyncIterator[tuple[NatsServers, NatsClient, ClusterSettings]]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path / "nats", 3) as servers:
        cluster = servers.settings(partitions=4)
        async with connected(cluster) as client:
            yield servers, client, cluster


async def test_an_edge_is_killed(cluster, client, tmp_path):
    processes = Cluster(tmp_path, cluster)
    with processes.running("edge", "a") as first, processes.running("edge", "b") as second:
        clients = Clients([f"{each.ingest}/v1/traces" for each in (first, second)])
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(clients.send, stop)
            await clients.accept(20)
            first.kill()
            await clients.accept(20)
            stop.set()
    await clients.check(client, cluster)
    assert max(clients.accepted.values()) > 1


async def test_the_leader_of_a_partition_is_killed(three, tmp_path):
    servers, client, cluster = three
    layout = Layout.of(cluster)
    async with running_edge(edge_settings(cluster, tmp_path / "edge")) as (_, url, _):
        clients = Clients([url])
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(clients.send, stop)
            await clients.accept(20)
            leader = servers.leader(layout.spans_stream(0))
            leader.kill()
            killed = time.monotonic()
            await clients.accept(40)
            print(f"requests are accepted again {time.monotonic() - killed:.1f} s after the kill")
            leader.start()
            await clients.accept(20)
            stop.set()
    print(f"{await clients.check(client, cluster)} spans were stored more than once")


async def test_the_quorum_is_lost(three, tmp_path):
    servers, client, cluster = three
    async with running_edge(edge_settings(cluster, tmp_path / "edge")) as (edge, url, _):
        clients = Clients([url])
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(clients.send, stop)
            await clients.accept(20)
            for server in servers.servers[1:]:
                server.kill()
            with trio.fail_after(120):
                while not edge.admission.refusals.requests["unavailable"]:
                    await trio.sleep(0.05)
                while edge.component()["status"] == "ok":
                    await trio.sleep(0.05)
            for server in servers.servers[1:]:
                server.start()
            await clients.accept(20)
            stop.set()
    await clients.check(client, cluster)
