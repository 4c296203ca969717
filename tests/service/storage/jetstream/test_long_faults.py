"""More faults of three real servers. They take minutes, so they run only with
``BETRACE_CLUSTER_FAULTS``, the number of random faults, such as 50."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.spans import SpanStreams
from tests.support.log_writers import WAIT, Writers, check, check_through
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers, connected

FAULTS = int(os.environ.get("BETRACE_CLUSTER_FAULTS", "0"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FAULTS, reason="set BETRACE_CLUSTER_FAULTS to the number of faults"),
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
]

_prefixes = (f"long{k}" for k in itertools.count())


class Network:
    """A network namespace with the first server in it. Clients and other servers reach it by
    different links, ``client`` and ``route``, which can be cut."""

    def __init__(self, servers: NatsServers) -> None:
        number = os.getpid() % 250
        self._name = f"betrace{number}"
        self._links = {"client": f"btc{number}", "route": f"btr{number}"}
        self.nets = {"client": f"10.231.{number}", "route": f"10.232.{number}"}
        _run("ip", "netns", "add", self._name)
        for kind, link in self._links.items():
            net = self.nets[kind]
            _run("ip", "link", "add", link, "type", "veth", "peer", "name", f"{link}n")
            _run("ip", "link", "set", f"{link}n", "netns", self._name)
            _run("ip", "address", "add", f"{net}.1/24", "dev", link)
            _run("ip", "link", "set", link, "up")
            self._inside("ip", "address", "add", f"{net}.2/24", "dev", f"{link}n")
            self._inside("ip", "link", "set", f"{link}n", "up")
        first = servers.servers[0]
        first.command = ["ip", "netns", "exec", self._name]
        first.host = f"{self.nets['client']}.2"
        first.route_host = f"{self.nets['route']}.2"
        for other in servers.servers[1:]:
            other.route_host = f"{self.nets['route']}.1"

    def _inside(self, *command: str) -> None:
        _run("ip", "netns", "exec", self._name, *command)

    def cut(self, kind: str) -> None:
        self._inside("ip", "link", "set", f"{self._links[kind]}n", "down")

    def join(self, kind: str) -> None:
        self._inside("ip", "link", "set", f"{self._links[kind]}n", "up")

    def close(self) -> None:
        _run("ip", "netns", "delete", self._name)  # and the links


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def network_and_servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Network, NatsServers]]:
    if os.getuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip")
    servers = NatsServers(tmp_path_factory.mktemp("nats"), 3)
    network = Network(servers)
    try:
        with servers:
            yield network, servers
    finally:
        network.close()


@pytest.fixture
def network(network_and_servers: tuple[Network, NatsServers]) -> Iterator[Network]:
    network, servers = network_and_servers
    yield network
    for kind in network.nets:
        network.join(kind)
    for server in servers.servers:
        server.start()
        server.unfreeze()
    servers.wait_healthy()


@pytest.fixture
def servers(network: Network, network_and_servers: tuple[Network, NatsServers]) -> NatsServers:
    return network_and_servers[1]


@pytest.fixture
def settings(servers: NatsServers) -> ClusterSettings:
    return servers.settings(prefix=next(_prefixes))


@pytest.fixture
async def client(settings: ClusterSettings) -> AsyncIterator[NatsClient]:
    async with connected(settings) as client:
        yield client


async def connect_to_first(client: NatsClient, servers: NatsServers) -> None:
    """Reconnect until the client uses the first server."""
    with trio.fail_after(WAIT):
        while True:
            url = None
            with suppress(NatsUnavailable):
                url = await client.call(lambda nats: _url(nats.nc.connected_url))
            if url == servers.servers[0].url and client.connected:
                return
            with suppress(NatsUnavailable):
                await client.call(lambda nats: nats.nc.force_reconnect())
            await trio.sleep(0.5)


async def _url(url: object) -> str:
    return "" if url is None else f"nats://{getattr(url, 'netloc', '')}"


@pytest.mark.parametrize("kind", ["client", "route"])
async def test_the_server_of_a_client_is_cut_off(
    network: Network, servers: NatsServers, client: NatsClient, settings: ClusterSettings, kind: str
) -> None:
    """With ``route``, the server still answers the client's pings."""
    log = SpanStreams(client, Layout.of(settings))
    writers = Writers(log, 0)
    await connect_to_first(client, servers)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(writers.run)
        await writers.until(30)
        network.cut(kind)
        await trio.sleep(1)
        await writers.until(30)
        network.join(kind)
        await writers.until(30)
        nursery.cancel_scope.cancel()
    await check(log, writers, 0)


async def test_the_leader_is_frozen_while_writers_append(
    servers: NatsServers, client: NatsClient, settings: ClusterSettings
) -> None:
    layout = Layout.of(settings)
    log = SpanStreams(client, layout)
    leader = servers.leader(layout.spans_stream(0))
    await check_through(log, 50, leader.freeze, leader.unfreeze)


async def test_random_faults(
    network: Network, servers: NatsServers, client: NatsClient, settings: ClusterSettings
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    log = SpanStreams(client, Layout.of(settings))
    writers = [Writers(log, partition) for partition in range(2)]
    async with trio.open_nursery() as nursery:
        for each in writers:
            for _ in range(3):
                nursery.start_soon(each.run)
        for _ in range(FAULTS):
            server = choose.choice(servers.servers)
            match choose.choice(["kill", "freeze", "cut", "stop"]):
                case "kill":
                    server.kill()
                    await trio.sleep(choose.uniform(0, 6))
                    server.start()
                case "freeze":
                    server.freeze()
                    await trio.sleep(choose.uniform(0, 12))
                    server.unfreeze()
                case "cut":
                    kind = choose.choice(["client", "route"])
                    network.cut(kind)
                    await trio.sleep(choose.uniform(0, 12))
                    network.join(kind)
                case "stop":
                    for each in choose.sample(servers.servers, choose.choice([2, 3])):
                        each.kill()
                    await trio.sleep(choose.uniform(0, 3))
                    for each in choose.sample(servers.servers, 3):
                        each.start()
            for each in writers:
                await each.until(10)
        nursery.cancel_scope.cancel()
    for partition, each in enumerate(writers):
        await check(log, each, partition)


async def test_all_servers_restart_in_another_order(
    servers: NatsServers, client: NatsClient, settings: ClusterSettings
) -> None:
    log = SpanStreams(client, Layout.of(settings))
    writers = Writers(log, 0)
    for _ in range(20):
        await writers.append()
    for server in servers.servers:
        server.kill()
    with pytest.raises(NatsUnavailable):
        await log.last(0)
    for server in reversed(servers.servers):
        server.start()
    with trio.fail_after(WAIT):
        assert await log.append(0, b"w3", "w3") == writers.acknowledged["w3"]
        await writers.append()
    await check(log, writers, 0)
