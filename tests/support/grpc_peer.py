"""A gRPC connection on streams in memory, and a client of it that can break every rule."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import trio
import trio.testing
from h2.errors import ErrorCodes

from betrace.service.config.edge import Ingest
from betrace.service.receiver.admission import Admission
from betrace.service.receiver.client_errors import ClientErrors
from betrace.service.receiver.grpc.connection import GrpcConnection
from betrace.service.receiver.grpc.methods import EXPORT
from betrace.service.receiver.limits import Limits
from betrace.service.tenancy.quotas import SpanQuotas
from tests.support.http_requests import ScriptedQueue


class MemoryTransport:
    """A transport on a stream in memory."""

    peer = "192.0.2.1"

    def __init__(self, stream) -> None:
        self.stream = stream

    async def receive(self) -> bytes:
        return bytes(await self.stream.receive_some(65_536))

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def end(self) -> None:
        await self.stream.send_eof()

    async def close(self) -> None:
        await self.stream.aclose()


@dataclass
class Answer:
    """What has come back on a stream."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytes = b""
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int | None:
        value = self.trailers.get(b"grpc-status", self.headers.get(b"grpc-status"))
        return None if value is None else int(value)

    @property
    def message(self) -> str:
        return (self.trailers or self.headers).get(b"grpc-message", b"").decode()


class _Client(h2.connection.H2Connection):
    """Takes answers after GOAWAY, as gRPC's clients do."""

    def _receive_goaway_frame(self, frame):
        state = self.state_machine.state
        result = super()._receive_goaway_frame(frame)
        self.state_machine.state = state
        return result


class Peer:
    """The client's side: ``h2``, and the stream for what ``h2`` refuses to send."""

    def __init__(self, stream) -> None:
        self.stream = stream
        self.h2 = _Client(
            h2.config.H2Configuration(
                client_side=True,
                header_encoding=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.answers: dict[int, Answer] = {}
        self.events: list[h2.events.Event] = []
        self.closed = False

    async def start(self) -> None:
        """Exchange prefaces and settings."""
        self.h2.initiate_connection()
        await self.flush()
        await self.until(lambda: self.saw(h2.events.SettingsAcknowledged))

    async def flush(self) -> None:
        if data := self.h2.data_to_send():
            await self.stream.send_all(data)

    async def send_raw(self, data: bytes) -> None:
        await self.stream.send_all(data)

    def head(self, path: str = EXPORT, **more: str) -> list[tuple[bytes, bytes]]:
        """The headers of a call; an underscore in a name stands for a hyphen."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "x",
            "content-type": "application/grpc",
            "te": "trailers",
        } | {name.replace("_", "-"): value for name, value in more.items()}
        return [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]

    async def begin(self, path: str = EXPORT, *, end: bool = False, **more: str) -> int:
        """Open a call; its stream."""
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, self.head(path, **more), end_stream=end)
        await self.flush()
        return stream

    async def call(self, message: bytes = b"", path: str = EXPORT, flag: int = 0, **more) -> int:
        """Send a whole call; its stream."""
        stream = await self.begin(path, **more)
        await self.send_data(stream, prefixed(message, flag), end=True)
        return stream

    async def send_data(self, stream: int, data: bytes, end: bool = False) -> None:
        """Send DATA within the windows that the server grants."""
        while True:
            room = self.h2.local_flow_control_window(stream)
            part = data[: min(room, self.h2.max_outbound_frame_size)]
            data = data[len(part) :]
            self.h2.send_data(stream, part, end_stream=end and not data)
            await self.flush()
            if not data:
                return
            if not self.h2.local_flow_control_window(stream):
                await self.until(lambda: self.h2.local_flow_control_window(stream) > 0)

    async def answer(self, stream: int) -> Answer:
        """The answer to a call, once it is complete."""
        found = self.answers[stream]
        await self.until(lambda: found.ended or found.reset is not None)
        return found

    async def ask(self, message: bytes = b"", path: str = EXPORT, **more) -> Answer:
        """Call, and wait for the answer."""
        return await self.answer(await self.call(message, path, **more))

    def saw(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    async def goaway(self) -> tuple[ErrorCodes, str]:
        """The code and debug data of the last GOAWAY, once the server has closed."""
        await self.until(lambda: self.closed)
        (*_, last) = self.saw(h2.events.ConnectionTerminated)
        return last.error_code, (last.additional_data or b"").decode()

    async def until(self, condition: Callable[[], object], seconds: float = 1000) -> None:
        """Read until ``condition()`` holds, or the server closes."""
        with trio.fail_after(seconds):
            while not condition() and not self.closed:
                await self.read()

    async def read(self) -> None:
        """Take what comes next."""
        try:
            data = await self.stream.receive_some(65_536)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            self.closed = True
            return
        for event in self.h2.receive_data(bytes(data)):
            self.events.append(event)
            self._note(event)
        try:
            await self.flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.closed = True

    def _note(self, event: h2.events.Event) -> None:
        answer = self.answers.get(getattr(event, "stream_id", None) or 0)
        if answer is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            answer.headers = dict(event.headers)
        elif isinstance(event, h2.events.TrailersReceived):
            answer.trailers = dict(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            answer.data += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            answer.ended = True
        elif isinstance(event, h2.events.StreamReset):
            answer.reset = event.error_code


@dataclass
class Serving:
    """A connection that is served, its client, and what is behind it."""

    connection: GrpcConnection
    peer: Peer
    admission: Admission
    queue: ScriptedQueue
    errors: ClientErrors
    done: trio.Event

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(request.body) for request in self.queue.taken]


@asynccontextmanager
async def serving(
    queue: ScriptedQueue | None = None, *, start: bool = True, authenticator=None, **settings
) -> AsyncIterator[Serving]:
    """A connection, with a listener's looks at its deadline. Fails when memory stays reserved."""
    ingest = Ingest(**settings)
    queue = queue or ScriptedQueue()
    admission = Admission(ingest, queue, SpanQuotas(), authenticator)
    near, far = trio.testing.memory_stream_pair()
    errors = ClientErrors(trio.current_time)
    limits = Limits(
        ingest.keep_alive_seconds,
        ingest.head_timeout_seconds,
        ingest.body_timeout_seconds,
        ingest.max_body_bytes,
    )
    connection = GrpcConnection(MemoryTransport(near), admission, limits, errors)
    peer = Peer(far)
    done = trio.Event()

    async def look() -> None:
        while True:
            await trio.sleep(1)
            if connection.deadline <= trio.current_time():
                connection.expire()

    async def run() -> None:
        await connection.run()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        nursery.start_soon(run)
        if start:
            await peer.start()
        yield Serving(connection, peer, admission, queue, errors, done)
        await far.aclose()
        with trio.move_on_after(60):
            await done.wait()
        nursery.cancel_scope.cancel()
    assert done.is_set()
    assert admission.buffered_bytes == 0
    assert connection.deadline > -math.inf


def prefixed(message: bytes, flag: int = 0) -> bytes:
    """A message as gRPC sends it."""
    return bytes([flag]) + len(message).to_bytes(4, "big") + message
