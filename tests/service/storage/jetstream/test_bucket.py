"""Buckets, leases and blobs, on a real server."""

from __future__ import annotations

import os
from contextlib import aclosing
from typing import Any

import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.blobs import BlobCorrupt, BlobMissing, Blobs
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict, Entry
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases
from betrace.service.storage.jetstream.nats import Nats


@pytest.fixture
def bucket(client: NatsClient, settings: ClusterSettings) -> ConfigBucket:
    return ConfigBucket(client, Layout.of(settings).members_bucket)


@pytest.fixture
def blobs(client: NatsClient, settings: ClusterSettings) -> Blobs:
    return Blobs(client, Layout.of(settings).checkpoints_store)


async def test_compare_and_set(bucket: ConfigBucket) -> None:
    assert await bucket.get("a") is None
    first = await bucket.put("a", b"1", 0)
    with pytest.raises(Conflict):
        await bucket.put("a", b"2", 0)
    second = await bucket.put("a", b"2", first)
    with pytest.raises(Conflict):
        await bucket.put("a", b"3", first)
    assert await bucket.get("a") == Entry("a", b"2", second)
    assert await bucket.put("a", b"4") > second


async def test_a_deleted_key_can_be_created_again(bucket: ConfigBucket) -> None:
    revision = await bucket.put("a", b"1")
    with pytest.raises(Conflict):
        await bucket.delete("a", revision + 1)
    await bucket.delete("a", revision)
    assert await bucket.get("a") is None
    assert await bucket.entries() == []
    assert await bucket.put("a", b"2", 0) > revision


async def test_entries_of_a_prefix(bucket: ConfigBucket) -> None:
    for key in ("rules.a", "rules.b", "tenants.a", "rules.a"):
        await bucket.put(key, key.encode())
    assert [entry.key for entry in await bucket.entries("rules.")] == ["rules.b", "rules.a"]


async def test_a_watch_sees_what_is_there_and_what_comes(bucket: ConfigBucket) -> None:
    await bucket.put("rules.a", b"1")
    await bucket.put("other", b"1")
    seen: list[tuple[str, bytes | None]] = []
    async with trio.open_nursery() as nursery, aclosing(bucket.watch("rules.")) as changes:
        async for entry in changes:
            seen.append((entry.key, entry.value))
            if len(seen) == 1:
                nursery.start_soon(bucket.put, "rules.b", b"2")
            elif len(seen) == 2:
                nursery.start_soon(bucket.delete, "rules.a")
            else:
                break
    assert seen == [("rules.a", b"1"), ("rules.b", b"2"), ("rules.a", None)]


# Leases


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_lease_is_taken_over_once_it_was_not_renewed(bucket: ConfigBucket) -> None:
    clock = _Clock()
    ann, bob = Leases(bucket, 2, clock), Leases(bucket, 2, clock)
    lease = await ann.acquire("p0", "ann")
    assert lease is not None
    assert await bob.acquire("p0", "bob") is None  # sees it for the first time
    clock.now += 1.9
    assert await ann.renew(lease)
    assert await bob.acquire("p0", "bob") is None
    clock.now += 1.9
    assert await bob.acquire("p0", "bob") is None  # renewed in between
    clock.now += 0.2
    taken = await bob.acquire("p0", "bob")
    assert taken is not None
    assert not await ann.renew(lease)
    assert await bob.owners() == {"p0": "bob"}
    await ann.release(lease)
    assert await bob.renew(taken)


async def test_a_released_lease_is_free(bucket: ConfigBucket) -> None:
    ann, bob = Leases(bucket, 1000), Leases(bucket, 1000)
    lease = await ann.acquire("p0", "same name")
    assert lease is not None
    assert await bob.acquire("p0", "same name") is None
    await ann.release(lease)
    assert await ann.owners() == {}
    assert await bob.acquire("p0", "same name") is not None


async def test_one_of_several_successors_gets_a_lease(bucket: ConfigBucket) -> None:
    clock = _Clock()
    processes = [Leases(bucket, 2, clock) for _ in range(4)]
    assert await processes[0].acquire("p0", "n0") is not None
    for each in processes[1:]:
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


async def test_a_renewal_whose_reply_was_lost_keeps_the_lease(
    bucket: ConfigBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases(bucket, 2)
    lease = await leases.acquire("p0", "ann")
    assert lease is not None
    publish = Nats.publish

    async def lossy(nats: Nats, subject: str, data: bytes, headers: dict[str, str]) -> int:
        await publish(nats, subject, data, headers)
        raise NatsUnavailable("the reply was lost")

    monkeypatch.setattr(Nats, "publish", lossy)
    with pytest.raises(NatsUnavailable):
        await leases.renew(lease)
    monkeypatch.undo()
    assert await leases.renew(lease)
    assert await leases.acquire("p0", "ann") is not None


# Blobs


@pytest.mark.parametrize("size", [0, 1, 256 << 10, (1 << 20) + 1])
async def test_a_blob_comes_back(blobs: Blobs, size: int) -> None:
    data = os.urandom(size)
    await blobs.put("p0/7", data)
    assert await blobs.get("p0/7") == data


async def test_a_blob_is_replaced_and_deleted(
    blobs: Blobs, client: NatsClient, settings: ClusterSettings
) -> None:
    await blobs.put("p0/1", os.urandom(1 << 20))
    await blobs.put("p0/1", b"new")
    await blobs.put("p1/1", b"other")
    assert await blobs.get("p0/1") == b"new"
    assert await blobs.names("p0/") == ["p0/1"]
    stream = f"OBJ_{Layout.of(settings).checkpoints_store}"
    info = await client.call(lambda nats: nats.api(f"STREAM.INFO.{stream}"))
    assert info["state"]["messages"] == 4  # the chunks of the old one are gone
    await blobs.delete("p0/1")
    await blobs.delete("p0/1")
    with pytest.raises(BlobMissing):
        await blobs.get("p0/1")
    assert await blobs.names() == ["p1/1"]


async def test_chunks_of_interrupted_puts_are_deleted(
    blobs: Blobs, client: NatsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.urandom(1 << 20)
    await blobs.put("p0/1", whole)
    write = blobs._write
    written = 0

    async def interrupted(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written > 3:
            raise NatsUnavailable("the process ends here")
        await write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(blobs, "_write", interrupted)
        with pytest.raises(NatsUnavailable):
            await blobs.put("p0/2", whole + whole)
    assert await blobs.delete_orphans(60) == 0  # it may still be under way
    assert await blobs.delete_orphans(0) == 1
    assert await blobs.delete_orphans(0) == 0
    assert await blobs.names() == ["p0/1"]
    assert await blobs.get("p0/1") == whole


async def test_a_damaged_blob_is_noticed(
    blobs: Blobs, client: NatsClient, settings: ClusterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betrace.service.storage.jetstream.blobs._TRIES", 2)
    await blobs.put("p0/1", os.urandom(600 << 10))
    stream = f"OBJ_{Layout.of(settings).checkpoints_store}"
    await client.call(lambda nats: nats.api(f"STREAM.MSG.DELETE.{stream}", {"seq": 2}))
    with pytest.raises(BlobCorrupt, match="damaged"):
        await blobs.get("p0/1")
