"""Taps never block, and count what they drop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from betrace.channels import DropReason, Tap


def dropped(tap: Tap[str]) -> dict[str, int]:
    return {reason.value: count for reason, count in tap.statistics().dropped.items() if count}


def check_balance(tap: Tap[str]) -> None:
    now = tap.statistics()
    assert now.offered == now.consumed + now.waiting + sum(now.dropped.values())


async def test_consumes_in_order_and_in_batches(autojump_clock: MockClock) -> None:
    batches: list[list[str]] = []

    async def consume(batch: list[str]) -> None:
        batches.append(batch)

    tap = Tap("tap", 10, consume, max_batch_weight=3)
    assert [tap.offer(item) for item in "abcdefg"] == [True] * 7
    tap.close()
    assert not tap.offer("h")
    await tap.run()
    assert batches == [list("abc"), list("def"), ["g"]]
    assert dropped(tap) == {"closed": 1}
    now = tap.statistics()
    assert (now.name, now.capacity, now.waiting, now.consumed, now.peak) == ("tap", 10, 0, 7, 7)
    assert set(now.dropped) == set(DropReason)
    check_balance(tap)


async def test_drops_items_without_room_even_while_the_consumer_works(
    autojump_clock: MockClock,
) -> None:
    consumed: list[str] = []

    async def consume(batch: list[str]) -> None:
        await trio.sleep(1.0)
        consumed.extend(batch)

    weigh: Callable[[str], int] = len
    tap = Tap("tap", 4, consume, weigh=weigh)
    async with trio.open_nursery() as nursery:
        await nursery.start(tap.run)
        assert tap.offer("aaa")
        await wait_all_tasks_blocked()
        assert not tap.offer("bb")  # "aaa" still uses capacity
        assert tap.offer("c")
        await trio.sleep(1.5)
        assert tap.offer("ddd")
        assert dropped(tap) == {"full": 2}
        check_balance(tap)
        tap.close()
    assert consumed == ["aaa", "c", "ddd"]
    check_balance(tap)


async def test_a_failing_consumer_loses_its_batch_and_pauses(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[float, list[str]]] = []

    async def consume(batch: list[str]) -> None:
        calls.append((trio.current_time(), list(batch)))
        if len(calls) in (1, 2, 4):
            batch.clear()
            raise OSError("unreachable")

    tap = Tap("tap", 10, consume, max_batch_weight=2, first_pause=1.0)
    for item in "abcdefghi":
        tap.offer(item)
    tap.close()
    await tap.run()
    assert [at for at, _ in calls] == [0.0, 1.0, 3.0, 3.0, 4.0]
    assert dropped(tap) == {"failed": 6}
    assert tap.statistics().consumed == 3
    assert caplog.text.count("tap tap: the consumer failed; its batch is dropped") == 3
    check_balance(tap)


async def test_cancelling_counts_what_was_left(autojump_clock: MockClock) -> None:
    async def consume(batch: list[str]) -> None:
        await trio.sleep_forever()

    tap = Tap("tap", 10, consume, max_batch_weight=2)
    for item in "abcde":
        tap.offer(item)
    with trio.move_on_after(1.0):
        await tap.run()
    assert not tap.offer("f")
    assert dropped(tap) == {"cancelled": 6}
    assert tap.statistics().waiting == 0
    check_balance(tap)
