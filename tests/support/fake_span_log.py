"""A log of partitions in memory, in place of NATS."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio
from outcome import Error, Outcome, Value

from betrace.service.otlp.wire import scan_bodies
from betrace.service.storage.jetstream.envelope import Spans, TenantFrame, unpack
from betrace.service.storage.jetstream.spans import Append


class FakeSpanLog:
    """Stores what is appended, after ``before`` returns for its partition."""

    def __init__(self) -> None:
        self.messages: defaultdict[int, list[bytes]] = defaultdict(list)
        self.ids: Counter[str] = Counter()
        self.in_flight: Counter[int] = Counter()
        self.most_in_flight = 0
        self.times: list[float] = []
        self.before: Callable[[int], Awaitable[None]] | None = None

    async def append_each(
        self, appends: Sequence[Append], done: Callable[[int, Outcome[int]], None]
    ) -> None:
        async def one(number: int, each: Append) -> None:
            try:
                found = Value(await self.append(each.partition, each.data, each.message_id))
            except Exception as error:
                done(number, Error(error))
            else:
                done(number, found)

        async with trio.open_nursery() as nursery:
            for number, each in enumerate(appends):
                nursery.start_soon(one, number, each)

    async def append(self, partition: int, data: bytes, message_id: str) -> int:
        self.times.append(trio.current_time())
        self.in_flight[partition] += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight[partition])
        try:
            if self.before is not None:
                await self.before(partition)
            await trio.lowlevel.checkpoint()
        finally:
            self.in_flight[partition] -= 1
        self.ids[message_id] += 1
        self.messages[partition].append(data)
        return len(self.messages[partition])

    def frames(self) -> Iterator[tuple[int, TenantFrame]]:
        """The partition and content of each frame."""
        for partition, messages in self.messages.items():
            for message in messages:
                envelope = unpack(message)
                assert isinstance(envelope, Spans)
                tenants = [frame.tenant for frame in envelope.frames]
                assert len(set(tenants)) == len(tenants)
                for frame in envelope.frames:
                    yield partition, frame

    def spans(self) -> Counter[tuple[str, int]]:
        """How often each span is stored, by tenant and span id."""
        found: Counter[tuple[str, int]] = Counter()
        for _, frame in self.frames():
            batch = scan_bodies(frame.tenant, [frame.body])
            assert len(batch) == frame.spans
            found.update((frame.tenant, int(row[2])) for row in batch.spans)
        return found
