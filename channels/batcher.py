"""Gathering items into batches by weight or time.

::

    async for batch in Batcher(receive, max_weight=128, max_wait=0.5, key=tenant_of):
        ...                        # a batch never mixes two keys
        receive.done(sum(map(receive.weigh, batch)))    # if the channel was opened with hold=True
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar, final

import trio

from betrace.channels.channel import ReceiveChannel

T = TypeVar("T")


class Pace(Protocol):
    """Holds batches back where finishing one costs much whatever its size, so that they grow."""

    def due(self, urgent: bool) -> float:
        """The time, of `trio.current_time`, from which the next batch may come out."""
        ...

    def taken(self, urgent: bool) -> None:
        """Note that a batch came out now, full or not."""
        ...


@dataclass(slots=True)
class _Open(Generic[T]):
    """A batch that may still grow."""

    deadline: float
    items: list[T] = field(default_factory=list)
    weight: int = 0
    urgent: bool = False


@final
class Batcher(Generic[T]):
    """An async iterator of batches, each a list of at least one item in the order of arrival.

    A batch is ready when its weight is ``max_weight``, when the next item of its key would exceed
    it, or when its first item was gathered ``max_wait`` seconds ago. Only a single item can be
    heavier than ``max_weight``; it is a batch of its own. When more than ``max_keys`` batches would
    be open, the oldest is ready too. When the channel ends, what was gathered comes out, and then
    the iteration ends.

    With a ``pace``, a batch that waited ``max_wait`` is ready only when the pace lets it: the
    oldest urgent one first, else the oldest. However slow the pace is, one that waited
    ``most_wait`` is ready, and so is the heaviest one while more than ``most_weight`` is gathered.

    At most ``max_keys + 1`` times ``max_weight`` is gathered, since nothing is received while a
    batch is ready. Cancelling a wait loses nothing: what was gathered stays for the next call.
    Several tasks may iterate over one batcher; they take turns.

    Args:
      receive: where items come from; the batcher never closes it or calls `ReceiveChannel.done`.
      max_weight: of a batch, 1 or more.
      max_wait: seconds; with 0 a batch holds what one look into the channel found.
      key: gives the key of an item; without it all have the same.
      max_keys: how many batches of different keys may be open, 1 or more.
      pace: see above; it may be shared with who measures what a batch costs.
      urgent: whether an item's batch goes before others.
      most_wait: seconds, with a pace.
      most_weight: of all that is gathered, with a pace.

    Raises:
      ValueError: a limit that cannot work.
    """

    def __init__(
        self,
        receive: ReceiveChannel[T],
        max_weight: int,
        max_wait: float,
        *,
        key: Callable[[T], Hashable] | None = None,
        max_keys: int = 64,
        pace: Pace | None = None,
        urgent: Callable[[T], bool] | None = None,
        most_wait: float = float("inf"),
        most_weight: float = float("inf"),
    ) -> None:
        if max_weight < 1 or max_keys < 1 or max_wait < 0:
            raise ValueError(
                f"batcher of {receive.name}: max_weight ({max_weight}) and max_keys ({max_keys}) "
                f"must be 1 or more, max_wait ({max_wait}) 0 or more"
            )
        self._receive = receive
        self._max_weight = max_weight
        self._max_wait = max_wait
        self._key = key
        self._max_keys = max_keys
        self._pace = pace
        self._urgent = urgent
        self._more_wait = max(0.0, most_wait - max_wait)
        self._most_weight = most_weight
        self._gathered = 0  # the weight of what is open
        self._urgent_keys: OrderedDict[Hashable, None] = OrderedDict()
        self._open: OrderedDict[Hashable, _Open[T]] = OrderedDict()  # oldest first
        self._ready: deque[list[T]] = deque()
        self._received: deque[T] = deque()  # not yet put into a batch
        self._turn = trio.Lock()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[T]:
        try:
            return await self.next()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def next(self) -> list[T]:
        """Return the next batch.

        Raises:
          trio.EndOfChannel: the channel has ended and everything gathered came out.
          trio.ClosedResourceError: the receiving end was closed.
        """
        # One task at a time: another would wait without the deadlines of what this one gathers.
        async with self._turn:
            while not self._ready:
                if self._pace is not None:
                    self._take_waiting()
                self._close_due()
                if not self._ready and not self._received:
                    await self._gather()
                self._sort_in()
            return self._ready.popleft()

    async def _gather(self) -> None:
        try:
            with trio.move_on_at(self._next_due()):
                self._received.extend(await self._receive.receive_some(self._max_weight))
        except trio.EndOfChannel:
            if not self._open:
                raise
            while self._open:
                self._close_oldest()

    def _take_waiting(self) -> None:
        """Take what the channel has: where commits are slow there is always a batch to hand out,
        and what waits in the channel would not make any of them larger."""
        weight = 0
        while not self._ready and weight < self._max_weight:
            try:
                item = self._receive.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                return
            self._received.append(item)
            weight += self._receive.weigh(item)
            self._sort_in()

    def _sort_in(self) -> None:
        while self._received:
            self._add(self._received[0])
            self._received.popleft()  # only now: if the key function raises, nothing is lost

    def _add(self, item: T) -> None:
        key = None if self._key is None else self._key(item)
        weight = self._receive.weigh(item)
        batch = self._open.get(key)
        if batch is not None and batch.weight + weight > self._max_weight:
            self._close(key)
            batch = None
        if batch is None:
            if len(self._open) == self._max_keys:
                self._close_oldest()
            batch = self._open[key] = _Open(trio.current_time() + self._max_wait)
        batch.items.append(item)
        batch.weight += weight
        self._gathered += weight
        if self._urgent is not None and not batch.urgent and self._urgent(item):
            batch.urgent = True
            self._urgent_keys[key] = None
        if batch.weight >= self._max_weight:
            self._close(key)

    def _close(self, key: Hashable) -> None:
        batch = self._open.pop(key)
        self._gathered -= batch.weight
        self._urgent_keys.pop(key, None)
        self._ready.append(batch.items)
        if self._pace is not None:
            self._pace.taken(batch.urgent)

    def _close_oldest(self) -> None:
        self._close(next(iter(self._open)))

    def _next_due(self) -> float:
        """When the next batch is ready if nothing more comes."""
        if not self._open:
            return float("inf")
        oldest = next(iter(self._open.values())).deadline
        if self._pace is None:
            return oldest
        due = min(max(oldest, self._pace.due(False)), oldest + self._more_wait)
        if self._urgent_keys:
            first = self._open[self._first_urgent()].deadline
            due = min(due, max(first, self._pace.due(True)))
        return due

    def _first_urgent(self) -> Hashable:
        return min(self._urgent_keys, key=lambda key: self._open[key].deadline)

    def _close_due(self) -> None:
        now = trio.current_time()
        if self._pace is None:
            while self._open and next(iter(self._open.values())).deadline <= now:
                self._close_oldest()
            return
        while self._gathered > self._most_weight:
            self._close(max(self._open, key=lambda key: self._open[key].weight))
        if self._ready or self._next_due() > now:
            return
        if self._urgent_keys and self._pace.due(True) <= now:
            first = self._first_urgent()
            if self._open[first].deadline <= now:
                self._close(first)
                return
        self._close_oldest()
