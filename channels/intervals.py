"""Batches at intervals, so that items that arrive one by one are handled together."""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import trio

from betrace.channels.channel import ReceiveChannel

T = TypeVar("T")

PROBE_BATCHES = 32
"""If the interval adapts, one item more is expected every so many batches."""


class Intervals(Generic[T]):
    """Takes what is queued in a channel, at the earliest ``interval`` seconds after the last batch,
    or when a weight of ``enough`` is queued. An item that arrives after a longer pause is taken at
    once.

    Args:
      receive: the channel's receiving end.
      max_weight: maximum weight of a batch.
      interval: seconds.
      enough: a weight.
      adapts: whether a batch also comes out when as many items are queued as can be expected within
        the interval. It is meant for senders that wait for the outcome of their items before they
        send more: once all of them have sent, waiting for the interval to end would be in vain.
    """

    def __init__(
        self,
        receive: ReceiveChannel[T],
        max_weight: int,
        interval: float,
        enough: int,
        *,
        adapts: bool = False,
    ) -> None:
        self._receive = receive
        self._max_weight = max_weight
        self._interval = interval
        self._enough = enough
        self._adapts = adapts
        self._next_start = -math.inf
        self._expected = _Expected()

    async def next(self) -> list[T]:
        """Return the next batch, of at least one item.

        Raises:
          trio.EndOfChannel: the channel has ended.
        """
        until = self._next_start
        expected = self._expected.items if self._adapts else math.inf
        waits = trio.current_time() < until
        items = await self._receive.receive_some(
            self._max_weight, until=until, enough=self._enough, items=expected
        )
        now = trio.current_time()
        if waits:
            self._expected.observe(len(items), timed_out=now >= until)
        self._next_start = now + self._interval
        return items


class _Expected:
    """How many items arrive within an interval: the number that arrived last time, and from time to
    time one more, as TCP probes for bandwidth."""

    __slots__ = ("_settled", "items")

    def __init__(self) -> None:
        self.items = 1
        self._settled = 0  # batches until one more item is expected

    def observe(self, items: int, *, timed_out: bool) -> None:
        if timed_out and items < self.items:
            self.items = max(1, items)
            self._settled = PROBE_BATCHES
        elif items > self.items:
            self.items = items
        elif self._settled:
            self._settled -= 1
        else:
            self.items += 1
