"""Reading and appending to one stream as a log. In the thread of :class:`NatsClient`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.layout import DEDUPLICATION_SECONDS
from betrace.service.storage.jetstream.nats import MESSAGE_ID, Nats, StoredMessage
from betrace.service.storage.jetstream.wakeups import Wakeup, naming

_log = logging.getLogger("service.nats")

T = TypeVar("T")

EPOCH = "BeTrace-Epoch"

ATTEMPT_SECONDS = 2.0  # an append whose outcome is unknown for this long is sent again
_PAUSES = (0.02, 0.05, 0.1, 0.25)  # between attempts that failed at once, in seconds
POLL_SECONDS = 1.0  # a reader looks this often even if no wakeup comes
_SOON_SECONDS = 0.004  # and this soon after a wakeup that came before the message
_SCAN_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class LogMessage:
    """A message of a log. ``time_ns`` is the server's timestamp. An epoch record has its number in
    ``epoch`` and no data."""

    sequence: int
    time_ns: int
    data: bytes
    epoch: int = 0


def log_message(message: StoredMessage) -> LogMessage:
    epoch = int(message.headers.get(EPOCH, 0))
    return LogMessage(message.sequence, message.time_ns, b"" if epoch else message.data, epoch)


async def read_log(
    nats: Nats, stream: str, wakeup: Wakeup, after: int, most_bytes: int, wait_seconds: float
) -> list[LogMessage]:
    """The messages that follow ``after``, until they have ``most_bytes`` or more; empty if none
    came within ``wait_seconds``. ``wakeup`` announces appends."""

    async def read() -> list[LogMessage]:
        return [log_message(each) for each in await nats.read_after(stream, after, most_bytes)]

    return await poll(nats, wakeup, wait_seconds, read)


async def poll(
    nats: Nats, wakeup: Wakeup, wait_seconds: float, read: Callable[[], Awaitable[list[T]]]
) -> list[T]:
    """Read until there is something, at most for ``wait_seconds``: at each ``wakeup``, and without
    any from time to time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + wait_seconds
    bell = await nats.wakeups.bell(wakeup) if wait_seconds > 0 else None
    pause = POLL_SECONDS
    while True:
        count = bell.count if bell is not None else 0
        found = await read()
        left = end - loop.time()
        if found or bell is None or left <= 0:
            return found
        if await bell.wait(count, min(pause, left)):
            pause = _SOON_SECONDS
        elif pause >= left:
            return []  # the next call reads first
        else:
            pause = min(2 * pause, POLL_SECONDS)


async def announce(nats: Nats, subject: str, *numbers: int) -> None:
    """Wake the readers that wait for a message on a subject that names these numbers."""
    from nats import errors

    try:
        await nats.nc.publish(subject, naming(numbers))
    except (errors.Error, OSError) as error:
        _log.debug("no wakeup on %s: %s", subject, error)


class Retries:
    """The pauses between attempts of one append."""

    def __init__(self) -> None:
        self.attempts = 0
        self._start = asyncio.get_running_loop().time()

    async def pause(self, what: str, error: Exception) -> None:
        """Wait before the next attempt."""
        if self.attempts == 0:
            _log.info("%s: the outcome is unknown (%s); sending it again", what, error)
        await asyncio.sleep(_PAUSES[min(self.attempts, len(_PAUSES) - 1)])
        self.attempts += 1

    @property
    def ids_forgotten(self) -> bool:
        """Whether servers may have forgotten the id of the first attempt."""
        return asyncio.get_running_loop().time() - self._start > 0.75 * DEDUPLICATION_SECONDS


async def append_once(
    nats: Nats, stream: str, subject: str, data: bytes, message_id: str, known: int
) -> int:
    """Append a message and return its sequence. An unknown outcome is resolved by sending the same
    id again, until it is stored or the caller is cancelled. ``known`` is a sequence that existed
    before the first attempt. Raises :exc:`StreamFull`."""
    retries = Retries()
    headers = {MESSAGE_ID: message_id}
    while True:
        try:
            if retries.attempts and retries.ids_forgotten:
                found = await _find(nats, stream, message_id, known)
                if found:
                    return found
            return await nats.publish(subject, data, headers, ATTEMPT_SECONDS)
        except NatsUnavailable as error:
            await retries.pause(stream, error)


async def _find(nats: Nats, stream: str, message_id: str, after: int) -> int:
    """The sequence of the message with this id after ``after``; 0 if there is no such message."""
    last = await nats.last_sequence(stream)
    while after < last:
        messages = await nats.get_many(stream, {"seq": after + 1}, _SCAN_BYTES)
        for message in messages:
            if message.headers.get(MESSAGE_ID) == message_id:
                return message.sequence
        if not messages:
            raise NatsUnavailable(f"{stream}: a replica is behind")
        after = messages[-1].sequence
    return 0
