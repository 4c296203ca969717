"""A side branch of a pipeline that never blocks it: items without room are dropped and counted.

::

    async def export(batch: list[Record]) -> None: ...

    tap = Tap("export", 10_000, export)
    await nursery.start(tap.run)
    tap.offer(record)            # returns at once
    ...
    tap.close()                  # accepted items are still consumed, then `run` returns
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Generic, TypeVar, final

import trio

from betrace.channels.channel import open_channel
from betrace.channels.supervisor import backoff

T = TypeVar("T")

logger = logging.getLogger("channels.tap")


class DropReason(StrEnum):
    """Why a tap dropped items."""

    FULL = "full"
    """The tap was full: the consumer is slower than the pipeline. This is intended."""

    CLOSED = "closed"
    """They were offered after `Tap.close`."""

    FAILED = "failed"
    """The consumer raised; it may have consumed some of the batch."""

    CANCELLED = "cancelled"
    """`Tap.run` was cancelled before or while they were consumed."""


@dataclass(frozen=True, slots=True)
class TapStatistics:
    """A tap at one moment. ``offered == consumed + waiting + sum(dropped.values())``, in weight."""

    name: str
    """The tap's name."""

    capacity: int
    """The maximum weight in the tap, including the batch being consumed."""

    waiting: int
    """The weight in the tap now."""

    offered: int
    """The weight offered since the start."""

    consumed: int
    """The weight that the consumer took without raising."""

    dropped: Mapping[DropReason, int]
    """The weight dropped, by reason."""

    peak: int
    """The largest ``waiting`` since the start."""


def _one(_: object) -> int:
    return 1


@final
class Tap(Generic[T]):
    """Passes the items offered to it to a consumer, in batches and in order, or drops them.

    When the consumer raises, its batch is dropped. The next call follows after a pause that grows
    from ``first_pause`` to ``longest_pause`` seconds while it keeps failing. A consumer that wants
    retries does them itself; meanwhile new items wait in the tap while there is room.

    Args:
      name: for statistics and the log.
      capacity: the maximum weight in the tap, including the batch being consumed.
      consumer: called with a list of at least one item.
      weigh: returns the weight of an item, 1 or more; by default 1.
      max_batch_weight: of a batch; a single heavier item is a batch of its own.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        consumer: Callable[[list[T]], Awaitable[object]],
        *,
        weigh: Callable[[T], int] = _one,
        max_batch_weight: int = 1000,
        first_pause: float = 0.1,
        longest_pause: float = 30.0,
    ) -> None:
        self.name = name
        self._consumer = consumer
        self._max_batch_weight = max_batch_weight
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._send, self._receive = open_channel(name, capacity, weigh, hold=True)
        self._offered = 0
        self._consumed = 0
        self._dropped = dict.fromkeys(DropReason, 0)

    def offer(self, item: T) -> bool:
        """Take an item if there is room, and return whether it was taken. Never blocks."""
        weight = self._send.weigh(item)
        self._offered += weight
        try:
            self._send.send_nowait(item)
        except trio.WouldBlock:
            reason = DropReason.FULL
        except trio.ClosedResourceError:
            reason = DropReason.CLOSED
        except trio.BrokenResourceError:
            reason = DropReason.CANCELLED
        else:
            return True
        self._dropped[reason] += weight
        return False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Consume until the tap is closed and empty."""
        failures = 0
        task_status.started()
        with self._receive:
            try:
                while True:
                    try:
                        batch = await self._receive.receive_some(self._max_batch_weight)
                    except trio.EndOfChannel:
                        return
                    failures = await self._consume(batch, failures)
                    if failures:
                        await trio.sleep(backoff(failures, self._first_pause, self._longest_pause))
            finally:
                left = self._receive.statistics()
                self._receive.done(left.in_flight)
                self._dropped[DropReason.CANCELLED] += left.size

    async def _consume(self, batch: list[T], failures: int) -> int:
        """Call the consumer once and return the number of consecutive failures."""
        weight = sum(map(self._receive.weigh, batch))
        try:
            await self._consumer(batch)
        except Exception:
            logger.exception("tap %s: the consumer failed; its batch is dropped", self.name)
            self._dropped[DropReason.FAILED] += weight
            failures += 1
        else:
            self._consumed += weight
            failures = 0
        self._receive.done(weight)
        return failures

    def close(self) -> None:
        """Refuse further items; `run` returns when the accepted ones are consumed."""
        self._send.close()

    def statistics(self) -> TapStatistics:
        """Return what is waiting, consumed and dropped."""
        channel = self._send.statistics()
        return TapStatistics(
            name=self.name,
            capacity=channel.capacity,
            waiting=channel.size,
            offered=self._offered,
            consumed=self._consumed,
            dropped=MappingProxyType(dict(self._dropped)),
            peak=channel.peak,
        )
