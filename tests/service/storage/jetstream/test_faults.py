"""Three real servers with real faults: nothing acknowledged is lost, nothing is stored twice."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.fenced import Fenced, FencedLog
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.nats import Nats
from betrace.service.storage.jetstream.spans import SpanStreams
from tests.support.log_writers import (
    WAIT,
    Writers,
    check,
    check_through,
    patiently,
    read_all,
)
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers, connected

MB = 1 << 20

pytestmark = pytest.mark.slow
_numbers = itertools.count()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats"), 3) as servers:
        yield servers


@pytest.fixture
def servers(cluster: NatsServers) -> Iterator[NatsServers]:
    """All servers run before and after a test."""
    yield cluster
    for server in cluster.servers:
        server.start()
        server.unfreeze()
    cluster.wait_healthy()


@pytest.fixture
def settings(servers: NatsServers) -> ClusterSettings:
    return servers.settings(prefix=f"fault{next(_numbers)}")


@pytest.fixture
async def client(settings: ClusterSettings) -> AsyncIterator[NatsClient]:
    async with connected(settings) as client:
        yield client


async def test_the_leader_is_killed_while_writers_append(
    servers: NatsServers, client: NatsClient, settings: ClusterSettings
) -> None:
    layout = Layout.of(settings)
    log = SpanStreams(client, layout)
    leader = servers.leader(layout.spans_stream(0))
    await check_through(log, 50, leader.kill, leader.start)


async def test_owners_take_over_while_leaders_are_killed(
    servers: NatsServers, client: NatsClient, settings: ClusterSettings
) -> None:
    layout = Layout.of(settings)
    log = FencedLog(client, layout, 0)
    acknowledged: dict[int, bytes] = {}
    epochs: dict[int, bytes] = {}

    async def own(name: str) -> None:
        output = FencedLog(client, layout, 0)
        epoch = await output.open(name)
        epochs[epoch.sequence] = name.encode()
        try:
            for number in itertools.count():
                data = f"{name} {number}".encode()
                acknowledged[await output.append(data)] = data
        except Fenced:
            return

    async def until(number: int) -> None:
        target = len(acknowledged) + number
        with trio.fail_after(WAIT):
            while len(acknowledged) < target:
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(own, "owner0")
        await until(20)
        leader = servers.leader(layout.out_stream(0))
        leader.kill()
        nursery.start_soon(own, "owner1")
        nursery.start_soon(own, "owner2")
        await until(20)
        leader.start()
        nursery.start_soon(own, "owner3")
        with trio.fail_after(WAIT):
            while len(epochs) < 4:
                await trio.sleep(0.05)
        await until(20)
        nursery.cancel_scope.cancel()

    stored: list[tuple[int, int, bytes]] = []
    with trio.fail_after(WAIT):
        last = await patiently(log.last)
        while len(stored) < last:
            stored += [
                (each.sequence, each.epoch, each.data)
                for each in await patiently(log.read, len(stored), None, MB, 5)
            ]
    assert [number for _, number, _ in stored if number] == [1, 2, 3, 4]
    owner = b""
    for sequence, number, data in stored:
        if number:
            owner = epochs[sequence]
        else:
            assert data.startswith(owner + b" ")
    assert {s: d for s, _, d in stored if d and s in acknowledged} == acknowledged
    data = [each for _, _, each in stored if each]
    assert len(set(data)) == len(data)


async def test_without_a_quorum_calls_fail_in_time_and_recover(
    servers: NatsServers, client: NatsClient, settings: ClusterSettings
) -> None:
    layout = Layout.of(settings)
    log = SpanStreams(client, layout)
    writers = Writers(log, 0)
    for _ in range(10):
        await writers.append()
    lost = servers.servers[1:]
    for server in lost:
        server.kill()
    bucket = ConfigBucket(client, layout.config_bucket)
    with trio.fail_after(WAIT), pytest.raises(NatsUnavailable):
        await bucket.put("key", b"value")
    with trio.move_on_after(0.5) as scope:
        await log.append(0, b"unknown", "unknown")
    assert scope.cancelled_caught
    found = await patiently(log.read, 0, 0, MB, 0)  # what is stored can still be read
    assert len(found) == 10
    for server in reversed(lost):
        server.start()
    with trio.fail_after(WAIT):
        await log.append(0, b"unknown", "unknown")
        await writers.append()
    await check(log, writers, 0)
    assert list((await read_all(log, 0)).values()).count("unknown") == 1


async def test_a_frozen_server_is_left_although_data_to_it_is_not_sent(tmp_path: Path) -> None:
    first = NatsServers(tmp_path / "first")
    second = NatsServers(tmp_path / "second")
    with first, second:
        settings = ClusterSettings(servers=f"{first.urls},{second.urls}")
        client = await NatsClient.connect(settings, "test")
        try:
            url = await client.call(lambda nats: asyncio.sleep(0, nats.nc.connected_url))
            assert url is not None
            frozen, other = (first, second) if url.netloc in first.urls else (second, first)
            frozen.servers[0].freeze()

            async def send(nats: Nats) -> None:
                for _ in range(8):
                    await nats.nc.publish("nobody.listens", bytes(8 << 20))

            await client.call(send)
            with trio.fail_after(WAIT):
                while not client.reconnects:
                    await trio.sleep(0.1)
            url = await client.call(lambda nats: asyncio.sleep(0, nats.nc.connected_url))
            assert url is not None
            assert url.netloc in other.urls
            assert await client.call(lambda nats: nats.api("INFO"))
        finally:
            await client.close()
