"""Writers of a cluster's span log, and the check that nothing is lost or stored twice."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.spans import SpanStreams

T = TypeVar("T")

WAIT = 120.0  # a test fails after this; a busy machine is slow
_READ_BYTES = 1 << 20


class Writers:
    """Append messages with several in flight, as edges do."""

    def __init__(self, log: SpanStreams, partition: int) -> None:
        self._log = log
        self._partition = partition
        self._ids = itertools.count()
        self.acknowledged: dict[str, int] = {}

    async def append(self) -> None:
        message_id = f"w{next(self._ids)}"
        sequence = await self._log.append(self._partition, message_id.encode(), message_id)
        self.acknowledged[message_id] = sequence

    async def run(self) -> None:
        while True:
            await self.append()

    async def until(self, number: int) -> None:
        """Wait until that many more are acknowledged."""
        target = len(self.acknowledged) + number
        with trio.fail_after(WAIT):
            while len(self.acknowledged) < target:
                await trio.sleep(0.01)


async def check_through(log: SpanStreams, number: int, *faults: Callable[[], object]) -> None:
    """Append ``number`` messages before, between and after faults, and check the log of
    partition 0."""
    writers = Writers(log, 0)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(writers.run)
        await writers.until(number)
        for fault in faults:
            fault()
            await writers.until(number)
        nursery.cancel_scope.cancel()
    await check(log, writers, 0)


async def read_all(log: SpanStreams, partition: int) -> dict[int, str]:
    """All messages, by sequence."""
    found: dict[int, str] = {}
    last = await patiently(log.last, partition)
    while len(found) < last:
        for each in await patiently(log.read, partition, len(found), _READ_BYTES, 5):
            found[each.sequence] = each.data.decode()
    return found


async def patiently(call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """The result of a call, once the servers are available."""
    with trio.fail_after(WAIT):
        while True:
            try:
                return await call(*arguments)
            except NatsUnavailable:
                await trio.sleep(0.1)
    raise AssertionError


async def check(log: SpanStreams, writers: Writers, partition: int) -> None:
    """What was acknowledged is stored where it was said to be, and everything once."""
    stored = await read_all(log, partition)
    for message_id, sequence in writers.acknowledged.items():
        assert stored.get(sequence) == message_id
    assert max(Counter(stored.values()).values()) == 1
