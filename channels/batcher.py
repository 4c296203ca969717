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
from typing import Generic, Self, TypeVar, final

import trio

from .channel import ReceiveChannel

T = TypeVar("T")


@dataclass(slots=True)
class _Open(Generic[T]):
    """A batch that may still grow."""

    deadline: float
    items: list[T] = field(default_factory=list)
    weight: int = 0


@final
class Batcher(Generic[T]):
    """An async iterator of batches, each a list of at least one item in the order of arrival.

    A batch is ready when its weight is ``max_weight``, when the next item of its key would exceed
    it, or when its first item was gathered ``max_wait`` seconds ago. Only a single item can be
    heavier than ``max_weight``; it is a batch of its own. When more than ``max_keys`` batches would
    be open, the oldest is ready too. When the channel ends, what was gathered comes out, and then
    the iteration ends.

    At most ``max_keys + 1`` times ``max_weight`` is gathered, since nothing is received while a
    batch is ready. Cancelling a wait loses nothing: what was gathered stays for the next call.
    Several tasks may iterate over one batcher; they take turns.

    Args:
      receive: where items come from; the batcher never closes it or calls `ReceiveChannel.done`.
      max_weight: of a batch, 1 or more.
      max_wait: seconds; with 0 a batch holds what one look into the channel found.
      key: gives the key of an item; without it all have the same.
      max_keys: how many batches of different keys may be open, 1 or more.

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
                self._close_due()
                if not self._ready and not self._received:
                    await self._gather()
                self._sort_in()
            return self._ready.popleft()

    async def _gather(self) -> None:
        deadline = next(iter(self._open.values())).deadline if self._open else float("inf")
        try:
            with trio.move_on_at(deadline):
                self._received.extend(await self._receive.receive_some(self._max_weight))
        except trio.EndOfChannel:
            if not self._open:
                raise
            while self._open:
                self._close_oldest()

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
        if batch.weight >= self._max_weight:
            self._close(key)

    def _close(self, key: Hashable) -> None:
        self._ready.append(self._open.pop(key).items)

    def _close_oldest(self) -> None:
        self._ready.append(self._open.popitem(last=False)[1].items)

    def _close_due(self) -> None:
        now = trio.current_time()
        while self._open and next(iter(self._open.values())).deadline <= now:
            self._close_oldest()
