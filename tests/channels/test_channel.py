"""The weighted channel: semantics by example, against a model, and under cancellation."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from betrace.channels import ReceiveChannel, SendChannel, open_channel
from tests.support.examples import examples

Pair = tuple[SendChannel[str], ReceiveChannel[str]]


def strings(capacity: int, **options: Any) -> Pair:
    """A channel of strings whose weight is their length."""
    weigh: Callable[[str], int] = len
    return open_channel("strings", capacity, weigh, **options)


# Semantics, one by one


async def test_items_come_out_in_order_and_the_iteration_ends() -> None:
    send, receive = strings(100)
    async with send:
        for item in ("a", "bb", "ccc"):
            with assert_checkpoints():
                await send.send(item)
    assert [item async for item in receive] == ["a", "bb", "ccc"]
    with pytest.raises(trio.EndOfChannel):
        await receive.receive()
    with pytest.raises(trio.EndOfChannel):
        receive.receive_nowait()
    with pytest.raises(trio.ClosedResourceError):
        await send.send("d")


async def test_operations_are_checkpoints() -> None:
    send, receive = strings(2)
    with assert_checkpoints():
        assert await send.offer("a", 1.0)
    await send.send("b")
    with assert_checkpoints():
        assert not await send.offer("c", 0)
    with assert_checkpoints():
        assert await receive.receive() == "a"
    with assert_checkpoints():
        assert await receive.receive_some(10) == ["b"]
    with assert_checkpoints():
        await receive.wait_empty()
    with assert_checkpoints():
        await receive.aclose()
    with assert_checkpoints():
        await send.aclose()


async def test_capacity_is_measured_by_weight() -> None:
    send, receive = strings(5)
    send.send_nowait("aaa")
    send.send_nowait("bb")
    with pytest.raises(trio.WouldBlock):
        send.send_nowait("c")
    assert receive.receive_nowait() == "aaa"
    send.send_nowait("ccc")
    assert send.fill == receive.fill == 1.0


async def test_an_item_heavier_than_the_capacity_is_admitted_alone(
    autojump_clock: MockClock,
) -> None:
    send, receive = strings(5)
    send.send_nowait("a")
    assert not await send.offer("x" * 8, 1.0)
    assert receive.receive_nowait() == "a"
    assert await send.offer("x" * 8, 0)
    assert send.statistics().size == 8
    assert send.fill == 1.0
    assert not await send.offer("a", 1.0)


async def test_a_light_item_does_not_overtake_a_heavy_one() -> None:
    send, receive = strings(5)
    send.send_nowait("aaa")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send.send, "hhhh")
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):
            send.send_nowait("l")
        nursery.start_soon(send.send, "l")
        await wait_all_tasks_blocked()
        assert send.statistics().waiting_senders == 2
        got = [await receive.receive() for _ in range(3)]
    assert got == ["aaa", "hhhh", "l"]


async def test_light_items_behind_a_cancelled_heavy_one_are_admitted() -> None:
    send, receive = strings(5)
    send.send_nowait("aaa")
    heavy = trio.CancelScope()

    async def send_heavy() -> None:
        with heavy:
            await send.send("hhhh")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_heavy)
        await wait_all_tasks_blocked()
        nursery.start_soon(send.send, "l")
        await wait_all_tasks_blocked()
        heavy.cancel()
    assert await receive.receive_some(100) == ["aaa", "l"]


async def test_offer_returns_whether_the_item_is_in_the_channel(autojump_clock: MockClock) -> None:
    send, receive = strings(3)
    assert await send.offer("aaa", 0.1)
    assert not await send.offer("b", 0.1)
    assert trio.current_time() == 0.1

    async def make_room() -> None:
        await trio.sleep(0.05)
        receive.receive_nowait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_room)
        assert await send.offer("c", 0.1)
    assert trio.current_time() == pytest.approx(0.15)
    assert receive.receive_nowait() == "c"
    with pytest.raises(trio.WouldBlock):
        receive.receive_nowait()


async def test_receive_some_takes_queued_items_up_to_a_weight() -> None:
    send, receive = strings(100)
    for item in ("aaaaa", "b", "c", "dd", "e"):
        send.send_nowait(item)
    assert await receive.receive_some(3) == ["aaaaa"]
    assert await receive.receive_some(3) == ["b", "c"]
    assert await receive.receive_some(3) == ["dd", "e"]


async def test_receive_some_takes_items_admitted_meanwhile() -> None:
    send, receive = strings(2)
    async with trio.open_nursery() as nursery:
        for item in "abcdef":
            nursery.start_soon(send.send, item)
            await wait_all_tasks_blocked()
        assert await receive.receive_some(5) == list("abcde")
    assert receive.receive_nowait() == "f"


async def test_receive_some_waits_for_one_item_only(autojump_clock: MockClock) -> None:
    send, receive = strings(100)
    got: list[list[str]] = []

    async def take() -> None:
        got.append(await receive.receive_some(10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        send.send_nowait("a")
        send.send_nowait("b")  # before the receiver has run
    assert got == [["a", "b"]]


async def test_held_items_use_capacity_until_done() -> None:
    send, receive = strings(4, hold=True)
    send.send_nowait("aaa")
    assert await receive.receive() == "aaa"
    with pytest.raises(trio.WouldBlock):
        send.send_nowait("bb")
    now = send.statistics()
    assert (now.size, now.queued, now.in_flight, now.total_out) == (3, 0, 3, 3)
    receive.done(2)
    send.send_nowait("bb")
    with pytest.raises(ValueError, match=r"done\(2\) with 1 in flight"):
        receive.done(2)
    receive.close()
    receive.done(1)
    assert send.statistics().size == 0


async def test_done_needs_a_channel_with_hold() -> None:
    _, receive = strings(4)
    assert not receive.hold
    with pytest.raises(ValueError, match="hold=True"):
        receive.done(1)


async def test_wait_empty_waits_for_queued_and_held_items_and_senders() -> None:
    send, receive = strings(2, hold=True)
    empty = False

    async def wait() -> None:
        nonlocal empty
        await receive.wait_empty()
        empty = True

    async with trio.open_nursery() as nursery:
        send.send_nowait("aa")
        nursery.start_soon(send.send, "bb")
        nursery.start_soon(wait)
        for _ in range(2):
            await receive.receive()
            await wait_all_tasks_blocked()
            assert not empty
            receive.done(2)
            await wait_all_tasks_blocked()
        assert empty


async def test_the_channel_ends_with_the_last_clone_of_a_sender() -> None:
    send, receive = strings(10)
    other = send.clone()
    send.close()
    send.close()
    with pytest.raises(trio.ClosedResourceError):
        send.clone()
    other.send_nowait("a")
    ended: list[str] = []

    async def drain() -> None:
        ended.extend([item async for item in receive])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        nursery.start_soon(drain)
        await wait_all_tasks_blocked()
        assert receive.statistics().waiting_receivers == 2
        with other:
            pass
    assert ended == ["a"]


async def test_the_channel_breaks_with_the_last_clone_of_a_receiver() -> None:
    send, receive = strings(2, hold=True)
    other = receive.clone()
    receive.close()
    receive.close()
    with pytest.raises(trio.ClosedResourceError):
        receive.clone()
    with pytest.raises(trio.ClosedResourceError):
        await receive.receive()
    send.send_nowait("a")
    send.send_nowait("b")
    assert other.receive_nowait() == "a"

    async def send_in_vain() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await send.send("c")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_in_vain)
        await wait_all_tasks_blocked()
        other.close()
    with pytest.raises(trio.BrokenResourceError):
        send.send_nowait("c")
    now = send.statistics()
    assert (now.discarded, now.queued, now.in_flight, now.size) == (1, 0, 1, 1)
    other.done(1)
    await other.wait_empty()


async def test_closing_an_end_wakes_only_its_own_waiters() -> None:
    send, receive = strings(2)
    send2, receive2 = send.clone(), receive.clone()

    async def receive_in_vain() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await receive2.receive()

    async def send_in_vain() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await send2.send("hh")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_in_vain)
        nursery.start_soon(receive.receive)
        await wait_all_tasks_blocked()
        receive2.close()
        await wait_all_tasks_blocked()
        assert receive.statistics().waiting_receivers == 1
        send.send_nowait("a")
    send.send_nowait("b")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_in_vain)
        await wait_all_tasks_blocked()
        nursery.start_soon(send.send, "c")
        await wait_all_tasks_blocked()
        send2.close()  # which admits "c"
    assert await receive.receive_some(9) == ["b", "c"]


async def test_statistics_report_waits_and_busy_times(autojump_clock: MockClock) -> None:
    waits: list[tuple[float, int]] = []
    send, receive = strings(10, on_wait=lambda *wait: waits.append(wait))
    assert send.statistics().busy_since is None
    await trio.sleep(1)
    send.send_nowait("aa")
    await trio.sleep(1)
    send.send_nowait("b")
    await trio.sleep(1)
    now = receive.statistics()
    assert (now.busy_since, now.oldest_wait, now.items_queued, now.queued) == (1.0, 2.0, 2, 3)
    assert (now.name, now.capacity, now.fill, now.total_in) == ("strings", 10, 0.3, 3)
    assert await receive.receive_some(10) == ["aa", "b"]
    assert waits == [(2.0, 2), (1.0, 1)]
    after = receive.statistics()
    assert (after.busy_since, after.oldest_wait, after.total_out) == (None, 0.0, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive.receive)
        await wait_all_tasks_blocked()
        send.send_nowait("ccc")
    assert waits[2:] == [(0.0, 3)]
    assert receive.statistics().busy_since is None


async def test_each_peak_reader_has_its_own_period() -> None:
    send, receive = strings(10)
    metrics = send.peak_reader()
    send.send_nowait("aaaa")
    receive.receive_nowait()
    api = receive.peak_reader()
    send.send_nowait("bb")
    assert (metrics.take(), api.take()) == (4, 2)
    receive.receive_nowait()
    assert (metrics.take(), metrics.take(), api.take(), api.take()) == (2, 0, 2, 0)
    assert send.statistics().peak == 4
    del api
    send.send_nowait("ccccc")
    assert metrics.take() == 5
    assert send.statistics().peak == 5


def test_invalid_limits() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        strings(0)
    send, _ = strings(1)
    with pytest.raises(ValueError, match="weighs 0; weights must be 1 or more"):
        send.send_nowait("")


async def test_ends_describe_themselves() -> None:
    send, receive = strings(10)
    send.send_nowait("aa")
    assert (send.name, receive.capacity) == ("strings", 10)
    assert repr(send) == "<SendChannel 'strings', 2 of 10 used>"
    assert repr(receive) == "<ReceiveChannel 'strings', 2 of 10 used>"


# Against a model


@dataclass
class Model:
    """The expected behaviour, as simple as possible; items are (id, weight)."""

    capacity: int
    hold: bool
    queue: list[tuple[int, int]] = field(default_factory=list)
    senders: list[tuple[int, int, int]] = field(default_factory=list)  # id, weight, end
    receivers: list[tuple[int, int, int | None]] = field(default_factory=list)  # id, end, max
    in_flight: int = 0
    open_senders: set[int] = field(default_factory=lambda: {0})
    open_receivers: set[int] = field(default_factory=lambda: {0})
    outcomes: dict[int, Any] = field(default_factory=dict)
    woken: list[tuple[int, int]] = field(default_factory=list)  # receive_some: id, max

    @property
    def size(self) -> int:
        return sum(weight for _, weight in self.queue) + self.in_flight

    def fits(self, weight: int) -> bool:
        return self.size == 0 or self.size + weight <= self.capacity

    def start_send(self, task: int, weight: int, end: int, wait: bool) -> None:
        if end not in self.open_senders:
            self.outcomes[task] = trio.ClosedResourceError
        elif not self.open_receivers:
            self.outcomes[task] = trio.BrokenResourceError
        elif not self.senders and self.fits(weight):
            self.queue.append((task, weight))
            self.outcomes[task] = None
        elif wait:
            self.senders.append((task, weight, end))
        else:
            self.outcomes[task] = trio.WouldBlock
        self.settle()

    def start_receive(self, task: int, end: int, most: int | None, wait: bool) -> None:
        if end not in self.open_receivers:
            self.outcomes[task] = trio.ClosedResourceError
        elif not self.queue and not self.open_senders:
            self.outcomes[task] = trio.EndOfChannel
        elif self.queue or wait:
            self.receivers.append((task, end, most))
        else:
            self.outcomes[task] = trio.WouldBlock
        self.settle()

    def take(self) -> tuple[int, int]:
        item = self.queue.pop(0)
        if self.hold:
            self.in_flight += item[1]
        return item

    def settle(self) -> None:
        """Admit and hand out items until nothing changes, then let woken receivers take more."""
        while True:
            if self.receivers and self.queue:
                task, _, most = self.receivers.pop(0)
                item = self.take()
                self.outcomes[task] = [item]
                if most is not None:
                    self.woken.append((task, most))
            elif self.senders and self.fits(self.senders[0][1]):
                task, weight, _ = self.senders.pop(0)
                self.queue.append((task, weight))
                self.outcomes[task] = None
            elif self.woken and self.queue:
                task, most = self.woken[0]
                taken = self.outcomes[task]
                if sum(weight for _, weight in taken) + self.queue[0][1] <= most:
                    taken.append(self.take())
                else:
                    self.woken.pop(0)
            else:
                self.woken.clear()
                return

    def cancel(self, task: int) -> None:
        before = len(self.senders) + len(self.receivers)
        self.senders = [entry for entry in self.senders if entry[0] != task]
        self.receivers = [entry for entry in self.receivers if entry[0] != task]
        if len(self.senders) + len(self.receivers) < before:
            self.outcomes[task] = trio.Cancelled
        self.settle()

    def done(self, weight: int) -> None:
        self.in_flight -= weight
        self.settle()

    def close_sender(self, end: int) -> None:
        self.open_senders.discard(end)
        for task, _, its_end in list(self.senders):
            if its_end == end:
                self.outcomes[task] = trio.ClosedResourceError
        self.senders = [entry for entry in self.senders if entry[2] != end]
        self.settle()
        if not self.open_senders:
            for task, _, _ in self.receivers:
                self.outcomes[task] = trio.EndOfChannel
            self.receivers = []

    def close_receiver(self, end: int) -> None:
        self.open_receivers.discard(end)
        for task, its_end, _ in self.receivers:
            if its_end == end:
                self.outcomes[task] = trio.ClosedResourceError
        self.receivers = [entry for entry in self.receivers if entry[1] != end]
        if not self.open_receivers:
            for task, _, _ in self.senders:
                self.outcomes[task] = trio.BrokenResourceError
            self.senders = []
            self.queue = []


ENDS = st.integers(0, 2)
WEIGHTS = st.integers(1, 7)
ACTIONS = st.one_of(
    st.tuples(st.just("send"), WEIGHTS, ENDS),
    st.tuples(st.just("send"), WEIGHTS, ENDS),
    st.tuples(st.just("send_nowait"), WEIGHTS, ENDS),
    st.tuples(st.just("receive"), ENDS),
    st.tuples(st.just("receive"), ENDS),
    st.tuples(st.just("receive_some"), WEIGHTS, ENDS),
    st.tuples(st.just("receive_nowait"), ENDS),
    st.tuples(st.just("cancel"), st.integers(0, 40)),
    st.tuples(st.just("done"), st.integers(1, 10)),
    st.tuples(st.just("done"), st.integers(1, 10)),
    st.tuples(
        st.just("clone_sender"),
    ),
    st.tuples(
        st.just("clone_receiver"),
    ),
    st.tuples(st.just("close_sender"), ENDS),
    st.tuples(st.just("close_receiver"), ENDS),
)


@given(
    capacity=st.integers(1, 10),
    hold=st.booleans(),
    actions=st.lists(ACTIONS, max_size=40),
)
@settings(max_examples=examples(300), deadline=None)
def test_behaves_like_the_model(capacity: int, hold: bool, actions: list[tuple[Any, ...]]) -> None:
    trio.run(compare_with_model, capacity, hold, actions, clock=MockClock(autojump_threshold=0))


async def compare_with_model(capacity: int, hold: bool, actions: list[tuple[Any, ...]]) -> None:
    weigh: Callable[[tuple[int, int]], int] = lambda item: item[1]  # noqa: E731
    send, receive = open_channel("model", capacity, weigh, hold=hold)
    senders, receivers = [send], [receive]
    model = Model(capacity, hold)
    outcomes: dict[int, Any] = {}
    scopes: dict[int, trio.CancelScope] = {}

    async def note(task: int, call: Callable[[], Any]) -> None:
        with trio.CancelScope() as scopes[task]:
            try:
                result = await call()
            except Exception as error:
                outcomes[task] = type(error)
            else:
                outcomes[task] = result if result is None or type(result) is list else [result]
        if scopes[task].cancelled_caught:
            outcomes[task] = trio.Cancelled

    def note_now(task: int, call: Callable[[], Any]) -> None:
        try:
            result = call()
        except Exception as error:
            outcomes[task] = type(error)
        else:
            outcomes[task] = None if result is None else [result]

    async with trio.open_nursery() as nursery:
        for task, (action, *args) in enumerate(actions):
            if action in ("send", "send_nowait"):
                weight, end = args[0], args[1] % len(senders)
                model.start_send(task, weight, end, action == "send")
                item = (task, weight)
                if action == "send":
                    nursery.start_soon(note, task, lambda s=senders[end], i=item: s.send(i))
                else:
                    note_now(task, lambda s=senders[end], i=item: s.send_nowait(i))
            elif action == "receive":
                end = args[0] % len(receivers)
                model.start_receive(task, end, None, True)
                nursery.start_soon(note, task, receivers[end].receive)
            elif action == "receive_nowait":
                end = args[0] % len(receivers)
                model.start_receive(task, end, None, False)
                note_now(task, receivers[end].receive_nowait)
            elif action == "receive_some":
                if any(most is not None for _, _, most in model.receivers):
                    continue  # Trio chooses which of two takes the rest
                most, end = args[0], args[1] % len(receivers)
                model.start_receive(task, end, most, True)
                nursery.start_soon(note, task, lambda r=receivers[end], m=most: r.receive_some(m))
            elif action == "cancel" and args[0] in scopes and args[0] not in outcomes:
                model.cancel(args[0])
                scopes[args[0]].cancel()
            elif action == "done":
                weight = min(args[0], model.in_flight)
                model.done(weight)
                receive.done(weight)
            elif action == "clone_sender" and 0 in model.open_senders:
                model.open_senders.add(len(senders))
                senders.append(send.clone())
            elif action == "clone_receiver" and 0 in model.open_receivers:
                model.open_receivers.add(len(receivers))
                receivers.append(receive.clone())
            elif action == "close_sender":
                model.close_sender(args[0] % len(senders))
                senders[args[0] % len(senders)].close()
            elif action == "close_receiver":
                model.close_receiver(args[0] % len(receivers))
                receivers[args[0] % len(receivers)].close()
            await wait_all_tasks_blocked()
            assert outcomes == model.outcomes
            now = send.statistics()
            assert now.size == model.size
            assert now.in_flight == model.in_flight
            assert now.items_queued == len(model.queue)
            assert now.waiting_senders == len(model.senders)
            assert now.waiting_receivers == len(model.receivers)
            assert now.open_senders == len(model.open_senders)
            assert now.open_receivers == len(model.open_receivers)
            assert now.total_in == now.total_out + now.queued + now.discarded
            assert (now.busy_since is None) == (now.size == 0)
        nursery.cancel_scope.cancel()


# Under cancellation at any moment


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("seed", range(5))
async def test_cancellation_never_loses_or_duplicates_items(
    autojump_clock: MockClock, seed: int, hold: bool
) -> None:
    """Senders and receivers whose calls may be cancelled or time out at any checkpoint."""
    dice = random.Random(seed)
    send, receive = strings(20, hold=hold)
    sent: dict[int, list[str]] = {n: [] for n in range(4)}
    received: list[str] = []
    scopes: deque[trio.CancelScope] = deque(maxlen=8)
    cancelled = 0

    async def produce(number: int, sender: SendChannel[str]) -> None:
        nonlocal cancelled
        with sender:
            for n in range(150):
                item = f"{number}-{n}-" + "x" * dice.randrange(12)
                ok = False
                with trio.CancelScope() as scope:
                    scopes.append(scope)
                    if dice.random() < 0.5:
                        await sender.send(item)
                        ok = True
                    else:
                        ok = await sender.offer(item, dice.choice([0, 0.1, 0.5]))
                cancelled += scope.cancelled_caught
                if ok:
                    sent[number].append(item)

    async def consume(receiver: ReceiveChannel[str]) -> None:
        nonlocal cancelled
        while True:
            items: list[str] = []
            with trio.CancelScope() as scope:
                scopes.append(scope)
                try:
                    if dice.random() < 0.5:
                        items = [await receiver.receive()]
                    else:
                        items = await receiver.receive_some(dice.randrange(1, 40))
                except trio.EndOfChannel:
                    return
            cancelled += scope.cancelled_caught
            received.extend(items)
            await trio.sleep(dice.choice([0, 0.1]))
            if hold:
                receiver.done(sum(map(len, items)))

    async def cancel_at_random() -> None:
        while True:
            await trio.sleep(dice.choice([0, 0, 0, 0.05]))
            if scopes:
                dice.choice(scopes).cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_at_random)
        async with trio.open_nursery() as workers:
            for number in range(4):
                workers.start_soon(produce, number, send.clone())
            for _ in range(3):
                workers.start_soon(consume, receive.clone())
            send.close()
        nursery.cancel_scope.cancel()

    assert cancelled > 50
    assert sorted(received) == sorted(item for items in sent.values() for item in items)
    after = receive.statistics()
    assert (after.size, after.in_flight, after.waiting_senders) == (0, 0, 0)
    assert after.total_in == after.total_out == sum(map(len, received))


async def test_a_single_receiver_sees_each_senders_order(autojump_clock: MockClock) -> None:
    dice = random.Random(1)
    send, receive = strings(10)
    got: list[str] = []

    async def produce(number: int) -> None:
        with send.clone() as sender:
            for n in range(50):
                await sender.send(f"{number}:{n:03}:" + "x" * dice.randrange(9))

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(produce, number)
        await wait_all_tasks_blocked()
        send.close()
        while True:
            try:
                got += await receive.receive_some(dice.randrange(1, 30))
            except trio.EndOfChannel:
                break
    for number in range(4):
        mine = [item for item in got if item.startswith(f"{number}:")]
        assert mine == sorted(mine)
        assert len(mine) == 50


async def test_an_item_can_be_sent_beyond_the_capacity() -> None:
    send, receive = strings(3)
    send.send_nowait("aa")
    with pytest.raises(trio.WouldBlock):
        send.send_nowait("bb")
    send.send_over("bb")
    assert send.statistics().size == 4
    assert [receive.receive_nowait(), receive.receive_nowait()] == ["aa", "bb"]
    receive.close()
    with pytest.raises(trio.BrokenResourceError):
        send.send_over("c")


async def test_a_direct_receiver_takes_items_only_while_the_channel_is_empty() -> None:
    taken: list[str] = []

    def take(item: str) -> bool:
        taken.append(item)
        return item != "no"

    send, receive = strings(10)
    receive.receive_directly(take)
    await send.send("yes")
    assert send.statistics().size == 0
    assert send.statistics().total_out == send.statistics().peak == 3
    send.send_nowait("no")
    send.send_nowait("b")
    assert taken == ["yes", "no"]
    assert [receive.receive_nowait(), receive.receive_nowait()] == ["no", "b"]
    send.close()
    with pytest.raises(trio.ClosedResourceError):
        send.send_nowait("c")
    assert taken == ["yes", "no"]
