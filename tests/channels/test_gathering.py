"""Items that arrive one by one are received and handled together."""

from __future__ import annotations

import math
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from betrace.channels import ReceiveChannel, SendChannel, Stage, StageOptions, open_channel


def opened(capacity: int = 100) -> tuple[SendChannel[int], ReceiveChannel[int]]:
    """A channel of numbers that weigh what they are."""
    return open_channel("test", capacity, lambda item: item, hold=True)


async def test_items_before_the_time_are_received_together(autojump_clock: MockClock) -> None:
    send, receive = opened()

    async def produce() -> None:
        for _ in range(5):
            await trio.sleep(0.3)
            await send.send(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        assert await receive.receive_some(100, until=1.0, enough=50) == [1, 1, 1]
        assert trio.current_time() == pytest.approx(1.0)
        # The time has passed: the next item is received at once.
        assert await receive.receive_some(100, until=1.0, enough=50) == [1]
        assert trio.current_time() == pytest.approx(1.2)


async def test_enough_weight_ends_the_wait(autojump_clock: MockClock) -> None:
    send, receive = opened()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.sleep, 0.5))
        received: list[int] = []

        async def consume() -> None:
            received.extend(await receive.receive_some(100, until=10.0, enough=6))

        nursery.start_soon(consume)
        await wait_all_tasks_blocked()
        for _ in range(3):
            await send.send(2)
        await wait_all_tasks_blocked()
        assert received == [2, 2, 2]
        assert trio.current_time() == 0


async def test_an_empty_channel_is_waited_for_without_a_timer(autojump_clock: MockClock) -> None:
    send, receive = opened()
    async with trio.open_nursery() as nursery:

        async def produce() -> None:
            await trio.sleep(100)
            await send.send(1)

        nursery.start_soon(produce)
        assert await receive.receive_some(100, until=1.0, enough=50) == [1]
        assert trio.current_time() == pytest.approx(100)


async def test_a_sender_without_capacity_ends_the_wait(autojump_clock: MockClock) -> None:
    send, receive = opened(capacity=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send.send_each, [1, 1, 1, 1])
        assert await receive.receive_some(100, until=50.0, enough=50) == [1, 1, 1]
        assert trio.current_time() == 0
        receive.done(3)


async def test_closing_ends_the_wait(autojump_clock: MockClock) -> None:
    send, receive = opened()
    async with trio.open_nursery() as nursery:

        async def close() -> None:
            await send.send(1)
            await trio.sleep(2)
            send.close()

        nursery.start_soon(close)
        assert await receive.receive_some(100, until=50.0, enough=50) == [1]
        assert trio.current_time() == pytest.approx(2)
        with pytest.raises(trio.EndOfChannel):
            await receive.receive_some(100, until=50.0, enough=50)

    send, receive = opened()
    async with trio.open_nursery() as nursery:

        async def expect_closed() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await receive.receive_some(100, until=50.0, enough=50)

        nursery.start_soon(expect_closed)
        await wait_all_tasks_blocked()
        assert receive.statistics().waiting_receivers == 1
        receive.close()


async def test_a_cancelled_wait_takes_nothing(autojump_clock: MockClock) -> None:
    send, receive = opened()
    await send.send(3)
    with trio.move_on_after(1) as scope:
        await receive.receive_some(100, until=50.0, enough=50)
    assert scope.cancelled_caught
    assert receive.statistics().queued == 3
    assert receive.statistics().waiting_receivers == 0
    assert await receive.receive_some(100) == [3]


async def test_items_are_sent_in_order_with_one_checkpoint() -> None:
    send, receive = opened(capacity=4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send.send_each, [1, 2, 3])
        assert [await receive.receive() for _ in range(2)] == [1, 2]
        receive.done(3)
        assert await receive.receive() == 3
    send.close()
    with pytest.raises(trio.ClosedResourceError):
        await send.send_each([1])


async def test_a_stage_starts_batches_at_intervals(autojump_clock: MockClock) -> None:
    send, receive = opened()
    batches: list[tuple[float, int]] = []

    async def handle(items: list[int]) -> None:
        batches.append((round(trio.current_time(), 3), len(items)))

    async def bury(item: int, error: Exception, attempts: int) -> None:
        raise AssertionError

    options = StageOptions(on_dead=bury, interval=1.0, enough=20)
    stage = Stage("test", receive, handle, options)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await trio.sleep(5)
        await send.send(1)  # after a pause: at once
        for _ in range(5):
            await trio.sleep(0.3)
            await send.send(1)
        await send.send(20)  # enough: at once
        await stage.drained()
        send.close()
    assert batches == [(5.0, 1), (6.0, 3), (6.5, 3)]
    assert math.isfinite(stage.statistics().last_progress or math.nan)


async def test_a_stage_does_not_wait_for_senders_that_wait_for_it(
    autojump_clock: MockClock,
) -> None:
    """Eight senders that each wait for the outcome: once all have sent, a batch starts."""
    send, receive = open_channel("test", 100, lambda _: 1, hold=True)
    outcomes: dict[int, trio.Event] = {}
    sizes: list[int] = []

    async def handle(items: list[int]) -> None:
        sizes.append(len(items))
        await trio.sleep(0.01)
        for number in items:
            outcomes.pop(number).set()

    async def bury(item: int, error: Exception, attempts: int) -> None:
        raise AssertionError

    async def client(number: int) -> None:
        for _ in range(200):
            await trio.sleep(0.001 * number)
            outcomes[number] = outcome = trio.Event()
            await send.send(number)
            await outcome.wait()

    options = StageOptions(on_dead=bury, interval=1.0, adapts=True)
    stage = Stage("test", receive, handle, options)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        async with trio.open_nursery() as clients:
            for number in range(8):
                clients.start_soon(client, number)
        send.close()
    assert sum(sizes) == 1600
    assert max(sizes) == 8
    # An interval for each batch would take 200 seconds.
    assert trio.current_time() < 30
