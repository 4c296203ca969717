"""Batches delayed by a pace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from trio.testing import MockClock

from betrace.channels import Batcher, Pacing, open_channel


class Every:
    """Allows a batch every ``seconds``, and an urgent one ten times as often."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.next = {True: 0.0, False: 0.0}
        self.out: list[tuple[float, bool]] = []

    def due(self, urgent: bool) -> float:
        return self.next[urgent]

    def taken(self, urgent: bool) -> None:
        now = trio.current_time()
        self.out.append((round(now, 3), urgent))
        self.next[urgent] = now + self.seconds / (10 if urgent else 1)


@asynccontextmanager
async def batches(
    pace: Every, items: list[str], most_wait: float = 100.0, most_weight: float = 1000
) -> AsyncIterator[list[tuple[float, str]]]:
    """The batches and their times. An item's key is its first letter; capitals are urgent."""
    send, receive = open_channel("test", 1000, lambda _: 1)
    batcher = Batcher(
        receive,
        5,
        1.0,
        key=lambda item: item[0].lower(),
        pacing=Pacing(pace, str.isupper, most_wait, most_weight),
    )
    found: list[tuple[float, str]] = []

    async def read() -> None:
        async for batch in batcher:
            found.append((round(trio.current_time() - start, 3), "".join(batch)))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for item in items:
            await send.send(item)
        yield found
        send.close()


async def test_batches_come_out_at_the_pace_oldest_first(autojump_clock: MockClock) -> None:
    async with batches(Every(10.0), ["a", "b", "c", "a"]) as found:
        await trio.sleep(25)
        assert found == [(1.0, "aa"), (11.0, "b"), (21.0, "c")]


async def test_urgent_batches_go_first_at_their_own_pace(autojump_clock: MockClock) -> None:
    async with batches(Every(10.0), ["a", "b", "C", "c", "D"]) as found:
        await trio.sleep(15)
        assert found == [(1.0, "Cc"), (1.0, "a"), (2.0, "D"), (11.0, "b")]


async def test_no_batch_waits_longer_than_most_wait(autojump_clock: MockClock) -> None:
    async with batches(Every(1000.0), ["a", "b", "c"], most_wait=7.0) as found:
        await trio.sleep(10)
        assert found == [(1.0, "a"), (7.0, "b"), (7.0, "c")]


async def test_a_full_batch_does_not_wait(autojump_clock: MockClock) -> None:
    async with batches(Every(1000.0), ["a", *"bbbbb"]) as found:
        await trio.sleep(0.5)
        assert found == [(0.0, "bbbbb")]


async def test_the_heaviest_batch_comes_out_when_too_much_waits(autojump_clock: MockClock) -> None:
    async with batches(Every(1000.0), ["a", "b", "b", "c", "d"], most_weight=4) as found:
        await trio.sleep(0.5)
        assert found == [(0.0, "bb")]


async def test_all_batches_come_out_when_the_channel_ends(autojump_clock: MockClock) -> None:
    async with batches(Every(1000.0), ["a", "b", "c"]) as found:
        await trio.sleep(2)
        assert found == [(1.0, "a")]
    assert found == [(1.0, "a"), (2.0, "b"), (2.0, "c")]


async def test_a_slow_consumer_gets_everything_queued(autojump_clock: MockClock) -> None:
    send, receive = open_channel("test", 1000, lambda _: 1)
    batcher = Batcher(receive, 100, 1.0, key=lambda item: item, pacing=Pacing(Every(0.1)))
    sizes = []
    for _ in range(3):
        for item in "abcd" * 5:
            await send.send(item)
        await trio.sleep(2)
        sizes.append(len(await batcher.next()))
    assert sizes == [5, 10, 15]
