"""The output of a partition: a log with one writer at a time.

An owner opens an epoch: it appends an epoch record with the expected last sequence until it
succeeds. Each of its appends expects the sequence of its previous one, and one append is in flight
at a time, so a former owner, whose expectation is older than the epoch record, can never append
again. With several appends in flight the expected numbers would be predictions, and a
prediction says nothing about who wrote the previous message.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass

from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import (
    MessageTooLarge,
    NatsUnavailable,
    StreamFull,
    WrongLastSequence,
)
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.nats import (
    EXPECTED_LAST,
    EXPECTED_SUBJECT_LAST,
    MESSAGE_ID,
    Nats,
)
from betrace.service.storage.jetstream.stream_log import (
    ATTEMPT_SECONDS,
    EPOCH,
    LogMessage,
    Retries,
    announce,
    read_log,
)
from betrace.service.storage.jetstream.wakeups import Wakeup

_OWNER = "BeTrace-Owner"


class Fenced(Exception):  # noqa: N818
    """Another owner has opened an epoch. This one must drop the partition."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """The reign of one owner. ``sequence`` is that of its record in the log: everything before it
    was written by earlier owners."""

    number: int
    sequence: int
    owner: str


class FencedLog:
    """The stream ``OUT_partition``."""

    def __init__(self, client: NatsClient, layout: Layout, partition: int) -> None:
        self._client = client
        self._stream = layout.out_stream(partition)
        self._subject = layout.out_subject(partition)
        self._epoch_subject = layout.epoch_subject(partition)
        self._wakeup = layout.out_wakeup(partition)
        self._last: int | None = None
        self._appending = False

    async def open(self, owner: str) -> Epoch:
        """Open an epoch for ``owner``, in competition with other successors, however long the
        servers are unavailable."""

        async def work(nats: Nats) -> Epoch:
            retries = Retries()
            while True:
                try:
                    before, last = await asyncio.gather(
                        self._epoch(nats), nats.last_sequence(self._stream)
                    )
                    number = 1 + (before.number if before else 0)
                    headers = {
                        EPOCH: str(number),
                        _OWNER: owner,
                        # A server that was the leader may not know the latest epoch.
                        EXPECTED_SUBJECT_LAST: str(before.sequence if before else 0),
                    }
                    sequence = await self._publish(nats, self._epoch_subject, b"", headers, last)
                except NatsUnavailable as error:
                    await retries.pause(self._stream, error)
                except WrongLastSequence as error:
                    await retries.pause(self._stream, error)
                else:
                    await announce(nats, self._wakeup)
                    return Epoch(number, sequence, owner)

        self._last = None
        epoch = await self._client.call(work, None)
        self._last = epoch.sequence
        return epoch

    async def append(self, data: bytes) -> int:
        """Append a message and return its sequence. An unknown outcome is resolved by sending the
        same again. Raises :exc:`Fenced`; also after an append that was cancelled, because its
        outcome is unknown. Raises :exc:`StreamFull` and :exc:`MessageTooLarge`, after which it
        may be called again."""
        if self._appending:
            raise RuntimeError("one append at a time")
        last = self._last
        if last is None:
            raise Fenced(f"{self._stream}: no epoch is open")

        async def work(nats: Nats) -> int:
            sequence = await self._publish(nats, self._subject, data, {}, last)
            await announce(nats, self._wakeup)
            return sequence

        self._appending = True
        self._last = None
        try:
            self._last = await self._client.call(work, None)
        except WrongLastSequence as error:
            raise Fenced(f"{self._stream}: another owner has opened an epoch ({error})") from error
        except (MessageTooLarge, StreamFull):
            self._last = last
            raise
        finally:
            self._appending = False
        return self._last

    async def epoch(self) -> Epoch | None:
        """The current epoch, None if the log has none. Raises :exc:`NatsUnavailable`."""
        return await self._client.call(self._epoch)

    async def read(
        self, after: int, upto: int | None, most_bytes: int, wait_seconds: float
    ) -> list[LogMessage]:
        """The messages after sequence ``after`` and up to ``upto``, like
        :meth:`betrace.service.storage.jetstream.spans.SpanStreams.read`."""
        if upto is not None and after >= upto:
            return []
        messages = await self._client.call(
            lambda nats: read_log(
                nats, self._stream, Wakeup(self._wakeup), after, most_bytes, wait_seconds
            ),
            None,
        )
        return [each for each in messages if upto is None or each.sequence <= upto]

    async def last(self) -> int:
        """The sequence of the last message, 0 without any. Raises :exc:`NatsUnavailable`."""
        return await self._client.call(lambda nats: nats.last_sequence(self._stream))

    async def _epoch(self, nats: Nats) -> Epoch | None:
        found = await nats.leader_get(self._stream, {"last_by_subj": self._epoch_subject})
        if found is None:
            return None
        return Epoch(int(found.headers[EPOCH]), found.sequence, found.headers.get(_OWNER, ""))

    async def _publish(
        self, nats: Nats, subject: str, data: bytes, headers: dict[str, str], last: int
    ) -> int:
        """Append behind ``last``. Raises :exc:`WrongLastSequence` if someone else was first."""
        message_id = uuid.uuid4().hex
        headers = headers | {MESSAGE_ID: message_id, EXPECTED_LAST: str(last)}
        retries = Retries()
        while True:
            try:
                return await nats.publish(subject, data, headers, ATTEMPT_SECONDS)
            except NatsUnavailable as error:
                await retries.pause(self._stream, error)
            except WrongLastSequence as error:
                # The servers may have forgotten the id of an attempt that succeeded.
                try:
                    found = await nats.leader_get(self._stream, {"seq": last + 1})
                except NatsUnavailable as unavailable:
                    await retries.pause(self._stream, unavailable)
                    continue
                if found is None and EPOCH not in headers:  # it is being stored
                    await retries.pause(self._stream, error)
                elif found is not None and found.headers.get(MESSAGE_ID) == message_id:
                    return last + 1
                else:
                    raise
