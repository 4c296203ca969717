"""Failures of evaluators and of the log on a real NATS server: nothing is lost and nothing doubled.

The table in ``docs/cluster.md`` names these tests, and those of the other failures.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import trio

from betrace.service.cluster.evaluator import checkpoints
from betrace.service.cluster.evaluator.evaluator import Evaluator
from betrace.service.cluster.output import Output
from betrace.service.storage.jetstream.blobs import Blobs
from betrace.service.storage.jetstream.nats import Nats
from betrace.service.storage.jetstream.process_leases import HeldLease, ProcessLeases
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.jetstream.stream_log import LogMessage
from tests.cluster.links import Link
from tests.support.cluster_load import WAIT
from tests.support.owners_on_nats import (
    PARTITIONS,
    EvaluatorInProcess,
    OwnersOnNats,
    current,
    on_a_server,
    wait_until,
)

pytestmark = pytest.mark.slow

HOUR_NS = 3600 * 1_000_000_000


async def loaded(cluster: OwnersOnNats, seconds: float = 1.0) -> None:
    """Send traces for a while, all of them whole."""
    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_until, sent)
        await trio.sleep(seconds)
        sent.set()


def total(node: EvaluatorInProcess, counter: str) -> int:
    return sum(getattr(status, counter) for status in node.evaluator.statuses)


@on_a_server
async def test_an_evaluator_is_killed_and_the_others_continue(cluster):
    nodes = [await cluster.start(name) for name in ("one", "two", "three")]
    one, two, three = nodes
    await wait_until(current(*nodes))
    await cluster.rules_are_known()
    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_until, sent)
        one.kill()
        await wait_until(current(two, three))
        for partition in PARTITIONS:
            statuses = [node.evaluator.statuses[partition] for node in (two, three)]
            before = max(status.applied for status in statuses)
            await wait_until(lambda s=statuses, b=before: max(each.applied for each in s) > b)
        sent.set()
    await cluster.check()


@on_a_server
async def test_an_evaluator_is_frozen_for_three_lease_times(cluster):
    one = await cluster.start("one")
    await wait_until(current(one))
    await cluster.rules_are_known()
    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_until, sent)
        await trio.sleep(1)
        one.freeze()
        two = await cluster.start("two")
        await wait_until(current(two))
        await trio.sleep(3 * cluster.settings.lease_seconds)
        one.thaw.set()
        await wait_until(lambda: current(one, two)() and one.owned != [])  # it has a share again
        sent.set()
    await cluster.check()


@on_a_server
async def test_an_evaluator_is_cut_off(cluster):
    link = Link((cluster.servers.servers[0].host, cluster.servers.servers[0].port))
    try:
        one = await cluster.start("one", f"nats://127.0.0.1:{link.port}")
        await wait_until(current(one))
        await cluster.rules_are_known()
        sent = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.send_until, sent)
            two = await cluster.start("two")
            await wait_until(current(one, two))
            link.cut()
            everything = lambda: two.owned == list(PARTITIONS)  # noqa: E731
            await wait_until(everything)
            await trio.sleep(cluster.settings.lease_seconds)
            link.heal()
            await wait_until(lambda: not everything())
            await wait_until(current(one, two))
            sent.set()
        await cluster.check()
    finally:
        one.kill()
        link.close()


class NoLeases(ProcessLeases):
    """Whoever asks gets the lease."""

    def __init__(self) -> None:
        super().__init__(None, 2)
        self.ready.set()

    async def run(self) -> None:
        pass

    async def acquire(self, key: str, owner: str) -> HeldLease:
        return HeldLease(key, owner, 1)

    async def renew(self) -> None:
        pass

    async def release(self, lease: HeldLease) -> None:
        pass


def alone(evaluator: Evaluator) -> None:
    """Let an evaluator believe that there is no other."""
    evaluator._parts = replace(evaluator._parts, leases=NoLeases())
    name = evaluator._parts.node
    evaluator._membership.alive = lambda role: {name: SimpleNamespace(draining=False)}


@on_a_server
async def test_two_owners_at_once(cluster):
    one = await cluster.start("one", change=alone)
    await wait_until(current(one))
    await cluster.rules_are_known()
    two = await cluster.start("two", change=alone)
    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_until, sent, 5, 0.25)
        await wait_until(lambda: min(total(one, "fenced"), total(two, "fenced")) > 0)
        one.kill()
        sent.set()
    await cluster.check()


async def tear(cluster: OwnersOnNats, name: str) -> None:
    """Delete the chunks of a checkpoint."""
    blobs = Blobs(cluster.client, cluster.layout.checkpoints_store)

    async def work(nats: Nats) -> None:
        description = await blobs._find(nats, name)
        assert description is not None
        await blobs._purge(nats, blobs._chunks + description["nuid"])

    await cluster.client.call(work)


@on_a_server
async def test_checkpoints_are_torn_and_missing(cluster):
    one = await cluster.start("one")
    await wait_until(current(one))
    await cluster.rules_are_known()
    blobs = Blobs(cluster.client, cluster.layout.checkpoints_store)
    kept: dict[int, list[str]] = {}

    async def two_of_each() -> bool:
        for partition in PARTITIONS:
            kept[partition] = await checkpoints.newest_first(blobs, partition)
        return all(len(names) == checkpoints.KEPT for names in kept.values())

    with trio.fail_after(WAIT):
        while not await two_of_each():
            await cluster.send_traces(20)
            await trio.sleep(0.1)
    one.kill()
    await one.ended.wait()
    await two_of_each()
    await tear(cluster, kept[0][0])
    await blobs.delete(kept[1][0])
    for name in kept[2]:
        await blobs.delete(name)
    for name in kept[3]:
        await tear(cluster, name)
    await cluster.send_traces(20)
    two = await cluster.start("two")
    await wait_until(current(two))
    unusable = [status.unusable_checkpoints for status in two.evaluator.statuses]
    assert unusable[1] == unusable[2] == 0
    assert unusable[0] >= 1
    assert unusable[3] >= len(kept[3])
    await cluster.check()


class JumpingClock:
    """The streams, as if the clocks of the servers jumped to and fro by an hour."""

    def __init__(self, spans: SpanStreams) -> None:
        self._spans = spans

    def __getattr__(self, name: str) -> object:
        return getattr(self._spans, name)

    async def read(
        self, partition: int, after: int, most_bytes: int, wait_seconds: float
    ) -> list[LogMessage]:
        found = await self._spans.read(partition, after, most_bytes, wait_seconds)
        return [self._jumped(message) for message in found]

    async def get(self, partition: int, sequence: int) -> LogMessage | None:
        found = await self._spans.get(partition, sequence)
        return None if found is None else self._jumped(found)

    def _jumped(self, message: LogMessage) -> LogMessage:
        hours = (0, 1, 0, -1)[message.sequence // 10 % 4]
        return replace(message, time_ns=message.time_ns + hours * HOUR_NS)


@on_a_server
async def test_a_servers_clock_jumps_by_an_hour_either_way(cluster):
    def jumps(evaluator: Evaluator) -> None:
        parts = evaluator._parts
        evaluator._parts = replace(parts, spans=JumpingClock(parts.spans))

    began = trio.current_time()
    one = await cluster.start("one", change=jumps)
    await wait_until(current(one))
    await cluster.rules_are_known()
    await loaded(cluster, 3)
    one.kill()
    two = await cluster.start("two", change=jumps)
    await wait_until(current(two))
    await loaded(cluster)
    await cluster.check()
    jumps_seen = max(status.applied for status in two.evaluator.statuses) / 20 + 1
    for partition in PARTITIONS:
        outputs = await cluster.outputs_of(partition)
        passed = (outputs[-1].log_time_ns - outputs[0].log_time_ns) / 1e9
        assert passed < trio.current_time() - began + 2 * jumps_seen  # of hours, 2 s each


def closed(outputs: list[Output]) -> int:
    return sum(len(d.closed) for found in outputs for d in found.decided if d.closed is not None)


@on_a_server
async def test_full_streams_stop_time_and_what_is_stored_is_evaluated(cluster):
    one = await cluster.start("one")
    await wait_until(current(one))
    await cluster.rules_are_known()
    one.kill()
    await one.ended.wait()
    for _ in range(4):
        await cluster.send_traces(40)
        await trio.sleep(0.2)

    async def limit(most_bytes: int) -> None:
        for wanted in cluster.layout.streams():
            if wanted["name"] in map(cluster.layout.spans_stream, PARTITIONS):
                body = {**wanted, "max_bytes": most_bytes}
                subject = f"STREAM.UPDATE.{wanted['name']}"
                await cluster.client.call(lambda nats, s=subject, b=body: nats.api(s, b))

    await limit(1)
    ends = {p: await cluster.spans.last(p) for p in PARTITIONS}
    two = await cluster.start("two")
    await wait_until(current(two))
    statuses = two.evaluator.statuses
    await wait_until(lambda: all(s.lag_messages == 0 for s in statuses))

    async def progress() -> tuple[list[int], int]:
        return [s.log_time_ns for s in statuses], closed(await cluster.outputs())

    with trio.fail_after(WAIT):
        before = None
        while (now := await progress()) != before:
            before = now
            await trio.sleep(3)  # traces are idle after 1 s
    assert total(two, "applied") > 0
    assert now[1] < len(cluster.traces)
    assert {p: await cluster.spans.last(p) for p in PARTITIONS} == ends
    await limit(-1)
    await cluster.check()
