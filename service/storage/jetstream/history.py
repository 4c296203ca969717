"""Reads the whole log of a cluster, or a period of it, in the order in which servers stored it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from betrace.service.storage.jetstream.errors import LogGap
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.jetstream.stream_log import LogMessage

_READ_BYTES = 32 << 20
"""Bytes in memory, for all partitions together."""

_RETRY_SECONDS = 0.1

Located = tuple[int, LogMessage]
"""A message with its partition."""


@dataclass(slots=True)
class _Reader:
    """Reads one partition up to ``last``."""

    partition: int
    after: int
    last: int
    messages: deque[LogMessage] = field(default_factory=deque)

    @property
    def ended(self) -> bool:
        return self.after >= self.last


class SpanHistory:
    """The messages of all partitions. All methods raise
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""

    def __init__(self, spans: SpanStreams, partitions: int) -> None:
        self._spans = spans
        self._partitions = partitions
        self.gaps: list[str] = []
        """Places where messages are missing."""

    async def ranges(
        self,
        since_ns: int | None = None,
        until_ns: int | None = None,
        starts: Mapping[int, int] | None = None,
    ) -> list[range]:
        """By partition, the sequences of the messages that servers stored from ``since_ns`` on and
        before ``until_ns``, as far as they are in the log now. In place of ``since_ns``, ``starts``
        has the first sequences by partition."""
        found = []
        for partition in range(self._partitions):
            first = max(1, await self._spans.first(partition))  # 0 in a stream that is new
            end = await self._spans.last(partition) + 1
            if starts is not None:
                first = max(first, starts.get(partition, 0))
            elif since_ns is not None:
                first = await self._spans.first_since(partition, first, end, since_ns)
            if until_ns is not None:
                end = await self._spans.first_since(partition, first, end, until_ns)
            found.append(range(first, end))
        return found

    async def begin_ns(self) -> int | None:
        """When the oldest message was stored; None without any."""
        times = []
        for partition in range(self._partitions):
            found = await self._spans.get(partition, await self._spans.first(partition))
            if found is not None:
                times.append(found.time_ns)
        return min(times, default=None)

    async def rounds(self, ranges: Sequence[range]) -> AsyncIterator[list[Located]]:
        """The messages in these ranges, in lists that follow each other in time."""
        readers = [_Reader(p, each.start - 1, each.stop - 1) for p, each in enumerate(ranges)]
        size = max(1 << 16, _READ_BYTES // self._partitions)
        while True:
            for reader in readers:
                await self._fill(reader, size)
            readers = [reader for reader in readers if reader.messages]
            if not readers:
                return
            unread = [reader.messages[-1].time_ns for reader in readers if not reader.ended]
            yield _taken(readers, min(unread, default=None))

    async def _fill(self, reader: _Reader, size: int) -> None:
        while not reader.messages and not reader.ended:
            try:
                found = await self._spans.read(reader.partition, reader.after, size, 0.0)
            except LogGap as gap:  # retention may delete messages meanwhile
                self.gaps.append(str(gap))
                reader.after = gap.found - 1
                continue
            if found:
                reader.messages.extend(each for each in found if each.sequence <= reader.last)
                reader.after = found[-1].sequence
            elif await self._spans.first(reader.partition) > reader.last:
                reader.after = reader.last  # everything was deleted meanwhile
            else:
                await trio.sleep(_RETRY_SECONDS)  # this replica is behind


def _taken(readers: list[_Reader], upto_ns: int | None) -> list[Located]:
    """Take the messages up to a time, None for all of them. A reader whose clock went back gives
    at least one."""
    found: list[Located] = []
    for reader in readers:
        messages = reader.messages
        while messages and (upto_ns is None or messages[0].time_ns <= upto_ns):
            found.append((reader.partition, messages.popleft()))
    if not found:
        reader = readers[0]
        found.append((reader.partition, reader.messages.popleft()))
    found.sort(key=lambda each: each[1].time_ns)
    return found
