"""One gRPC connection: reads frames, keeps windows and time limits, and ends.

One task reads; a call whose message is complete has a task of its own until its outcome is known
(:mod:`betrace.service.receiver.grpc.calls`). ``h2`` keeps the state of the connection and its
streams. DATA goes past it (:mod:`betrace.service.receiver.grpc.frames`), and so do PING, PRIORITY
and GOAWAY, which need no state.

Flow control: a client may always send what completes a message, within the limits for bodies, but
nothing more while ``WINDOW_BYTES`` of complete messages wait for the pipeline.
"""

from __future__ import annotations

import logging
import math
from typing import Final

import trio
from h2.errors import ErrorCodes
from h2.events import (
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError

from betrace.service.config.base import KIB, MIB
from betrace.service.receiver.admission import Admission
from betrace.service.receiver.client_errors import ClientErrors
from betrace.service.receiver.grpc import frames
from betrace.service.receiver.grpc.budget import Budget
from betrace.service.receiver.grpc.calls import NOT_GRPC, Calls, announced
from betrace.service.receiver.grpc.frames import FrameReader, Http2Error, Http2Frame
from betrace.service.receiver.grpc.framing import RpcStatus
from betrace.service.receiver.grpc.outbound import MAX_WINDOW, Outbound, new_h2
from betrace.service.receiver.limits import LINGER_SECONDS, RETIRE_SECONDS, SEND_SECONDS, Limits
from betrace.service.receiver.transport import TlsTransport, Transport

WINDOW_BYTES: Final = 4 * MIB
MAX_UNSENT_BYTES: Final = 64 * KIB
SMALL_DATA_BYTES: Final = 256  # smaller frames cost more than they carry
_FIRST_WINDOW: Final = 65_535  # RFC 9113, 6.9.2

_log = logging.getLogger("service.grpc")


class GrpcConnection:
    """Serves ``transport`` until either side ends it. ``begun`` is what was received already; with
    a ``refusal``, every call ends with it."""

    def __init__(
        self,
        transport: Transport,
        admission: Admission,
        limits: Limits,
        errors: ClientErrors,
        begun: bytes = b"",
        refusal: RpcStatus | None = None,
    ) -> None:
        self.peer = transport.peer
        self._transport = transport
        self._limits = limits
        self._errors = errors
        self._received = begun
        self._opened = now = trio.current_time()
        self._h2 = new_h2(limits.body_bytes)
        self._out = Outbound(transport, self._h2)
        self._calls = Calls(
            admission, limits, errors, lambda: transport.peer, self._out, refusal, self._settled
        )
        self._frames = FrameReader()
        self._budget = Budget(now)
        self._window = WINDOW_BYTES  # what the client may send
        self._begun = False  # the preface has come
        self._partial_since = math.inf  # a header block, or another small frame
        self._idle_until = now + limits.head
        self._reading = trio.CancelScope()
        self._tasks: trio.Nursery | None = None
        self._closing = False
        self._over = False  # nothing more is read
        self._farewell = b""

    # For the listener.

    @property
    def idle(self) -> bool:
        """Whether no call is in progress, except those that watch the health."""
        return self._calls.only_watching

    @property
    def proven(self) -> bool:
        """Whether the client has sent the preface of HTTP/2."""
        return self._begun

    @property
    def slow_since(self) -> float:
        """When the preface, or a frame that is not complete, began to arrive; else infinity."""
        return self._partial_since if self._begun else self._opened

    @property
    def deadline(self) -> float:
        """When :meth:`expire` is due, on Trio's clock."""
        if self._over:
            return math.inf
        return min(
            self._calls.deadline if self._calls else self._idle_until,
            self._partial_since + self._limits.head,
            self._out.sending_since + SEND_SECONDS,
        )

    def expire(self) -> None:
        """After the deadline, end what is late: calls, or the connection. Before it, end the
        connection if it is idle, to make room for another one."""
        now = trio.current_time()
        if self._out.sending_since + SEND_SECONDS <= now:
            self._abort()
        elif not self._calls or self._partial_since + self._limits.head <= now:
            self._leave(ErrorCodes.NO_ERROR, "the connection is idle")
        elif self._calls.deadline <= now:
            self._calls.end_late(now)
            self._note_idle()
            self._flush_soon()
        elif self.idle:
            self._leave(ErrorCodes.NO_ERROR, "the connection is idle")

    def abandon(self) -> None:
        """End the connection at once, because other connections need its place."""
        self._abort()

    def retire(self) -> None:
        """The service stops: end the connection once its calls are answered."""
        self._closing = True
        if not self._begun:
            self._reading.cancel()
            return
        goaway = frames.goaway(MAX_WINDOW, ErrorCodes.NO_ERROR, "the service is stopping")
        self._out.add(goaway)
        self._calls.end_watches()
        self._note_idle()
        self._flush_soon()

    def give_up(self) -> None:
        """Refuse the calls that are still arriving."""
        self._calls.end_arriving()
        self._note_idle()
        self._flush_soon()

    # The life of the connection.

    async def run(self) -> None:
        """Serve calls until the end. Raises nothing, except when cancelled from outside."""
        try:
            async with trio.open_nursery() as tasks:
                self._tasks = self._calls.tasks = tasks
                with self._reading:
                    await self._serve()
                self._over = True
                self._calls.abandon()
            await self._part()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        except* Exception:
            _log.exception("a connection of the gRPC listener failed and is closed")
        finally:
            self._over = True
            self._calls.abandon(answer=False)
            await self._transport.close()

    async def _serve(self) -> None:
        try:
            if isinstance(self._transport, TlsTransport):
                await self._transport.handshake()
            received = await self._read_preface()
            if received is None:
                return
            self._begun = True
            self._h2.initiate_connection()
            self._out.add(frames.window_update(0, WINDOW_BYTES - _FIRST_WINDOW))
            self._h2.receive_data(frames.PREFACE)
            self._note_idle()
            while True:
                if received:
                    await self._take(received)
                    await self._flush()
                    while self._out.size > MAX_UNSENT_BYTES:
                        await self._out.sent.wait()
                received = await self._transport.receive()
                if not received:
                    return
        except Http2Error as error:
            self._fail(error.code, str(error))
        except ProtocolError as error:
            self._h2.clear_outbound_data_buffer()
            self._fail(error.error_code, str(error))
        except (OSError, trio.BrokenResourceError):
            pass  # the client is gone; its complete calls are finished

    async def _read_preface(self) -> bytes | None:
        """What follows the preface; None if no preface came, and then the connection ends."""
        gathered = self._received
        while len(gathered) < len(frames.PREFACE):
            received = await self._transport.receive()
            if not received:
                return None
            gathered += received
            if not gathered.startswith(frames.PREFACE[: len(gathered)]):
                self._explain(gathered)
                return None
        return gathered[len(frames.PREFACE) :]

    def _explain(self, received: bytes) -> None:
        """Answer a client that does not speak HTTP/2."""
        message = NOT_GRPC
        if received[:2] == b"\x16\x03":
            message = "the client uses TLS, but this port does not; set tls.certificate and tls.key"
        elif received[:1].isupper():
            body = (message + "\n").encode()
            self._farewell = (
                b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Type: text/plain\r\n"
                b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
            )
        self._errors.note("not gRPC", self._transport.peer, message)

    def _note_idle(self) -> None:
        """If the last call has ended, the connection may stay idle from now on."""
        if not self._calls:
            now = trio.current_time()
            self._idle_until = now + self._limits.idle
            if self._closing:  # a call may be in transit
                self._reading.deadline = now + RETIRE_SECONDS

    async def _part(self) -> None:
        """Send the last frame, and wait until the client closes."""
        if self._begun and not self._farewell:
            self._farewell = frames.goaway(self._calls.last_stream, ErrorCodes.NO_ERROR)
        with trio.move_on_after(LINGER_SECONDS):
            await self._flush()
            await self._transport.send(self._farewell)
            await self._transport.end()
            while await self._transport.receive():
                pass

    def _leave(self, code: ErrorCodes, text: str) -> None:
        """Stop reading, and end the connection with GOAWAY."""
        if self._begun:
            self._farewell = frames.goaway(self._calls.last_stream, code, text)
        self._reading.cancel()

    def _fail(self, code: ErrorCodes, text: str) -> None:
        """End the connection because the client broke the protocol or asks for too much. No call
        is answered any more."""
        self._calls.abandon(answer=False)
        message = f"{text}; the connection is closed"
        self._errors.note(f"http2 {code.name}", self._transport.peer, message)
        self._leave(code, text)

    def _abort(self) -> None:
        """End the connection because the client does not take what is sent to it."""
        self._over = True
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    # Frames.

    async def _take(self, received: bytes) -> None:
        complete = self._frames.feed(received)
        for number, frame in enumerate(complete):
            kind = frame.kind
            if kind == frames.DATA:
                self._take_data(frame)
            elif kind in (frames.HEADERS, frames.CONTINUATION):
                following = complete[number + 1] if number + 1 < len(complete) else None
                await self._take_events(self._h2.receive_data(frame.raw), following)
            else:
                self._budget.spend(kind, trio.current_time())
                if kind == frames.PING:
                    self._take_ping(frame)
                elif kind == frames.GOAWAY:
                    self._closing = True
                    self._note_idle()
                elif kind <= frames.CONTINUATION and kind != frames.PRIORITY:
                    await self._take_events(self._h2.receive_data(frame.raw))
        if not self._frames.partial:
            self._partial_since = math.inf
        elif self._partial_since == math.inf or (complete and not self._frames.in_block):
            self._partial_since = trio.current_time()
        self._note_idle()

    async def _take_events(self, events: list[Event], following: Http2Frame | None = None) -> None:
        """Act on what ``h2`` saw in a frame; ``following`` is the next one that has arrived."""
        for event in events:
            if isinstance(event, RequestReceived):
                self._reading.deadline = math.inf
                await self._calls.begin(event, announced(following, event.stream_id))
            elif isinstance(event, StreamReset):
                if not event.remote_reset:  # the client made h2 do it
                    self._budget.spend(frames.RST_STREAM, trio.current_time())
                self._calls.forget(event.stream_id)
            elif isinstance(event, (WindowUpdated, RemoteSettingsChanged)):
                self._calls.send_unsent()
            elif isinstance(event, TrailersReceived):
                self._calls.take_trailers(event.stream_id)

    def _take_ping(self, frame: Http2Frame) -> None:
        if frame.stream or len(frame.payload) != 8:
            raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "a malformed PING")
        if not frame.flags & frames.ACK:
            self._out.add(frames.make(frames.PING, frames.ACK, 0, bytes(frame.payload)))

    def _take_data(self, frame: Http2Frame) -> None:
        self._window -= frame.flow_bytes
        if self._window < 0:
            raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, "more DATA than the window allows")
        taken = self._calls.take(frame)
        if len(frame.payload) < SMALL_DATA_BYTES and not (taken and frame.ended):
            self._budget.spend(frames.DATA, trio.current_time())
        if not taken and (frame.stream > self._calls.last_stream or not frame.stream % 2):
            raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "DATA for a stream that is not open")
        self._open_window()

    def _open_window(self) -> None:
        """Let the client send more, unless enough complete messages wait already."""
        if self._window < WINDOW_BYTES // 2:
            allowed = WINDOW_BYTES - self._calls.waiting_bytes
            if self._window < allowed // 2:
                self._out.add(frames.window_update(0, allowed - self._window))
                self._window = allowed

    # Sending.

    async def _settled(self, accepted: bool) -> None:
        """A call has its outcome."""
        if accepted:
            self._budget.answered()
        self._note_idle()
        self._open_window()
        await self._flush()

    def _flush_soon(self) -> None:
        if self._tasks is not None and not self._over:
            self._tasks.start_soon(self._flush)

    async def _flush(self) -> None:
        try:
            await self._out.flush()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._reading.cancel()  # the client is gone
