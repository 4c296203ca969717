"""State shared by the ends of a channel: the queue, the waiting tasks, the weights, the statistics.

The ends, with their rules of use, are in `betrace.channels.channel`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, final

import trio
from trio.lowlevel import Task

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """A channel at one moment. All weights are in the unit of the channel's ``weigh`` function."""

    name: str
    """The name passed to `open_channel`."""

    capacity: int
    """The weight in the channel above which senders wait."""

    size: int
    """The weight that uses capacity: ``queued + in_flight``. One heavy item can exceed it."""

    queued: int
    """The weight that was sent and not yet taken."""

    in_flight: int
    """The weight that was taken and is not yet done; always 0 for a channel without ``hold``."""

    items_queued: int
    """The number of items that were sent and not yet taken."""

    fill: float
    """``size / capacity``, at most 1."""

    peak: int
    """The largest ``size`` since the channel was opened. For a period's peak see `PeakReader`."""

    total_in: int
    """The weight admitted since the channel was opened."""

    total_out: int
    """The weight taken since the channel was opened."""

    discarded: int
    """The weight discarded because the last receiver was closed while it was queued."""

    oldest_wait: float
    """Seconds that the first queued item has waited; 0 if none is queued."""

    busy_since: float | None
    """`trio.current_time` when ``size`` last rose from 0; None while it is 0."""

    waiting_senders: int
    """The number of tasks waiting for room."""

    waiting_receivers: int
    """The number of tasks waiting for an item."""

    open_senders: int
    """The number of sending ends (clones) not yet closed."""

    open_receivers: int
    """The number of receiving ends (clones) not yet closed."""


@final
class PeakReader:
    """The largest size of a channel between two readings.

    Each reader has its own period, so that several observers (metrics, an API) do not reset each
    other's peaks. A reader that is no longer referenced costs nothing.
    """

    def __init__(self, state: ChannelState[object]) -> None:
        self._state = state
        self._peak = state.size
        state.fold_peak()
        state.peak_readers.add(self)

    def take(self) -> int:
        """Return the largest size since the last call, or since the reader was created.

        The next period begins with the current size.
        """
        self._state.fold_peak()
        peak, self._peak = self._peak, self._state.size
        return peak

    def raise_to(self, size: int) -> None:
        """Record that the channel had this size; called by the channel."""
        self._peak = max(self._peak, size)


class WaitingSender(Generic[T]):
    """A task waiting in `send`, with its item and its end of the channel."""

    __slots__ = ("end", "error", "item", "weight")

    def __init__(self, item: T, weight: int, end: object) -> None:
        self.item = item
        self.weight = weight
        self.end = end
        self.error: type[Exception] | None = None


class WaitingReceiver(Generic[T]):
    """A task waiting in `receive`, with its end of the channel and the item that it received."""

    __slots__ = ("end", "error", "item")

    def __init__(self, end: object) -> None:
        self.item: T | None = None
        self.end = end
        self.error: type[Exception] | None = None


class GatheringReceiver:
    """A task that waits in `receive_some` for more items.

    It waits until a weight of ``enough`` or ``items`` items are queued, or until the time ``until``
    if anything is queued then. ``scope`` gets its deadline when the first item is queued.
    """

    __slots__ = ("end", "enough", "error", "items", "scope", "until")

    def __init__(
        self, end: object, enough: int, items: float, until: float, scope: trio.CancelScope
    ) -> None:
        self.end = end
        self.enough = enough
        self.items = items
        self.until = until
        self.scope = scope
        self.error: type[Exception] | None = None


class ChannelState(Generic[T]):
    """State shared by the ends of a channel.

    Invariants between operations: while a receiver waits, nothing is queued; while senders wait,
    the first one's item does not fit.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        weigh: Callable[[T], int],
        hold: bool,
        on_wait: Callable[[float, int], None] | None,
    ) -> None:
        self.name = name
        self.capacity = capacity
        self.weigh = weigh
        self.hold = hold
        self.on_wait = on_wait
        self.queue: deque[tuple[T, int, float]] = deque()  # item, weight, time of admission
        self.senders: OrderedDict[Task, WaitingSender[T]] = OrderedDict()
        self.receivers: OrderedDict[Task, WaitingReceiver[T]] = OrderedDict()
        self.gatherers: OrderedDict[Task, GatheringReceiver] = OrderedDict()
        self.until_empty = trio.lowlevel.ParkingLot()
        self.direct: Callable[[T], bool] | None = None
        self.open_senders = 0
        self.open_receivers = 0
        self.size = 0
        self.in_flight = 0
        self.total_in = 0
        self.total_out = 0
        self.discarded = 0
        self.busy_since: float | None = None
        self.peak = 0  # since the last fold into the readers
        self.peak_ever = 0
        self.peak_readers: weakref.WeakSet[PeakReader] = weakref.WeakSet()

    def weight_of(self, item: T) -> int:
        """Return an item's weight; ValueError if it is less than 1."""
        weight = self.weigh(item)
        if weight < 1:
            raise ValueError(
                f"channel {self.name}: an item weighs {weight}; weights must be 1 or more, "
                "or the number of items would be unbounded"
            )
        return weight

    def fits(self, weight: int) -> bool:
        """Return whether this weight may be admitted now."""
        size = self.size
        return size + weight <= self.capacity or size == 0

    def pass_directly(self, item: T, weight: int) -> bool:
        """Offer an item to the direct receiver, if nothing is in the channel; return whether it was
        taken."""
        if self.direct is None or self.size or not self.direct(item):
            return False
        self.peak = max(self.peak, weight)
        self.total_in += weight
        self.total_out += weight
        return True

    def put(self, item: T, weight: int) -> None:
        """Admit an item that fits: to the first waiting receiver, or else into the queue."""
        now = trio.current_time()
        if self.size == 0:
            self.busy_since = now
        self.size += weight
        self.peak = max(self.peak, self.size)
        self.total_in += weight
        if self.receivers:
            task, receiver = self.receivers.popitem(last=False)
            receiver.item = item
            self.account_taken(weight, 0.0)
            trio.lowlevel.reschedule(task)
        else:
            self.queue.append((item, weight, now))
            if self.gatherers:
                self.wake_gatherer(now)

    def wake_gatherer(self, now: float, at_once: bool = False) -> None:
        """Wake the first gathering task if its wait is over; otherwise set its deadline."""
        task, gatherer = next(iter(self.gatherers.items()))
        enough = self.size - self.in_flight >= gatherer.enough
        if at_once or enough or len(self.queue) >= gatherer.items or now >= gatherer.until:
            del self.gatherers[task]
            trio.lowlevel.reschedule(task)
        elif gatherer.scope.deadline > gatherer.until:
            gatherer.scope.deadline = gatherer.until

    def take(self) -> tuple[T, int]:
        """Take the first queued item. The caller must call `settle` after its last one."""
        item, weight, since = self.queue.popleft()
        self.account_taken(weight, trio.current_time() - since if self.on_wait else 0.0)
        return item, weight

    def account_taken(self, weight: int, waited: float) -> None:
        """Count an item as taken after it was queued for ``waited`` seconds."""
        self.total_out += weight
        if self.hold:
            self.in_flight += weight
        else:
            self.free(weight)
        if self.on_wait is not None:
            self.on_wait(waited, weight)

    def free(self, weight: int) -> None:
        """Release capacity. The caller must call `settle` afterwards."""
        self.size -= weight
        if self.size == 0:
            self.busy_since = None

    def settle(self) -> None:
        """Admit the waiting senders that fit, in order, then wake the tasks in `wait_empty`."""
        while self.senders:
            task, sender = next(iter(self.senders.items()))
            if not self.fits(sender.weight):
                break
            del self.senders[task]
            self.put(sender.item, sender.weight)
            trio.lowlevel.reschedule(task)
        if self.size == 0 and self.until_empty:
            self.until_empty.unpark_all()

    def fold_peak(self) -> None:
        """Pass the peak so far to the readers and begin a new period."""
        peak, self.peak = self.peak, self.size
        self.peak_ever = max(self.peak_ever, peak)
        for reader in self.peak_readers:
            reader.raise_to(peak)

    def fill(self) -> float:
        """Return how full the channel is, 0 to 1."""
        return min(1.0, self.size / self.capacity)

    def statistics(self) -> ChannelStatistics:
        """Return the channel's content and counts."""
        return ChannelStatistics(
            name=self.name,
            capacity=self.capacity,
            size=self.size,
            queued=self.size - self.in_flight,
            in_flight=self.in_flight,
            items_queued=len(self.queue),
            fill=self.fill(),
            peak=max(self.peak_ever, self.peak),
            total_in=self.total_in,
            total_out=self.total_out,
            discarded=self.discarded,
            oldest_wait=trio.current_time() - self.queue[0][2] if self.queue else 0.0,
            busy_since=self.busy_since,
            waiting_senders=len(self.senders),
            waiting_receivers=len(self.receivers) + len(self.gatherers),
            open_senders=self.open_senders,
            open_receivers=self.open_receivers,
        )
