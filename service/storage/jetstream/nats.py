"""Requests to NATS servers, made in the thread of :class:`NatsClient`.

All requests share one inbox. Its messages go straight from the parser of ``nats-py`` to whoever
waits for them: no queue, so none can be dropped as a slow consumer's, and half of the CPU time of
``JetStreamContext.publish``.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from betrace.service.storage.jetstream.errors import (
    JetStreamError,
    LogGap,
    MessageTooLarge,
    NatsUnavailable,
    NotInStream,
    reply_error,
)
from betrace.service.storage.jetstream.wakeups import Sink, Wakeups

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from betrace.service.storage.jetstream.connection import NatsConnection

API = "$JS.API"
MESSAGE_ID = "Nats-Msg-Id"
EXPECTED_LAST = "Nats-Expected-Last-Sequence"
EXPECTED_SUBJECT_LAST = "Nats-Expected-Last-Subject-Sequence"
REQUEST_SECONDS = 5.0

_MOST_MESSAGES = 1000  # the servers' limit for one request


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of a stream, with its headers. ``time_ns`` is the server's timestamp."""

    subject: str
    sequence: int
    time_ns: int
    headers: Mapping[str, str]
    data: bytes


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to be appended to the stream of its subject."""

    subject: str
    data: bytes
    headers: dict[str, str]


class Nats:
    """A connection. All methods belong to the thread of its event loop."""

    def __init__(self, nc: NatsConnection) -> None:
        self.nc = nc
        self._loop = asyncio.get_running_loop()
        self._inbox = nc.new_inbox() + "."
        self._tokens = itertools.count()
        self._waiting: dict[str, _Replies | _Acknowledgement] = {}
        self.wakeups = Wakeups(nc)
        self.failing_since: float | None = None
        """When leaders stopped answering, on the loop's clock; None while they answer."""

    async def start(self) -> None:
        """Subscribe to the inbox."""
        await self.nc.subscribe(f"{self._inbox}*", future=Sink(self._received))

    def _received(self, message: Msg) -> None:
        replies = self._waiting.get(message.subject[len(self._inbox) :])
        if replies is not None:
            replies.add(message)

    def connection_lost(self) -> None:
        """Fail all requests: their replies will not come."""
        for replies in list(self._waiting.values()):
            replies.fail(NatsUnavailable("the connection to the NATS server was lost"))

    def failing_seconds(self) -> float:
        """For how long no leader has answered; a replica that answers may be cut off from it."""
        return 0.0 if self.failing_since is None else self._loop.time() - self.failing_since

    async def _ask_leader(
        self, subject: str, data: bytes, headers: dict[str, str] | None, seconds: float
    ) -> Msg:
        try:
            reply = await self.request(subject, data, headers, seconds)
        except NatsUnavailable:
            if self.failing_since is None:
                self.failing_since = self._loop.time()
            raise
        self.failing_since = None
        return reply

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        headers: dict[str, str] | None = None,
        seconds: float = REQUEST_SECONDS,
    ) -> Msg:
        """The first reply to a request. Raises :exc:`NatsUnavailable`."""
        replies = await self._ask(subject, data, headers, seconds, lambda message: True)
        reply = replies[0]
        if not reply.data and reply.headers and reply.headers.get("Status") == "503":
            raise NatsUnavailable(f"no server answers on {subject}: there is no leader")
        return reply

    async def _ask(
        self,
        subject: str,
        data: bytes,
        headers: dict[str, str] | None,
        seconds: float,
        is_last: Callable[[Msg], bool],
    ) -> list[Msg]:
        from nats import errors

        if not self.nc.is_connected:
            raise NatsUnavailable("there is no connection to a NATS server")
        token = str(next(self._tokens))
        replies = self._waiting[token] = _Replies(self._loop, subject, seconds, is_last)
        try:
            await self.nc.publish(subject, data, self._inbox + token, headers)
            return await replies.future
        except errors.MaxPayloadError as error:
            raise MessageTooLarge(
                f"a message of {len(data)} bytes exceeds max_payload of the NATS servers "
                f"({self.nc.max_payload} bytes)"
            ) from error
        except (errors.Error, OSError) as error:
            raise NatsUnavailable(f"NATS is not available: {error}") from error
        finally:
            replies.timer.cancel()
            del self._waiting[token]

    async def api(
        self, name: str, body: Mapping[str, Any] | None = None, seconds: float = REQUEST_SECONDS
    ) -> dict[str, Any]:
        """The reply to a request to the JetStream API, such as ``STREAM.INFO.x``."""
        data = orjson.dumps(body) if body is not None else b""
        reply = await self._ask_leader(f"{API}.{name}", data, None, seconds)
        found: dict[str, Any] = orjson.loads(reply.data)
        if "error" in found:
            raise reply_error(found["error"], name)
        return found

    async def publish(
        self,
        subject: str,
        data: bytes,
        headers: dict[str, str],
        seconds: float = REQUEST_SECONDS,
    ) -> int:
        """Append a message to the stream of ``subject``; the sequence at which it is stored."""
        reply = await self._ask_leader(subject, data, headers, seconds)
        try:
            found = orjson.loads(reply.data)
            if "error" not in found:
                return int(found["seq"])
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise JetStreamError(f"{subject}: the reply is not JetStream's") from error
        raise reply_error(found["error"], subject)

    async def publish_each(
        self,
        messages: Sequence[NewMessage],
        ended: Callable[[int, int | None], None],
        seconds: float,
    ) -> None:
        """Append messages, which costs half as much as :meth:`publish` for each. ``ended`` is
        called with the number of each one and its sequence, or None if it was not acknowledged
        within ``seconds`` or was refused: publish it again with the same id to learn why."""
        from nats import errors

        batch = _Acknowledgements(self._loop, len(messages), ended)
        tokens: list[str] = []
        timer = self._loop.call_later(seconds, batch.expire)
        try:
            for number, message in enumerate(messages):
                token = str(next(self._tokens))
                tokens.append(token)
                self._waiting[token] = _Acknowledgement(batch, number)
                try:
                    await self.nc.publish(
                        message.subject, message.data, self._inbox + token, message.headers
                    )
                except (errors.Error, OSError):
                    batch.end(number, None)
            await batch.all_ended
        finally:
            timer.cancel()
            for token in tokens:
                del self._waiting[token]
        if batch.stored:
            self.failing_since = None

    async def last_sequence(self, stream: str) -> int:
        """The sequence of the last message that the stream's leader has, 0 without any."""
        info = await self.api(f"STREAM.INFO.{stream}")
        return int(info["state"]["last_seq"])

    async def leader_get(self, stream: str, body: Mapping[str, Any]) -> StoredMessage | None:
        """The message that the leader has: ``{"seq": n}`` or ``{"last_by_subj": subject}``; None if
        it has none. Unlike :meth:`get`, never stale."""
        try:
            found = (await self.api(f"STREAM.MSG.GET.{stream}", body))["message"]
        except NotInStream:
            return None
        return StoredMessage(
            found["subject"],
            int(found["seq"]),
            server_time_ns(found["time"]),
            _headers(base64.b64decode(found.get("hdrs", ""))),
            base64.b64decode(found.get("data", "")),
        )

    async def get(self, stream: str, sequence: int) -> StoredMessage:
        """The message at ``sequence`` of any replica. Raises :exc:`NotInStream`: a replica may be
        behind."""
        reply = await self.request(f"{API}.DIRECT.GET.{stream}", orjson.dumps({"seq": sequence}))
        _raise_for_status(reply, stream)
        return _stored(reply)

    async def get_many(
        self,
        stream: str,
        body: Mapping[str, Any],
        most_bytes: int,
    ) -> list[StoredMessage]:
        """Messages of any replica in order, until they have ``most_bytes`` or more; empty if it
        has none. ``body`` says where to begin (``seq``) and what to filter (``next_by_subj``)."""
        wanted = {"batch": _MOST_MESSAGES, "max_bytes": most_bytes} | dict(body)
        replies = await self._ask(
            f"{API}.DIRECT.GET.{stream}", orjson.dumps(wanted), None, REQUEST_SECONDS, _is_end
        )
        end = replies.pop()
        if not replies:
            try:
                _raise_for_status(end, stream)
            except NotInStream:
                return []
        return [_stored(each) for each in replies]

    async def read_after(self, stream: str, after: int, most_bytes: int) -> list[StoredMessage]:
        """The messages that follow ``after``. Raises :exc:`LogGap` if one of them is missing."""
        messages = await self.get_many(stream, {"seq": after + 1}, most_bytes)
        expected = after + 1
        for message in messages:
            if message.sequence != expected:
                raise LogGap(stream, expected, message.sequence)
            expected += 1
        return messages


class _Replies:
    """Collects the replies to a request. It expires after ``seconds`` without any."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        subject: str,
        seconds: float,
        is_last: Callable[[Msg], bool],
    ) -> None:
        self.future: asyncio.Future[list[Msg]] = loop.create_future()
        self.timer = loop.call_later(seconds, self._expire)
        self._loop = loop
        self._subject = subject
        self._seconds = seconds
        self._is_last = is_last
        self._messages: list[Msg] = []
        self._seen = 0

    def add(self, message: Msg) -> None:
        if not self.future.done():
            self._messages.append(message)
            if self._is_last(message):
                self.future.set_result(self._messages)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def _expire(self) -> None:
        if len(self._messages) > self._seen:
            self._seen = len(self._messages)
            self.timer = self._loop.call_later(self._seconds, self._expire)
        else:
            self.fail(NatsUnavailable(f"no reply on {self._subject} within {self._seconds:g} s"))


class _Acknowledgements:
    """The acknowledgements of messages that were published together."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        number: int,
        ended: Callable[[int, int | None], None],
    ) -> None:
        self.all_ended: asyncio.Future[None] = loop.create_future()
        self.stored = False
        self._left = set(range(number))
        self._ended = ended
        if not number:
            self.all_ended.set_result(None)

    def end(self, number: int, sequence: int | None) -> None:
        if number in self._left:
            self._left.discard(number)
            self.stored = self.stored or sequence is not None
            self._ended(number, sequence)
            if not self._left and not self.all_ended.done():
                self.all_ended.set_result(None)

    def expire(self) -> None:
        for number in list(self._left):
            self.end(number, None)


class _Acknowledgement:
    """Waits for one of them."""

    __slots__ = ("_batch", "_number")

    def __init__(self, batch: _Acknowledgements, number: int) -> None:
        self._batch = batch
        self._number = number

    def add(self, message: Msg) -> None:
        sequence = None
        with suppress(orjson.JSONDecodeError, KeyError, TypeError):
            found = orjson.loads(message.data)
            sequence = None if "error" in found else int(found["seq"])
        self._batch.end(self._number, sequence)

    def fail(self, error: Exception) -> None:
        self._batch.end(self._number, None)


def _is_end(message: Msg) -> bool:
    return not message.data and message.headers is not None and "Status" in message.headers


def _raise_for_status(message: Msg, stream: str) -> None:
    if not _is_end(message):
        return
    assert message.headers is not None
    status = message.headers["Status"]
    if status == "503":
        raise NatsUnavailable(f"{stream}: no server answers; it does not exist, or is not up yet")
    text = f"{stream}: {message.headers.get('Description', status)}"
    if status == "404":
        raise NotInStream(text)
    if status == "408":
        raise NatsUnavailable(text)
    if status != "204":
        raise JetStreamError(text)


def _stored(message: Msg) -> StoredMessage:
    headers = message.headers
    assert headers is not None
    return StoredMessage(
        headers["Nats-Subject"],
        int(headers["Nats-Sequence"]),
        server_time_ns(headers["Nats-Time-Stamp"]),
        headers,
        message.data,
    )


def _headers(raw: bytes) -> dict[str, str]:
    lines = raw.decode("utf-8", "replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name: value.strip() for name, _, value in pairs}


def server_time_ns(text: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time in UTC, as servers write it."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(f"{whole}+00:00").timestamp())
    return seconds * 1_000_000_000 + int(fraction.ljust(9, "0") or 0)
