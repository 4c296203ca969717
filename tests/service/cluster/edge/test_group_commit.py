"""Group commit: what is sent when, and what its callers hear. In virtual time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.edge.group_commit import (
    APPEND_SECONDS,
    REFUSE_SECONDS,
    GroupCommit,
)
from betrace.service.cluster.edge.partition_groups import (
    EAGER_BURST,
    EAGER_PER_SECOND,
    LINGER_SECONDS,
    SEND_BYTES,
    STALL_SECONDS,
)
from betrace.service.otlp.split import BodyPart
from betrace.service.storage.jetstream.errors import StreamFull
from tests.support import virtual
from tests.support.fake_span_log import FakeSpanLog
from tests.support.spans import S, body

KIB = 1024
MIB = 1024 * KIB


def part(partition: int, size: int = 100, spans: int = 1) -> BodyPart:
    return BodyPart(partition, memoryview(b"x" * size), spans, [0])


class Bench:
    def __init__(self, **options: Any) -> None:
        self.log = FakeSpanLog()
        self.threads = ThreadRunner("commit", 1)
        given = {"most_group_bytes": MIB, "most_bytes": 64 * MIB} | options
        log: Any = self.log
        self.commit = GroupCommit(log, 4, self.threads, **given)
        self.outcomes: list[Any] = []

    def add(self, added: BodyPart, tenant: str = "t", received_ns: int = 1) -> None:
        self.commit.add(tenant, received_ns, added, self.outcomes.append)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Bench]:
    bench = Bench(**options)
    with bench.threads:
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.commit.run)
            yield bench
            nursery.cancel_scope.cancel()


def in_virtual_time(test: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        virtual.run(test)

    run.__doc__ = test.__doc__
    return run


def slow(seconds: float) -> Callable[[int], Any]:
    async def wait(partition: int) -> None:
        await trio.sleep(seconds)

    return wait


@in_virtual_time
async def test_an_idle_partition_sends_at_once():
    async with running() as bench:
        bench.add(part(1))
        bench.add(part(2))
        await bench.commit.drained()
        assert trio.current_time() == bench.log.times[0] == bench.log.times[1]
        assert bench.outcomes == [None, None]
        assert bench.commit.counts.eager == 2
        assert bench.commit.buffered_bytes == 0


@in_virtual_time
async def test_parts_wait_for_company_while_a_message_is_in_flight():
    async with running() as bench:
        bench.log.before = slow(1)
        start = trio.current_time()
        for n in range(5):
            bench.add(part(0, spans=n + 1), tenant=f"t{n % 2}", received_ns=n)
            await trio.sleep(0.01)
        await bench.commit.drained()
        assert bench.log.times == pytest.approx([start, start + 0.01 + LINGER_SECONDS])
        frames = [(f.tenant, f.received_ns, f.spans, len(f.body)) for _, f in bench.log.frames()]
        assert frames == [("t0", 0, 1, 100), ("t1", 3, 6, 200), ("t0", 4, 8, 200)]


@in_virtual_time
async def test_a_full_group_is_sent_without_waiting():
    async with running() as bench:
        bench.log.before = slow(1)
        start = trio.current_time()
        bench.add(part(0))
        await trio.sleep(0.001)
        bench.add(part(0, SEND_BYTES))
        await bench.commit.drained()
        assert bench.log.times == pytest.approx([start, start + 0.001])


@in_virtual_time
async def test_two_messages_of_a_partition_are_in_flight_at_most():
    async with running() as bench:
        bench.log.before = slow(1)
        start = trio.current_time()
        for _ in range(5):
            bench.add(part(0, SEND_BYTES))
            bench.add(part(1, SEND_BYTES))
            await trio.sleep(0.1)
        await bench.commit.drained()
        assert bench.log.most_in_flight == 2
        assert (
            len(bench.log.messages[0]) == len(bench.log.messages[1]) == 3
        )  # the last is of 768 KiB
        assert trio.current_time() == pytest.approx(start + 2.0)


@in_virtual_time
async def test_a_message_never_exceeds_the_limit():
    async with running(most_group_bytes=1000) as bench:
        bench.log.before = slow(1)
        for size in (bench.commit.most_part_bytes, 300, 300, 300, 10):
            bench.add(part(0, size))
        await bench.commit.drained()
        sizes = [len(frame.body) for _, frame in bench.log.frames()]
        assert sorted(sizes) == [310, 600, 900]


@in_virtual_time
async def test_few_messages_are_sent_eagerly_when_many_could_be():
    async with running() as bench:
        start = trio.current_time()
        while trio.current_time() < start + 3:
            bench.add(part(random.randrange(4)))
            await trio.sleep(0.0005)
        await bench.commit.drained()
        counts = bench.commit.counts
        assert counts.eager <= EAGER_BURST + 3 * EAGER_PER_SECOND + 4  # the last may overdraw it
        assert counts.messages <= counts.eager + 4 * 3 / LINGER_SECONDS
        assert counts.spans == len(bench.outcomes) > 3000


@in_virtual_time
async def test_without_quorum_parts_are_refused_in_time():
    async with running() as bench:
        bench.log.before = slow(3600)
        bench.add(part(0))
        start = trio.current_time()
        await trio.sleep(STALL_SECONDS - 0.1)
        assert bench.commit.refusal(0) is None
        await trio.sleep(0.2)
        refusal = bench.commit.refusal(0)
        assert refusal is not None
        assert (refusal.status, "quorum" in refusal.message) == (503, True)
        assert bench.commit.unavailable() == [0]
        assert bench.commit.refusal(1) is None
        await bench.commit.drained()
        assert trio.current_time() == pytest.approx(start + APPEND_SECONDS)
        assert bench.outcomes == [refusal]
        assert bench.commit.counts.no_quorum == 1
        assert bench.commit.refusal(0) == refusal
        await trio.sleep(REFUSE_SECONDS)
        assert bench.commit.refusal(0) is None  # the next request tries again
        bench.log.before = None
        bench.add(part(0))
        await bench.commit.drained()
        assert bench.outcomes[1:] == [None]


@in_virtual_time
async def test_a_full_stream_refuses_its_parts_alone():
    async def full(partition: int) -> None:
        if partition == 2:
            raise StreamFull("maximum bytes exceeded")

    async with running() as bench:
        bench.log.before = full
        bench.add(part(1))
        bench.add(part(2))
        await bench.commit.drained()
        done, refused = sorted(bench.outcomes, key=lambda each: each is not None)
        assert done is None
        assert (refused.status, "full" in refused.message) == (503, True)
        assert bench.commit.unavailable() == [2]
        assert bench.commit.counts.full == 1


@in_virtual_time
async def test_what_waits_for_a_partition_without_quorum_is_refused_with_it():
    async with running() as bench:
        bench.log.before = slow(3600)
        start = trio.current_time()
        for _ in range(6):
            bench.add(part(0, SEND_BYTES))
            await trio.sleep(0.01)
        bench.add(part(0))
        assert len(bench.commit._partitions[0].in_flight) == 2
        await bench.commit.drained()
        assert trio.current_time() < start + APPEND_SECONDS + 0.1
        assert len(bench.outcomes) == 7
        assert {each.status for each in bench.outcomes} == {503}


@in_virtual_time
async def test_a_bug_refuses_the_group_and_the_next_is_sent():
    async with running() as bench:

        async def fail(partition: int) -> None:
            raise RuntimeError("injected")

        bench.log.before = fail
        bench.add(part(0))
        await bench.commit.drained()
        bench.log.before = None
        bench.add(part(0))
        await bench.commit.drained()
        assert bench.outcomes[0].status == 503
        assert bench.outcomes[1] is None
        assert bench.commit.counts.failed == 1


@in_virtual_time
async def test_buffered_bytes_are_bounded():
    async with running(most_bytes=1000) as bench:
        bench.log.before = slow(1)
        assert bench.commit.has_room([part(0, 500), part(1, 500)])
        assert not bench.commit.has_room([part(0, 500), part(1, 501)])
        bench.add(part(0, 500))
        assert not bench.commit.has_room([part(1, 500)])
        await bench.commit.drained()
        assert bench.commit.has_room([part(1, 500)])


@pytest.mark.parametrize("seed", range(15))
def test_every_part_is_stored_once_or_refused(seed: int) -> None:
    """Random arrivals, sizes, delays and failures."""
    rng = random.Random(seed)

    async def test() -> None:
        async def before(partition: int) -> None:
            await trio.sleep(rng.choice([0, 0.001, 0.02, 0.2, 20]) * rng.random())
            if rng.random() < 0.1:
                raise rng.choice([StreamFull("full"), RuntimeError("injected")])

        most = rng.choice([2000, 20_000, MIB])
        async with running(most_group_bytes=most) as bench:
            bench.log.before = before
            outcomes: dict[int, Any] = {}
            for number in range(rng.choice([30, 200])):
                size = rng.randrange(rng.choice([100, 1500]))
                content = memoryview(body(S(number + 1, "n" * size)))
                added = BodyPart(rng.randrange(4), content, 1, [0])

                def written(refused: Any, number: int = number + 1) -> None:
                    assert number not in outcomes
                    outcomes[number] = refused

                bench.commit.add(f"t{rng.randrange(3)}", 1, added, written)
                if rng.random() < 0.3:
                    await trio.sleep(rng.choice([0.001, 0.01, 0.1]))
            await bench.commit.drained()
            assert bench.log.most_in_flight <= 2
            assert max(bench.log.ids.values(), default=1) == 1
            assert all(len(frame.body) < most for _, frame in bench.log.frames())
            stored = Counter({number: n for (_, number), n in bench.log.spans().items()})
            acknowledged = {number for number, refused in outcomes.items() if refused is None}
            assert acknowledged == set(stored)  # the fake stores nothing that it does not answer
            assert max(stored.values(), default=1) == 1
            assert set(outcomes) == set(range(1, len(outcomes) + 1))
            assert bench.commit.counts.spans == len(acknowledged)

    virtual.run(test)
