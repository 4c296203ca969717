"""A bounded channel that measures its content by weight instead of counting messages.

A message can contain one record or eight thousand, so a limit on messages does not bound memory.
Here each item has a weight, computed by a function passed to :func:`open_channel`, and the capacity
is a weight::

    send, receive = open_channel("parsing", capacity=10_000, weigh=len)

    async with send:                      # closing the last sender's clone ends the channel
        await send.send(batch)            # waits while there is no room
        if not await send.offer(batch, 0.1):
            refuse()                      # no room within 100 ms

    async for batch in receive:           # ends when all senders are closed and nothing is queued
        ...

With ``hold=True`` an item uses capacity until the consumer calls :meth:`ReceiveChannel.done`, even
after it was taken. Capacity then bounds all unfinished work, not just the queue.

The semantics are those of Trio's memory channels. Each operation is atomic with respect to
cancellation: a cancelled ``send`` leaves nothing in the channel, a cancelled ``receive`` takes
nothing out. Senders are admitted in order, whatever their weights: a light item does not overtake a
heavy one that waits. Use channels from the Trio thread only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, Self, TypeVar, cast, final

import trio
import trio.abc
from trio.lowlevel import Abort, RaiseCancelT, enable_ki_protection

from betrace.channels.state import (
    ChannelState,
    ChannelStatistics,
    GatheringReceiver,
    PeakReader,
    WaitingReceiver,
    WaitingSender,
)

T = TypeVar("T")


class _End(ABC, Generic[T]):
    """What both ends of a channel have in common."""

    def __init__(self, state: ChannelState[T]) -> None:
        self._state = state
        self._closed = False

    @property
    def name(self) -> str:
        """The name passed to `open_channel`."""
        return self._state.name

    @property
    def capacity(self) -> int:
        """The weight in the channel above which senders wait."""
        return self._state.capacity

    @property
    def fill(self) -> float:
        """How full the channel is, 0 to 1; cheap enough to read for each request."""
        return self._state.fill()

    def weigh(self, item: T) -> int:
        """Return the weight of an item.

        Raises:
          ValueError: the weight is less than 1.
        """
        return self._state.weight_of(item)

    def statistics(self) -> ChannelStatistics:
        """Return the channel's content and counts."""
        return self._state.statistics()

    def peak_reader(self) -> PeakReader:
        """Return a new observer of the channel's peak size, with its own period."""
        return PeakReader(cast("ChannelState[object]", self._state))

    async def wait_empty(self) -> None:
        """Wait until nothing is queued, in flight or waiting to be sent.

        Returns at the first such moment; more may have been sent by the time the caller runs.
        """
        if self._state.size == 0:
            await trio.lowlevel.checkpoint()
        else:
            await self._state.until_empty.park()

    @abstractmethod
    def close(self) -> None:
        """Close this end. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = self._state
        kind = type(self).__name__
        return f"<{kind} {state.name!r}, {state.size} of {state.capacity} used>"


@final
class SendChannel(_End[T], trio.abc.SendChannel[T]):
    """The sending end of a channel, from `open_channel` or `clone`."""

    def __init__(self, state: ChannelState[T]) -> None:
        super().__init__(state)
        state.open_senders += 1

    @enable_ki_protection
    def send_nowait(self, item: T) -> None:
        """Put an item into the channel if there is room for it now.

        Raises:
          trio.WouldBlock: there is no room, or other senders are waiting.
          trio.BrokenResourceError: all receivers are closed.
          trio.ClosedResourceError: this end is closed.
        """
        state = self._state
        self._check_open()
        weight = state.weight_of(item)
        if state.pass_directly(item, weight):
            return
        if state.senders or not state.fits(weight):
            raise trio.WouldBlock
        state.put(item, weight)

    @enable_ki_protection
    def send_over(self, item: T) -> None:
        """Put an item into the channel, even if it then holds more than its capacity. The caller
        bounds the excess: it looks at `fill` first.

        Raises:
          trio.BrokenResourceError: all receivers are closed.
          trio.ClosedResourceError: this end is closed.
        """
        self._check_open()
        self._state.put(item, self._state.weight_of(item))

    @enable_ki_protection
    async def send(self, value: T) -> None:
        """Put an item into the channel, waiting for room in turn.

        An item heavier than the whole capacity is admitted when the channel is empty. If cancelled,
        the item is not in the channel.

        Raises:
          trio.BrokenResourceError: all receivers are closed.
          trio.ClosedResourceError: this end is closed, or was closed while waiting.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self.send_nowait(value)
        except trio.WouldBlock:
            await self._wait_for_room(value)
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()

    @enable_ki_protection
    async def send_each(self, items: Iterable[T]) -> None:
        """Put items into the channel in order, like `send`, but with a single checkpoint for those
        that fit. If cancelled, the first items may be in the channel."""
        await trio.lowlevel.checkpoint_if_cancelled()
        for item in items:
            try:
                self.send_nowait(item)
            except trio.WouldBlock:
                await self._wait_for_room(item)
        await trio.lowlevel.cancel_shielded_checkpoint()

    @enable_ki_protection
    async def offer(self, item: T, timeout: float) -> bool:
        """Put an item into the channel if there is room within ``timeout`` seconds.

        Returns whether the item is in the channel. A timeout of 0 tries once. Raises like `send`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self.send_nowait(item)
        except trio.WouldBlock:
            if timeout <= 0:
                await trio.lowlevel.checkpoint()
                return False
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return True
        with trio.move_on_after(timeout):
            await self._wait_for_room(item)
            return True
        return False

    async def _wait_for_room(self, item: T) -> None:
        state = self._state
        task = trio.lowlevel.current_task()
        sender = WaitingSender(item, state.weight_of(item), self)
        state.senders[task] = sender
        if state.gatherers:  # no more items can come in
            state.wake_gatherer(0.0, at_once=True)

        def abort(_: RaiseCancelT) -> Abort:
            del state.senders[task]
            state.settle()  # a lighter item behind this one may fit
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if sender.error is not None:
            raise sender.error

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"this sender of channel {self.name} is closed")
        if self._state.open_receivers == 0:
            raise trio.BrokenResourceError(f"all receivers of channel {self.name} are closed")

    @enable_ki_protection
    def clone(self) -> SendChannel[T]:
        """Return another sending end; the channel ends when all of them are closed.

        Raises:
          trio.ClosedResourceError: this end is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError(f"this sender of channel {self.name} is closed")
        return SendChannel(self._state)

    @enable_ki_protection
    def close(self) -> None:
        """Close this end: its waiting senders get `trio.ClosedResourceError`.

        When the last sending end closes, receivers get what is queued and then `trio.EndOfChannel`.
        """
        if self._closed:
            return
        self._closed = True
        state = self._state
        state.open_senders -= 1
        for task, sender in [entry for entry in state.senders.items() if entry[1].end is self]:
            del state.senders[task]
            sender.error = trio.ClosedResourceError
            trio.lowlevel.reschedule(task)
        state.settle()
        if state.open_senders == 0:
            for task, receiver in state.receivers.items():
                receiver.error = trio.EndOfChannel
                trio.lowlevel.reschedule(task)
            state.receivers.clear()
            while state.gatherers:
                state.wake_gatherer(0.0, at_once=True)

    async def aclose(self) -> None:
        """Close this end, as `close` does, and pass a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()


@final
class ReceiveChannel(_End[T], trio.abc.ReceiveChannel[T]):
    """The receiving end of a channel, from `open_channel` or `clone`."""

    def __init__(self, state: ChannelState[T]) -> None:
        super().__init__(state)
        state.open_receivers += 1

    @property
    def hold(self) -> bool:
        """Whether taken items use capacity until `done`."""
        return self._state.hold

    def receive_directly(self, take: Callable[[T], bool]) -> None:
        """Offer each item to ``take`` first, in the sender's call, while the channel is empty.
        ``take`` returns whether it took the item; if not, the item goes into the channel. It must
        not raise."""
        self._state.direct = take

    @enable_ki_protection
    def receive_nowait(self) -> T:
        """Take the first item if one is queued.

        Raises:
          trio.WouldBlock: nothing is queued.
          trio.EndOfChannel: nothing is queued and all senders are closed.
          trio.ClosedResourceError: this end is closed.
        """
        self._check_queued()
        item, _ = self._state.take()
        self._state.settle()
        return item

    @enable_ki_protection
    async def receive(self) -> T:
        """Take the first item, waiting for one in turn. If cancelled, nothing was taken.

        Raises:
          trio.EndOfChannel: nothing is queued and all senders are closed.
          trio.ClosedResourceError: this end is closed, or was closed while waiting.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            item = self.receive_nowait()
        except trio.WouldBlock:
            return await self._wait_for_item()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return item

    @enable_ki_protection
    async def receive_some(
        self,
        max_weight: int,
        *,
        until: float = -math.inf,
        enough: int = 1,
        items: float = math.inf,
    ) -> list[T]:
        """Take the queued items up to ``max_weight``, waiting if nothing is queued.

        Before the time ``until`` of `trio.current_time` it waits for more items, unless a weight of
        ``enough`` or as many as ``items`` are queued, a sender waits for capacity, or all senders
        are closed.

        Always returns at least one item, however heavy; further items fit in ``max_weight``
        together with it. If cancelled, nothing was taken. Raises like `receive`.
        """
        state = self._state
        gathered = False
        if (
            trio.current_time() < until
            and state.size - state.in_flight < enough
            and len(state.queue) < items
            and not state.senders
            and state.open_senders
            and not self._closed
        ):
            await self._gather(until, enough, items)
            gathered = bool(state.queue)
        # The wait was a checkpoint.
        first = self.receive_nowait() if gathered else await self.receive()
        received = [first]
        if state.queue:
            weight = state.weight_of(first)
            while state.queue:
                weight += state.queue[0][1]
                if weight > max_weight:
                    break
                received.append(state.take()[0])
                state.settle()  # items admitted by this may be taken as well
        return received

    async def _gather(self, until: float, enough: int, items: float) -> None:
        state = self._state
        task = trio.lowlevel.current_task()

        def abort(_: RaiseCancelT) -> Abort:
            del state.gatherers[task]
            return Abort.SUCCEEDED

        # An empty channel needs no timer; the first item sets the deadline.
        with trio.CancelScope(deadline=until if state.queue else math.inf) as scope:
            gatherer = GatheringReceiver(self, enough, items, until, scope)
            state.gatherers[task] = gatherer
            await trio.lowlevel.wait_task_rescheduled(abort)
        if gatherer.error is not None:
            raise gatherer.error

    async def _wait_for_item(self) -> T:
        state = self._state
        task = trio.lowlevel.current_task()
        receiver: WaitingReceiver[T] = WaitingReceiver(self)
        state.receivers[task] = receiver

        def abort(_: RaiseCancelT) -> Abort:
            del state.receivers[task]
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if receiver.error is not None:
            raise receiver.error
        return cast("T", receiver.item)

    def _check_queued(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"this receiver of channel {self.name} is closed")
        if not self._state.queue:
            if self._state.open_senders == 0:
                raise trio.EndOfChannel
            raise trio.WouldBlock

    @enable_ki_protection
    def done(self, weight: int) -> None:
        """Release the capacity of finished work; also allowed after this end was closed.

        Args:
          weight: of the finished items, as returned by `weigh`.

        Raises:
          ValueError: less than this is in flight (or the channel was opened without ``hold``).
        """
        state = self._state
        if not 0 <= weight <= state.in_flight:
            raise ValueError(
                f"channel {state.name}: done({weight}) with {state.in_flight} in flight"
                + ("" if state.hold else "; open the channel with hold=True to use done()")
            )
        state.in_flight -= weight
        state.free(weight)
        state.settle()

    @enable_ki_protection
    def clone(self) -> ReceiveChannel[T]:
        """Return another receiving end; the channel breaks when all of them are closed.

        Raises:
          trio.ClosedResourceError: this end is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError(f"this receiver of channel {self.name} is closed")
        return ReceiveChannel(self._state)

    @enable_ki_protection
    def close(self) -> None:
        """Close this end: its waiting receivers get `trio.ClosedResourceError`.

        When the last receiving end closes, senders get `trio.BrokenResourceError`, and what is
        queued is discarded and counted in ``statistics().discarded``.
        """
        if self._closed:
            return
        self._closed = True
        state = self._state
        state.open_receivers -= 1
        for task, receiver in [entry for entry in state.receivers.items() if entry[1].end is self]:
            del state.receivers[task]
            receiver.error = trio.ClosedResourceError
            trio.lowlevel.reschedule(task)
        for task, gatherer in [entry for entry in state.gatherers.items() if entry[1].end is self]:
            del state.gatherers[task]
            gatherer.error = trio.ClosedResourceError
            trio.lowlevel.reschedule(task)
        if state.open_receivers == 0:
            for task, sender in state.senders.items():
                sender.error = trio.BrokenResourceError
                trio.lowlevel.reschedule(task)
            state.senders.clear()
            queued = state.size - state.in_flight
            state.queue.clear()
            state.discarded += queued
            if queued:
                state.free(queued)
            state.settle()

    async def aclose(self) -> None:
        """Close this end, as `close` does, and pass a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()


def open_channel(
    name: str,
    capacity: int,
    weigh: Callable[[T], int],
    *,
    hold: bool = False,
    on_wait: Callable[[float, int], None] | None = None,
) -> tuple[SendChannel[T], ReceiveChannel[T]]:
    """Open a bounded channel that measures its content by weight.

    Args:
      name: for statistics and messages.
      capacity: the weight above which senders wait, 1 or more.
      weigh: returns the weight of an item, 1 or more, and always the same.
      hold: whether an item uses capacity until `ReceiveChannel.done`, or only until it is taken.
      on_wait: observer called with (seconds queued, weight) for each item taken; must not raise.

    Raises:
      ValueError: the capacity is less than 1.
    """
    if capacity < 1:
        raise ValueError(f"channel {name}: capacity is {capacity}; it must be 1 or more")
    state = ChannelState(name, capacity, weigh, hold, on_wait)
    return SendChannel(state), ReceiveChannel(state)
