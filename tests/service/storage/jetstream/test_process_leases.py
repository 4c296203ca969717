"""The leases of a process that has many, on a real server."""

from __future__ import annotations

import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases
from betrace.service.storage.jetstream.nats import Nats
from betrace.service.storage.jetstream.process_leases import ProcessLeases


@pytest.fixture
def bucket(client: NatsClient, settings: ClusterSettings) -> ConfigBucket:
    return ConfigBucket(client, Layout.of(settings).leases_bucket)


async def stored_owners(bucket: ConfigBucket) -> dict[str, str]:
    return {key: owner for key, owner in (await Leases(bucket, 2).owners()).items() if owner}


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_lease_is_taken_over_once_its_holder_is_silent(bucket: ConfigBucket) -> None:
    clock = _Clock()
    ann, bob = ProcessLeases(bucket, 2, clock), ProcessLeases(bucket, 2, clock)
    lease = await ann.acquire("p0", "ann")
    assert lease is not None
    await bob.look()
    assert await bob.acquire("p0", "bob") is None  # sees it for the first time
    clock.now += 1.9
    await ann.renew()
    await bob.look()
    assert await bob.acquire("p0", "bob") is None
    clock.now += 1.9
    await ann.renew()  # which bob does not see in time
    clock.now += 0.2
    assert await bob.acquire("p0", "bob") is None
    clock.now += 2.1
    taken = await bob.acquire("p0", "bob")
    assert taken is not None
    await ann.look()
    assert lease.lost.is_set()
    assert ann.owners() == bob.owners() == await stored_owners(bucket) == {"p0": "bob"}
    await ann.release(lease)
    await ann.renew()
    assert await stored_owners(bucket) == {"p0": "bob"}
    assert not taken.lost.is_set()


async def test_a_released_lease_is_free(bucket: ConfigBucket) -> None:
    ann, bob = ProcessLeases(bucket, 1000), ProcessLeases(bucket, 1000)
    lease = await ann.acquire("p0", "same name")
    assert lease is not None
    assert await bob.acquire("p0", "same name") is None
    await ann.release(lease)
    assert await stored_owners(bucket) == ann.owners() == {}
    await bob.look()
    again = await ann.acquire("p0", "same name")
    assert again is not None
    assert not again.lost.is_set()
    assert await bob.acquire("p0", "same name") is None
    await ann.release(again)
    await ann.leave()
    assert await bucket.entries() == []


async def test_one_of_several_successors_gets_a_lease(bucket: ConfigBucket) -> None:
    clock = _Clock()
    processes = [ProcessLeases(bucket, 2, clock) for _ in range(4)]
    assert await processes[0].acquire("p0", "n0") is not None
    for each in processes[1:]:
        await each.look()
        assert await each.acquire("p0", "x") is None
    clock.now += 2
    winners: list[int] = []

    async def take(k: int) -> None:
        if await processes[k].acquire("p0", f"n{k}") is not None:
            winners.append(k)

    async with trio.open_nursery() as nursery:
        for k in (1, 2, 3):
            nursery.start_soon(take, k)
    assert len(winners) == 1


async def test_a_lease_that_nobody_uses_is_released_with_the_next_renewal(
    bucket: ConfigBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = ProcessLeases(bucket, 2)
    await leases.renew()
    publish = Nats.publish

    async def lossy(nats: Nats, subject: str, data: bytes, headers: dict[str, str]) -> int:
        await publish(nats, subject, data, headers)
        raise NatsUnavailable("the reply was lost")

    monkeypatch.setattr(Nats, "publish", lossy)
    for key in ("p0", "p1"):
        with pytest.raises(NatsUnavailable):
            await leases.acquire(key, "ann")
    monkeypatch.undo()
    await leases.look()
    kept = await leases.acquire("p0", "ann")
    assert kept is not None
    await leases.renew()
    assert await stored_owners(bucket) == {"p0": "ann"}
    assert not kept.lost.is_set()
    leases.drop(kept)
    await leases.renew()
    assert await stored_owners(bucket) == {}


async def test_the_pulse_of_a_dead_process_is_removed_in_the_end(bucket: ConfigBucket) -> None:
    clock = _Clock()
    ann, bob = ProcessLeases(bucket, 2, clock), ProcessLeases(bucket, 2, clock)
    await ann.renew()
    await bob.look()
    clock.now += 500
    await bob.renew()
    assert len(await bucket.entries()) == 2
    clock.now += 200
    await bob.look()
    await bob.renew()
    assert len(await bucket.entries()) == 1
