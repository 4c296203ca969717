"""Groups a channel's items into batches by weight or time.

::

    async for batch in Batcher(receive, max_weight=128, max_wait=0.5, key=tenant_of):
        ...                        # a batch never mixes two keys
        receive.done(sum(map(receive.weigh, batch)))    # if the channel was opened with hold=True
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar, final

import trio

from betrace.channels.channel import ReceiveChannel

T = TypeVar("T")


class Pace(Protocol):
    """Delays batches so that they grow, where each costs much to process whatever its size."""

    def due(self, urgent: bool) -> float:
        """Return the `trio.current_time` from which the next batch may come out."""
        ...

    def taken(self, urgent: bool) -> None:
        """Record that a batch came out now, full or not."""
        ...


@dataclass(frozen=True)
class Pacing(Generic[T]):
    """How a pace delays batches.

    A batch that waited the batcher's ``max_wait`` seconds is ready only when the pace allows it:
    first the oldest urgent batch, otherwise the oldest.
    """

    pace: Pace
    """It may be shared with the code that measures what a batch costs."""

    urgent: Callable[[T], bool] | None = None
    """Whether an item's batch goes before others."""

    most_wait: float = math.inf
    """Seconds after which a batch is ready at any pace."""

    most_weight: float = math.inf
    """While the open batches together weigh more, the heaviest is ready at any pace."""


@dataclass(slots=True)
class _OpenBatch(Generic[T]):
    """A batch that may still grow."""

    deadline: float
    items: list[T] = field(default_factory=list)
    weight: int = 0
    urgent: bool = False


@final
class Batcher(Generic[T]):
    """An async iterator of batches, each a list of at least one item in the order of arrival.

    A batch is ready when its weight is ``max_weight``, when the next item of its key would exceed
    that, or ``max_wait`` seconds after its first item. An item heavier than ``max_weight`` is a
    batch of its own. When more than ``max_keys`` batches would be open, the oldest is ready too.
    When the channel ends, the open batches come out, and then the iteration ends.

    The batcher contains at most ``max_keys + 1`` times ``max_weight``, because it receives nothing
    while a batch is ready. Cancelling a wait loses nothing: the items stay for the next call.
    Several tasks may iterate over one batcher; they take turns.

    Args:
      receive: where items come from; the batcher never closes it or calls `ReceiveChannel.done`.
      max_weight: of a batch, 1 or more.
      max_wait: seconds; with 0 a batch is what one receive found.
      key: returns an item's key; without it, all items have the same key.
      max_keys: how many batches of different keys may be open, 1 or more.
      pacing: delays batches; see `Pacing`.

    Raises:
      ValueError: a limit cannot work.
    """

    def __init__(
        self,
        receive: ReceiveChannel[T],
        max_weight: int,
        max_wait: float,
        *,
        key: Callable[[T], Hashable] | None = None,
        max_keys: int = 64,
        pacing: Pacing[T] | None = None,
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
        self._pace = None if pacing is None else pacing.pace
        self._urgent = None if pacing is None else pacing.urgent
        self._more_wait = max(0.0, math.inf if pacing is None else pacing.most_wait - max_wait)
        self._most_weight = math.inf if pacing is None else pacing.most_weight
        self._gathered = 0  # weight of the open batches
        self._urgent_keys: OrderedDict[Hashable, None] = OrderedDict()
        self._open: OrderedDict[Hashable, _OpenBatch[T]] = OrderedDict()  # oldest first
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
          trio.EndOfChannel: the channel has ended and all batches have come out.
          trio.ClosedResourceError: the receiving end was closed.
        """
        # One task at a time: another would not know the deadlines of the open batches.
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            while not self._ready:
                if self._pace is not None:
                    self._take_waiting()
                self._close_due()
                if not self._ready and not self._received:
                    await self._gather()
                self._sort_in()
            return self._ready.popleft()
        finally:
            self._turn.release()

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
        """Take what is queued. With slow commits a batch is always ready, and items left in the
        channel would not make any batch larger."""
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
            batch = self._open[key] = _OpenBatch(trio.current_time() + self._max_wait)
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
        """Return when the next batch is ready if nothing else arrives."""
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
