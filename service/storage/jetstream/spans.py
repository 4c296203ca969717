"""The replicated span log: streams ``SPANS_0`` to ``SPANS_{P-1}`` of envelopes
(:mod:`betrace.service.storage.jetstream.envelope`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import trio
from outcome import Error, Outcome, Value

from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import EnvelopeCorrupt, Spans, unpack
from betrace.service.storage.jetstream.errors import NatsUnavailable, NotInStream
from betrace.service.storage.jetstream.generations import MOST_PARTITIONS
from betrace.service.storage.jetstream.layout import Layout, unpack_log_position
from betrace.service.storage.jetstream.nats import MESSAGE_ID, Nats, NewMessage, StoredMessage
from betrace.service.storage.jetstream.stream_log import (
    ATTEMPT_SECONDS,
    LogMessage,
    announce,
    append_once,
    log_message,
    read_log,
)
from betrace.service.storage.jetstream.wakeups import Wakeup
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing
from betrace.service.storage.spanlog.frames import Frame

T = TypeVar("T")

READ_SECONDS = 20.0
"""How long :meth:`SpanStreams.read_many` tries to reach the servers."""

_GETS = 8  # in flight at the same time
_RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Append:
    """A message for a partition. Its id is unique, because messages with the same id are stored
    once."""

    partition: int
    data: bytes
    message_id: str


class SpanStreams:
    """The span log of a cluster. Positions are those of
    :func:`betrace.service.storage.jetstream.layout.pack_log_position`."""

    def __init__(self, client: NatsClient, layout: Layout) -> None:
        self._client = client
        self._layout = layout
        self._known: dict[int, int] = {}
        self._exist: set[int] = set()  # partitions that were added since the start

    # For Trio

    async def append(self, partition: int, data: bytes, message_id: str) -> int:
        """Append a message and return its sequence, once a quorum has it. While the outcome is
        unknown, sends the same id again, until cancelled. Raises :exc:`StreamFull` and
        :exc:`MessageTooLarge`."""
        append = Append(partition, data, message_id)
        return await self._client.call(lambda nats: self._append(nats, append), None)

    async def append_each(
        self, appends: Sequence[Append], done: Callable[[int, Outcome[int]], None]
    ) -> None:
        """Append messages to different partitions, which costs less than :meth:`append` for each.
        ``done`` is called with the number and the outcome of each one when it ends, unless this
        call was cancelled before."""
        token = trio.lowlevel.current_trio_token()
        waiting = True

        def report(number: int, result: Outcome[int]) -> None:
            if waiting:
                done(number, result)

        def deliver(number: int, result: Outcome[int]) -> None:
            self._client.deliver(token, partial(report, number, result))

        async def work(nats: Nats) -> None:
            await _AppendsTogether(self, nats, appends, deliver).run()

        try:
            await self._client.call(work, None)
        finally:
            waiting = False

    def _note(self, partition: int, sequence: int) -> None:
        self._known[partition] = max(sequence, self._known.get(partition, 0))

    async def _append(self, nats: Nats, append: Append, known: int | None = None) -> int:
        """Append a message. ``known`` is a sequence that existed before its first attempt."""
        partition, layout = append.partition, self._layout
        if known is None:
            known = self._known.get(partition)
        if known is None:
            known = await self._first_known(nats, partition)
        sequence = await append_once(
            nats,
            layout.spans_stream(partition),
            layout.spans_subject(partition),
            append.data,
            append.message_id,
            known,
        )
        self._note(partition, sequence)
        await announce(nats, layout.spans_wakeup, partition)
        return sequence

    async def _first_known(self, nats: Nats, partition: int) -> int:
        while True:
            try:
                last = await nats.last_sequence(self._layout.spans_stream(partition))
            except NatsUnavailable:
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return self._known.setdefault(partition, last)

    async def read(
        self, partition: int, after: int, most_bytes: int, wait_seconds: float
    ) -> list[LogMessage]:
        """The messages after sequence ``after``, in order and without gaps, until they have
        ``most_bytes`` or more; empty if none came within ``wait_seconds``. Raises :exc:`LogGap` and
        :exc:`NatsUnavailable`."""
        stream = self._layout.spans_stream(partition)
        wakeup = Wakeup(self._layout.spans_wakeup, partition)
        return await self._client.call(
            lambda nats: read_log(nats, stream, wakeup, after, most_bytes, wait_seconds), None
        )

    async def get(self, partition: int, sequence: int) -> LogMessage | None:
        """The message at ``sequence``, None if the log does not have it. Raises
        :exc:`NatsUnavailable`."""

        async def work(nats: Nats) -> LogMessage | None:
            message = await self._message(nats, partition, sequence)
            return None if message is None else log_message(message)

        return await self._client.call(work)

    async def last(self, partition: int) -> int:
        """The sequence of the last message, 0 without any. A leader that has lost its quorum may
        answer with an earlier one. Raises :exc:`NatsUnavailable`."""
        stream = self._layout.spans_stream(partition)
        return await self._client.call(lambda nats: nats.last_sequence(stream))

    async def first(self, partition: int) -> int:
        """The sequence of the first message that was not deleted. Raises
        :exc:`NatsUnavailable`."""
        stream = self._layout.spans_stream(partition)
        info = await self._client.call(lambda nats: nats.api(f"STREAM.INFO.{stream}"))
        return int(info["state"]["first_seq"])

    async def first_since(self, partition: int, first: int, end: int, time_ns: int) -> int:
        """The first sequence from ``first`` on whose message was stored at ``time_ns`` or later;
        ``end`` if none before it was. Timestamps grow, apart from jumps of servers' clocks. Raises
        :exc:`NatsUnavailable`."""
        while first < end:
            middle = (first + end) // 2
            found = await self.get(partition, middle)
            if found is not None and found.time_ns >= time_ns:
                end = middle
            else:
                first = middle + 1
        return end

    async def forget_before(self, partition: int, sequence: int) -> None:
        """Delete the messages before ``sequence``; the log never grows backwards. Raises
        :exc:`NatsUnavailable`."""
        if sequence > 1:
            stream = self._layout.spans_stream(partition)
            body = {"seq": sequence}
            await self._client.call(lambda nats: nats.api(f"STREAM.PURGE.{stream}", body))

    # For worker threads

    def read_many(
        self, tenant: str, positions: Sequence[int]
    ) -> list[Frame | FrameMissing | FrameCorrupt]:
        """The frames of ``tenant`` at ``positions``, in the same order; in place of a frame that
        cannot be read, the error. Blocks. Raises :exc:`NatsUnavailable` after
        :data:`READ_SECONDS`."""

        async def work(nats: Nats) -> dict[int, Frame | FrameMissing | FrameCorrupt]:
            slots = asyncio.Semaphore(_GETS)
            wanted = sorted(set(positions))

            async def one(position: int) -> Frame | FrameMissing | FrameCorrupt:
                async with slots:
                    return await self._frame(nats, tenant, position)

            return dict(zip(wanted, await _all(map(one, wanted)), strict=True))

        found = self._client.call_blocking(work, READ_SECONDS)
        return [found[position] for position in positions]

    async def _frame(
        self, nats: Nats, tenant: str, position: int
    ) -> Frame | FrameMissing | FrameCorrupt:
        partition, sequence = unpack_log_position(position)
        while True:
            try:
                if not await self._has(nats, partition):
                    return FrameMissing(f"position {position}: there is no partition {partition}")
                message = await self._message(nats, partition, sequence)
                break
            except NatsUnavailable:
                await asyncio.sleep(_RETRY_SECONDS)
        where = f"{self._layout.spans_stream(partition)}, sequence {sequence}"
        if message is None:
            return FrameMissing(f"{where}: the message was deleted, or never existed")
        try:
            envelope = unpack(message.data)
        except EnvelopeCorrupt as error:
            return FrameCorrupt(f"{where}: {error}")
        for frame in envelope.frames if isinstance(envelope, Spans) else ():
            if frame.tenant == tenant:
                return Frame("protobuf", "", frame.received_ns, bytes(frame.body), frame.spans)
        return FrameMissing(f"{where}: the message has no frame of tenant {tenant}")

    async def _has(self, nats: Nats, partition: int) -> bool:
        """Whether there is such a partition. Servers do not answer requests to a stream that does
        not exist."""
        if 0 <= partition < self._layout.partitions or partition in self._exist:
            return True
        if not 0 <= partition < MOST_PARTITIONS:
            return False
        try:
            await nats.last_sequence(self._layout.spans_stream(partition))
        except NotInStream:
            return False
        self._exist.add(partition)
        return True

    async def _message(self, nats: Nats, partition: int, sequence: int) -> StoredMessage | None:
        if sequence < 1:
            return None
        stream = self._layout.spans_stream(partition)
        try:
            return await nats.get(stream, sequence)
        except NotInStream:  # this replica may be behind
            return await nats.leader_get(stream, {"seq": sequence})


class _AppendsTogether:
    """Publishes messages together, and those that are not acknowledged once more, one by one."""

    def __init__(
        self,
        streams: SpanStreams,
        nats: Nats,
        appends: Sequence[Append],
        deliver: Callable[[int, Outcome[int]], None],
    ) -> None:
        self._streams = streams
        self._nats = nats
        self._appends = appends
        self._deliver = deliver
        self._before = dict(streams._known)
        self._together = [n for n, each in enumerate(appends) if each.partition in self._before]
        self._unannounced: list[int] = []  # partitions

    async def run(self) -> None:
        layout = self._streams._layout
        async with asyncio.TaskGroup() as self._tasks:
            for number in {*range(len(self._appends))}.difference(self._together):
                self._tasks.create_task(self._alone(number))
            together = [self._appends[number] for number in self._together]
            messages = [
                NewMessage(
                    layout.spans_subject(each.partition), each.data, {MESSAGE_ID: each.message_id}
                )
                for each in together
            ]
            await self._nats.publish_each(messages, self._ended, ATTEMPT_SECONDS)

    def _ended(self, at: int, sequence: int | None) -> None:
        number = self._together[at]
        if sequence is None:
            self._tasks.create_task(self._alone(number))
            return
        partition = self._appends[number].partition
        self._streams._note(partition, sequence)
        if not self._unannounced:
            self._tasks.create_task(self._announce())
        self._unannounced.append(partition)
        self._deliver(number, Value(sequence))

    async def _alone(self, number: int) -> None:
        append = self._appends[number]
        try:
            known = self._before.get(append.partition)
            result = Value(await self._streams._append(self._nats, append, known))
        except Exception as error:
            self._deliver(number, Error(error))
        else:
            self._deliver(number, result)

    async def _announce(self) -> None:
        partitions, self._unannounced = self._unannounced, []
        await announce(self._nats, self._streams._layout.spans_wakeup, *partitions)


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order; the first error cancels the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return [await task for task in tasks]
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
