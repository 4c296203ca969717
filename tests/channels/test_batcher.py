"""Batches by weight and time: against a model in virtual time, and by example."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from betrace.channels import Batcher, ReceiveChannel, SendChannel, open_channel
from tests.support.examples import examples

Item = tuple[str, int, int]  # key, weight, number


def items_channel(
    capacity: int = 1000, hold: bool = False
) -> tuple[SendChannel[Item], ReceiveChannel[Item]]:
    weigh: Callable[[Item], int] = lambda item: item[1]  # noqa: E731
    return open_channel("items", capacity, weigh, hold=hold)


def key_of(item: Item) -> str:
    return item[0]


Timed = list[tuple[float, list[Item]]]


def expected_batches(
    arrivals: list[tuple[int, Item]], most: int, wait: float, max_keys: int, end: float
) -> Timed:
    """The expected batches and their times, for items that arrive one by one at whole seconds."""
    open_batches: dict[str, tuple[float, list[Item]]] = {}  # deadline, items; oldest first
    batches: Timed = []
    for at, item in arrivals:
        for key in [key for key, (deadline, _) in open_batches.items() if deadline < at]:
            batches.append(open_batches.pop(key))
        key, weight, _ = item
        if key in open_batches:
            held = open_batches[key][1]
            if sum(w for _, w, _ in held) + weight > most:
                batches.append((at, open_batches.pop(key)[1]))
        if key not in open_batches:
            if len(open_batches) == max_keys:
                oldest = next(iter(open_batches))
                batches.append((at, open_batches.pop(oldest)[1]))
            open_batches[key] = (at + wait, [])
        held = open_batches[key][1]
        held.append(item)
        if sum(w for _, w, _ in held) >= most:
            batches.append((at, open_batches.pop(key)[1]))
    batches += [(min(deadline, end), held) for deadline, held in open_batches.values()]
    return batches


@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from("abcd"), st.integers(1, 6)), max_size=30
    ),
    most=st.integers(1, 8),
    wait=st.sampled_from([0.5, 1.5, 3.5]),
    max_keys=st.integers(1, 3),
)
@settings(max_examples=examples(200), deadline=None)
def test_behaves_like_the_model(
    arrivals: list[tuple[int, str, int]], most: int, wait: float, max_keys: int
) -> None:
    at = 0
    timed: list[tuple[int, Item]] = []
    for number, (pause, key, weight) in enumerate(arrivals):
        at += pause
        timed.append((at, (key, weight, number)))

    async def main() -> None:
        send, receive = items_channel()
        batches: Timed = []

        async def consume() -> None:
            async for batch in Batcher(receive, most, wait, key=key_of, max_keys=max_keys):
                batches.append((trio.current_time(), batch))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume)
            for due, item in timed:
                await trio.sleep_until(due)
                await send.send(item)
                await wait_all_tasks_blocked()
            await trio.sleep(1.0)
            send.close()
        assert batches == expected_batches(timed, most, wait, max_keys, at + 1.0)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_without_keys_and_waiting_a_batch_is_what_is_queued() -> None:
    send, receive = items_channel()
    for number in range(5):
        send.send_nowait(("ab"[number % 2], 2, number))
    send.close()
    batches = [batch async for batch in Batcher(receive, 6, 0)]
    assert [[number for _, _, number in batch] for batch in batches] == [[0, 1, 2], [3, 4]]


async def test_cancelling_a_wait_keeps_the_items(autojump_clock: MockClock) -> None:
    send, receive = items_channel()
    batcher = Batcher(receive, 10, 5.0)
    send.send_nowait(("a", 1, 0))
    with trio.move_on_after(1.0) as scope:
        await batcher.next()
    assert scope.cancelled_caught
    send.send_nowait(("a", 1, 1))
    assert await batcher.next() == [("a", 1, 0), ("a", 1, 1)]
    assert trio.current_time() == 5.0  # counted from the first item, not from the second call


async def test_cancellation_never_loses_or_duplicates_items(autojump_clock: MockClock) -> None:
    dice = random.Random(7)
    send, receive = items_channel(30, hold=True)
    batcher = Batcher(receive, 8, 0.3, key=key_of, max_keys=2)
    sent = [(dice.choice("abc"), dice.randrange(1, 11), number) for number in range(300)]
    got: list[list[Item]] = []
    cancelled = 0

    async def produce() -> None:
        with send:
            for item in sent:
                await send.send(item)
                await trio.sleep(dice.choice([0, 0, 0.1, 0.4]))

    async def consume() -> None:
        nonlocal cancelled
        while True:
            batch: list[Item] = []
            with trio.move_on_after(dice.choice([0, 0.1, 0.3, 0.5])) as scope:
                try:
                    batch = await batcher.next()
                except trio.EndOfChannel:
                    return
            cancelled += scope.cancelled_caught
            if batch:
                got.append(batch)
                await trio.sleep(dice.choice([0, 0.05]))
                receive.done(sum(map(receive.weigh, batch)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        nursery.start_soon(consume)
        nursery.start_soon(consume)
    assert cancelled > 20
    for key in "abc":
        assert [item for batch in got for item in batch if item[0] == key] == [
            item for item in sent if item[0] == key
        ]
    for batch in got:
        assert len({key_of(item) for item in batch}) == 1
        assert len(batch) == 1 or sum(item[1] for item in batch) <= 8
    assert receive.statistics().size == 0


async def test_a_failing_key_function_loses_nothing() -> None:
    send, receive = items_channel()
    works = False

    def key(item: Item) -> str:
        if item[0] == "b" and not works:
            raise KeyError("b")
        return item[0]

    batcher = Batcher(receive, 10, 0, key=key)
    for number, name in enumerate("abc"):
        send.send_nowait((name, 1, number))
    send.close()
    with pytest.raises(KeyError):
        await batcher.next()
    works = True
    assert [batch async for batch in batcher] == [[("a", 1, 0)], [("b", 1, 1)], [("c", 1, 2)]]


async def test_items_left_by_a_failing_key_function_come_before_new_ones(
    autojump_clock: MockClock,
) -> None:
    send, receive = items_channel()
    broken = True

    def key(item: Item) -> str:
        if item[0] == "b" and broken:
            raise KeyError("b")
        return item[0]

    batcher = Batcher(receive, 2, 100.0, key=key)
    send.send_nowait(("a", 2, 0))
    assert await batcher.next() == [("a", 2, 0)]
    send.send_nowait(("b", 2, 1))
    with pytest.raises(KeyError):
        await batcher.next()
    broken = False
    with trio.fail_after(1.0):
        assert await batcher.next() == [("b", 2, 1)]


async def test_a_closed_receiver_raises() -> None:
    _, receive = items_channel()
    receive.close()
    with pytest.raises(trio.ClosedResourceError):
        await Batcher(receive, 10, 0).next()


@pytest.mark.parametrize(("most", "wait", "keys"), [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_invalid_limits(most: int, wait: float, keys: int) -> None:
    _, receive = items_channel()
    with pytest.raises(ValueError, match="batcher of items: max_weight"):
        Batcher(receive, most, wait, max_keys=keys)
