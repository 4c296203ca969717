"""A change of the number of partitions: numbers, the map, and owners in virtual time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.evaluator import housekeeping
from betrace.service.cluster.evaluator.inheritance import final_state_name
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.otlp.partition import partition_of
from betrace.service.storage.jetstream.bucket import Entry
from betrace.service.storage.jetstream.generations import (
    FINISHED_PREFIX,
    MOST_PARTITIONS,
    PARTITIONS_KEY,
    Finished,
    Generation,
    Generations,
    finished_key,
)
from tests.support import virtual
from tests.support.cluster_fakes import FakeBucket, FakeEvaluator, FakeNats, FakeNode
from tests.support.virtual import wait_until

# Numbers


def test_generations_have_numbers_of_their_own_and_parents():
    first = Generations.of(4)
    assert Generations.from_json(first.to_json()) == first
    assert first.to_json() == b"4"
    assert first.parent(3) is None
    assert first.former(3) == []
    grown = first.grown(12).grown(24)
    assert grown.current == Generation(16, 24)
    assert grown.total == 40
    assert Generations.from_json(grown.to_json()) == grown
    assert [grown.parent(p) for p in (4, 7, 8, 15)] == [0, 3, 0, 3]
    assert [grown.parent(p) for p in (16, 28, 39)] == [4, 4, 15]
    assert [grown.former(p) for p in (16, 19, 20, 27, 28, 3)] == [[0, 4], [3, 7], [8], [15], [], []]
    assert [grown.is_retired(p) for p in (0, 15, 16)] == [True, True, False]
    assert grown.current.partition_of("t", b"\1" * 16) == 16 + partition_of("t", b"\1" * 16, 24)


@pytest.mark.parametrize("number", [4, 2, 6, 9])
def test_the_number_of_partitions_can_only_be_multiplied(number):
    with pytest.raises(ValueError, match="can only be multiplied"):
        Generations.of(4).grown(number)


def test_numbers_can_run_out():
    with pytest.raises(ValueError, match="no numbers left"):
        Generations.of(1).grown(MOST_PARTITIONS)


@pytest.mark.parametrize("value", [b'{"generations": [[0]]}', b"[]", b"{}", b"junk"])
def test_an_unknown_value_is_refused(value):
    with pytest.raises(ValueError):  # noqa: PT011 - of orjson, or of this program
        Generations.from_json(value)


def test_there_is_no_parent_of_a_partition_that_does_not_exist():
    with pytest.raises(ValueError, match="no partition 4"):
        Generations.of(4).parent(4)


# The map


def test_the_map_knows_what_needs_an_owner_and_who_has_a_trace():
    found = PartitionMap(None, Generations.of(2))  # type: ignore[arg-type]
    changed = found.changed
    found.note(Entry(PARTITIONS_KEY, Generations.of(2).grown(4).to_json(), 1))
    assert changed.is_set()
    assert found.active() == [0, 1, 2, 3, 4, 5]
    trace = b"\3" * 16
    parent = partition_of("t", trace, 2)
    child = 2 + partition_of("t", trace, 4)
    assert found.holder_of("t", trace) == parent
    assert not found.may_begin(child)
    assert found.may_begin(parent)
    found.note(Entry(finished_key(parent), Finished(7, 9).to_json(), 2))
    assert found.finished == {parent: Finished(7, 9)}
    assert found.holder_of("t", trace) == child
    assert parent not in found.active()
    found.note(Entry(PARTITIONS_KEY, Generations.of(2).to_json(), 1))  # of a replica that is behind
    assert found.generations.total == 6
    found.note(Entry(finished_key(parent), None, 3))
    assert not found.finished


# Owners


class Cluster:
    """Fake servers with some evaluators, and what was sent to each partition."""

    def __init__(self, nursery: trio.Nursery, threads: ThreadRunner) -> None:
        self.nats = FakeNats()
        self.bucket = FakeBucket(FakeNode(self.nats, "command"), "config")
        self.nursery = nursery
        self.threads = threads
        self.generations = Generations.of(4)
        self.sent: dict[int, list[str]] = defaultdict(list)

    def start(self, name: str, **changes: Any) -> FakeEvaluator:
        evaluator = FakeEvaluator(self.nats, name, self.threads)
        evaluator.with_parts(**changes)
        self.nursery.start_soon(evaluator.run)
        return evaluator

    def send(self) -> None:
        for partition in self.generations.current.partitions:
            body = f"{partition}/{len(self.sent[partition])}"
            self.sent[partition].append(body)
            self.nats.put_spans(partition, body)

    async def send_for(self, seconds: float) -> None:
        until = trio.current_time() + seconds
        while trio.current_time() < until:
            self.send()
            await trio.sleep(0.05)

    async def resize(self, partitions: int) -> None:
        grown = self.generations.grown(partitions)
        await self.bucket.put(PARTITIONS_KEY, grown.to_json())
        self.generations = grown

    def finished(self) -> list[int]:
        entries = self.nats.buckets["config"].values()
        keys = [e.key for e in entries if e.key.startswith(FINISHED_PREFIX) and e.value]
        return sorted(int(key.removeprefix(FINISHED_PREFIX)) for key in keys)

    def current(self, *evaluators: FakeEvaluator) -> Callable[[], bool]:
        def check() -> bool:
            found = [s for each in evaluators for s in each.evaluator.statuses if s.owned]
            owned = sorted(status.partition for status in found)
            expected = list(self.generations.current.partitions)
            return owned == expected and all(status.phase == "current" for status in found)

        return check

    async def check(self) -> None:
        """Each signal is there exactly once, in the order in which its span was sent."""
        for partition, sent in self.sent.items():
            await wait_until(lambda p=partition, s=sent: len(self.nats.signals(p)) >= len(s))
        await trio.sleep(3)
        for partition, sent in self.sent.items():
            assert self.nats.signals(partition) == sent


@asynccontextmanager
async def fake_cluster():
    with ThreadRunner("evaluators", 64) as threads:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(900):
                yield Cluster(nursery, threads)
            nursery.cancel_scope.cancel()


in_virtual_time = virtual.with_world(fake_cluster)


@in_virtual_time
async def test_partitions_are_passed_on_under_load(cluster):
    one, two = cluster.start("one"), cluster.start("two")
    await cluster.send_for(3)
    assert len(one.evaluator.statuses) == 4
    await cluster.resize(8)
    began = trio.current_time()
    await cluster.send_for(1)
    await wait_until(cluster.current(one, two))
    assert trio.current_time() - began < 5
    await cluster.send_for(1)
    await cluster.check()
    assert cluster.finished() == [0, 1, 2, 3]
    assert len(one.owned) == len(two.owned) == 4
    assert [s.partition for s in one.evaluator.active_statuses] == list(range(4, 12))
    await cluster.resize(16)
    await cluster.send_for(1)
    await wait_until(cluster.current(one, two))
    await cluster.check()
    lengths = [len(cluster.nats.logs[f"out-{p}"]) for p in range(12)]
    await trio.sleep(30)
    assert [len(cluster.nats.logs[f"out-{p}"]) for p in range(12)] == lengths


@in_virtual_time
async def test_evaluators_are_killed_while_partitions_are_passed_on(cluster):
    nodes = [cluster.start("node-0"), cluster.start("node-1")]
    await cluster.send_for(1)
    partitions = 4
    for number, seconds in enumerate((0.1, 0.27, 0.3, 0.5, 1.2)):
        if number < 3:
            partitions *= 2
            await cluster.resize(partitions)
        await cluster.send_for(seconds)
        nodes.pop(0).scope.cancel()
        nodes.append(cluster.start(f"node-{number + 2}"))
        await wait_until(cluster.current(*nodes))
    await cluster.check()
    assert len(cluster.finished()) == 4 + 8 + 16


@in_virtual_time
async def test_a_last_state_that_is_damaged_is_saved_again(cluster):
    one = cluster.start("one")
    await cluster.send_for(1)
    await cluster.resize(8)
    await wait_until(cluster.current(one))
    await cluster.send_for(2)
    await cluster.check()
    one.scope.cancel()
    blobs = cluster.nats.blobs
    for name in [name for name in blobs if name.partition("/")[0] in ("4", "8", "5")]:
        del blobs[name]
    blobs[final_state_name(0)] = b"damaged"
    del blobs[final_state_name(1)]
    two = cluster.start("two")
    await wait_until(cluster.current(two))
    await cluster.send_for(1)
    await cluster.check()
    assert blobs[final_state_name(0)] != b"damaged"
    assert sum(status.failures for status in two.evaluator.statuses) >= 2


@in_virtual_time
async def test_old_messages_of_a_former_partition_are_deleted(cluster):
    with (
        mock.patch.object(housekeeping, "EVERY_SECONDS", 1.0),
        mock.patch.object(housekeeping, "_DAY_NS", 2_000_000_000),
    ):
        one = cluster.start("one", log_days=1)
        await cluster.send_for(1)
        await cluster.resize(8)
        await wait_until(cluster.current(one))
        await cluster.send_for(5)
        log = cluster.nats.logs["spans-0"]
        sealed = one.partitions.finished[0].sealed
        assert next(message.sequence for message in log if message.epoch >= 0) == sealed
        assert cluster.nats.tidied
