"""One gRPC connection: calls in, answers out, many at once.

The reader is the only task that looks at what arrives; a call whose message is complete has a task
of its own until its outcome is known. ``h2`` keeps the state of the connection and of its streams;
DATA goes past it (:mod:`betrace.service.receiver.grpc.frames`), and so do PING, PRIORITY and
GOAWAY, which need no state.

Flow control: a client may always send what completes a message, within the limits for bodies. It
may not send more while ``WINDOW_BYTES`` of complete messages wait for the pipeline.

Time limits are checked once a second by the listener, which calls :meth:`GrpcConnection.expire`
when ``deadline`` has passed.
"""

from __future__ import annotations

import logging
import math
from typing import Final

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
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
from h2.settings import SettingCodes, Settings

from betrace.service.config.base import KIB, MIB
from betrace.service.receiver.admission import Body, Edge, Head
from betrace.service.receiver.client_errors import STATUSES, ClientErrors
from betrace.service.receiver.grpc import calls, frames
from betrace.service.receiver.grpc.budget import Budget
from betrace.service.receiver.grpc.frames import Frame, FrameReader, Http2Error
from betrace.service.receiver.grpc.framing import (
    OK,
    PREFIX_BYTES,
    Code,
    FramingError,
    Headers,
    MessageReader,
    RpcStatus,
    TooLargeError,
    encode_message,
    parse_timeout,
    status_of,
    success,
    trailers,
)
from betrace.service.receiver.grpc.hpack_cache import RepeatingDecoder
from betrace.service.receiver.limits import (
    LINGER_SECONDS,
    RETIRE_SECONDS,
    SEND_SECONDS,
    Limits,
)
from betrace.service.receiver.responses import MEDIA_TYPES, PROTOBUF, HttpResponse
from betrace.service.receiver.transport import TlsTransport, Transport

MAX_STREAMS: Final = 100
WINDOW_BYTES: Final = 4 * MIB
MAX_UNSENT_BYTES: Final = 64 * KIB
SMALL_DATA_BYTES: Final = 256  # such frames cost more than they bring
_CHECK_SECONDS: Final = 1.0  # between looks at the health that is watched
_GRACEFUL: Final = (1 << 31) - 1  # the last stream of a first GOAWAY
_REMEMBERED_STREAMS: Final = 256

_HEAD: Final = [(b":status", b"200"), (b"content-type", b"application/grpc")]
_ENCODINGS: Final = [(b"grpc-accept-encoding", b"identity,gzip,deflate,zstd")]
_TYPE: Final = (b"content-type", MEDIA_TYPES[PROTOBUF])
_CONFIG: Final = H2Configuration(
    client_side=False,
    header_encoding=False,
    validate_inbound_headers=False,
    normalize_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
)
_NOT_GRPC: Final = (
    "this port takes OTLP over gRPC; for OTLP over HTTP use the port of ingest.address (4318), "
    "with gRPC use the content type application/grpc"
)

_log = logging.getLogger("service.grpc")


class _H2(H2Connection):
    MAX_CLOSED_STREAMS = _REMEMBERED_STREAMS


class _Call:
    """A call under way. ``deadline`` is when the listener must look at it."""

    __slots__ = (
        "body",
        "deadline",
        "head",
        "id",
        "message",
        "method",
        "processing",
        "received",
        "scope",
        "status",
        "timeout",
        "told",
        "unsent",
        "watched",
    )

    def __init__(self, id: int, method: str, deadline: float, timeout: float, limit: int) -> None:
        self.id = id
        self.method = method
        self.deadline = min(deadline, timeout)
        self.timeout = timeout  # when the client gives up, on Trio's clock
        self.message = MessageReader(limit)
        self.head: Head | None = None
        self.body: Body | None = None
        self.received = False  # the client has ended its side
        self.told = False  # and h2 knows
        self.processing = False
        self.scope: trio.CancelScope | None = None
        self.unsent = b""  # waits for the client's window
        self.status: RpcStatus | None = None  # follows what is unsent
        self.watched = b""  # the health that was sent last

    def release(self) -> None:
        """Give back the memory that is claimed for the message."""
        if self.body is not None:
            self.body.__exit__()
            self.body = None


class GrpcConnection:
    """Serves ``transport`` until either side ends it.

    ``deadline`` is the time on Trio's clock when :meth:`expire` is due. ``begun`` is what has been
    received already; all calls end with ``refusal``, if there is one.
    """

    def __init__(
        self,
        transport: Transport,
        edge: Edge,
        limits: Limits,
        errors: ClientErrors,
        begun: bytes = b"",
        refusal: RpcStatus | None = None,
    ) -> None:
        self._transport = transport
        self._edge = edge
        self._limits = limits
        self._errors = errors
        now = trio.current_time()
        self.deadline = self._idle_until = now + limits.head
        self._h2 = _new_h2(limits.body_bytes)
        self._frames = FrameReader()
        self._budget = Budget(now)
        self._calls: dict[int, _Call] = {}
        self._last_stream = 0
        self._window = WINDOW_BYTES  # what the client may send
        self._processing_bytes = 0
        self._begun = False  # the preface has come
        self._partial_since = math.inf
        self._reading = trio.CancelScope()
        self._tasks: trio.Nursery | None = None
        self._unsent = bytearray()  # frames that h2 does not know of
        self._sending_since = math.inf
        self._sent = trio.Event()
        self._closing = False
        self._over = False  # nothing is read any more
        self._farewell = b""
        self._received = begun
        self._refusal = refusal

    # What the listener decides.

    @property
    def idle(self) -> bool:
        """Whether no call is under way."""
        return not self._calls

    def expire(self) -> None:
        """The deadline has passed: end what is late, the connection itself when it is idle."""
        now = trio.current_time()
        if now - self._sending_since >= SEND_SECONDS:
            self._abort()
            return
        if not self._calls and self.deadline <= now < min(
            self._idle_until, self._partial_since + self._limits.head
        ):
            self.deadline = self._idle_until  # what the deadline was for has ended
            return
        if not self._calls or now - self._partial_since >= self._limits.head:
            self._leave(ErrorCodes.NO_ERROR, "the connection is idle")
            return
        for call in list(self._calls.values()):
            if call.deadline <= now:
                self._late(call, now)
        if self._calls:
            self.deadline = min(call.deadline for call in self._calls.values())
        self._note_deadline(self._partial_since + self._limits.head)
        self._note_deadline(self._sending_since + SEND_SECONDS)
        self._flush_soon()

    def retire(self) -> None:
        """The service stops: the connection ends once its calls are answered."""
        self._closing = True
        if not self._begun or self._tasks is None:
            self._reading.cancel()
            return
        self._unsent += frames.goaway(_GRACEFUL, ErrorCodes.NO_ERROR, "the service is stopping")
        for call in list(self._calls.values()):
            if call.method == calls.WATCH:
                self._finish(call, RpcStatus(Code.UNAVAILABLE, "the service is stopping"))
        self._flush_soon()
        if not self._calls:
            self._note_idle()

    def give_up(self) -> None:
        """There is no more time for calls that are still arriving."""
        for call in list(self._calls.values()):
            if not call.processing and call.head is not None:
                self._refuse(call, self._edge.slow_body(call.head))
        self._flush_soon()

    # The life of the connection.

    async def run(self) -> None:
        """Serve calls until the end. Raises nothing, except when cancelled from outside."""
        try:
            async with trio.open_nursery() as tasks:
                self._tasks = tasks
                with self._reading:
                    await self._serve()
                self._over = True
                self._abandon()
            await self._part()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        except* Exception:
            _log.exception("a connection of the gRPC listener failed; it is closed")
        finally:
            self._abandon()
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
            self._unsent += self._h2.data_to_send()
            self._unsent += frames.window_update(0, WINDOW_BYTES - 65_535)
            self._h2.receive_data(frames.PREFACE)
            self._note_idle()
            while True:
                if received:
                    await self._take(received)
                    await self._flush()
                    while self._pending_bytes() > MAX_UNSENT_BYTES:
                        await self._sent.wait()
                received = await self._transport.receive()
                if not received:
                    return
        except Http2Error as fault:
            self._fail(fault.code, str(fault))
        except ProtocolError as error:
            self._h2.clear_outbound_data_buffer()
            self._fail(error.error_code, str(error))
        except (OSError, trio.BrokenResourceError):
            pass  # the client is gone; its calls are finished all the same

    def _abandon(self) -> None:
        """Nothing more will arrive: calls that are not complete end."""
        for call in list(self._calls.values()):
            if not call.processing:
                call.release()
                del self._calls[call.id]
            elif call.scope is not None:
                call.scope.deadline = call.deadline

    async def _part(self) -> None:
        """Say the last word, and wait until the client agrees."""
        if self._begun and not self._farewell:
            self._farewell = frames.goaway(self._last_stream, ErrorCodes.NO_ERROR)
        with trio.move_on_after(LINGER_SECONDS):
            await self._flush()
            await self._transport.send(self._farewell)
            await self._transport.end()
            while await self._transport.receive():
                pass

    def _leave(self, code: ErrorCodes, text: str) -> None:
        """End the connection, which has no calls or is to lose them."""
        self.deadline = math.inf
        if self._begun:
            self._farewell = frames.goaway(self._last_stream, code, text)
        self._reading.cancel()

    def _fail(self, code: ErrorCodes, text: str) -> None:
        """The client has broken the protocol or asks for too much: no call is answered any more,
        and those that wait for the pipeline are accepted all the same."""
        self._abandon()
        self._calls.clear()
        self._errors.note(
            f"http2 {code.name}", self._transport.peer, f"{text}; the connection is closed"
        )
        self._leave(code, text)

    def _abort(self) -> None:
        """The client does not take what is sent to it."""
        self.deadline = math.inf
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    def _note_deadline(self, time: float) -> None:
        if time < self.deadline:
            self.deadline = time

    def _note_idle(self) -> None:
        """The last call has ended."""
        now = trio.current_time()
        self.deadline = self._idle_until = now + self._limits.idle
        if self._closing:  # a call may be on its way
            self._reading.deadline = now + RETIRE_SECONDS

    async def _read_preface(self) -> bytes | None:
        """What follows the preface; None when there is none, and then the connection ends."""
        gathered = self._received
        while len(gathered) < len(frames.PREFACE):
            received = await self._transport.receive()
            if not received:
                return None
            gathered += received
            if not gathered.startswith(frames.PREFACE[: len(gathered)]):
                await self._explain(gathered)
                return None
        return gathered[len(frames.PREFACE) :]

    async def _explain(self, received: bytes) -> None:
        """Answer a client that does not speak HTTP/2."""
        message = _NOT_GRPC
        if received[:2] == b"\x16\x03":
            message = "a client wants TLS, but this port has none; set tls.certificate and tls.key"
        elif received[:1].isupper():
            body = (message + "\n").encode()
            self._farewell = (
                b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Type: text/plain\r\n"
                b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
            )
        self._errors.note("not gRPC", self._transport.peer, message)

    # Frames.

    async def _take(self, received: bytes) -> None:
        for frame in self._frames.feed(received):
            kind = frame.kind
            if kind == frames.DATA:
                self._take_data(frame)
            elif kind in (frames.HEADERS, frames.CONTINUATION):
                await self._take_events(self._h2.receive_data(frame.raw))
            else:
                self._budget.spend(kind, trio.current_time())
                if kind == frames.PING:
                    self._take_ping(frame)
                elif kind == frames.GOAWAY:
                    self._closing = True
                    if not self._calls:
                        self._reading.cancel()
                elif kind <= frames.CONTINUATION and kind != frames.PRIORITY:
                    await self._take_events(self._h2.receive_data(frame.raw))
        if not self._frames.partial:
            self._partial_since = math.inf
        elif self._partial_since == math.inf:
            self._partial_since = trio.current_time()
            self._note_deadline(self._partial_since + self._limits.head)

    async def _take_events(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, RequestReceived):
                await self._begin(event)
            elif isinstance(event, StreamReset):
                if not event.remote_reset:  # the client made h2 do it
                    self._budget.spend(frames.RST_STREAM, trio.current_time())
                self._forget(event.stream_id)
            elif isinstance(event, (WindowUpdated, RemoteSettingsChanged)):
                for call in [c for c in self._calls.values() if c.unsent]:
                    self._send_unsent(call)
            elif isinstance(event, TrailersReceived) and event.stream_id in self._calls:
                self._end(self._calls[event.stream_id])

    def _take_ping(self, frame: Frame) -> None:
        if frame.stream or len(frame.payload) != 8:
            raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "this is not a PING")
        if not frame.flags & frames.ACK:
            self._unsent += frames.make(frames.PING, frames.ACK, 0, bytes(frame.payload))

    def _take_data(self, frame: Frame) -> None:
        self._window -= frame.flow_bytes
        if self._window < 0:
            raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, "more was sent than the window")
        call = self._calls.get(frame.stream)
        if len(frame.payload) < SMALL_DATA_BYTES and (call is None or not frame.ended):
            self._budget.spend(frames.DATA, trio.current_time())
        if call is not None and not call.received:
            self._take_part(call, frame)
        elif frame.stream > self._last_stream or not frame.stream % 2:
            raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "DATA for a stream that is not open")
        if self._window < WINDOW_BYTES // 2:
            self._open_window()

    def _open_window(self) -> None:
        """Let the client send more, unless enough complete messages wait already."""
        allowed = WINDOW_BYTES - self._processing_bytes
        if self._window < allowed // 2:
            self._unsent += frames.window_update(0, allowed - self._window)
            self._window = allowed

    # Calls.

    async def _begin(self, event: RequestReceived) -> None:
        """A call begins: refuse it, or await its message."""
        stream = event.stream_id
        assert stream is not None
        assert event.headers is not None
        self._last_stream = stream
        fields = dict(event.headers)
        method = fields.get(b":path", b"").decode("latin-1")
        now = trio.current_time()
        given = fields.get(b"grpc-timeout")
        timeout = math.inf if given is None else parse_timeout(given)
        export = method in calls.HTTP_PATHS
        limit = self._limits.body_bytes if export else calls.MAX_HEALTH_BYTES
        call = _Call(stream, method, now + self._limits.body, now + (timeout or 0.0), limit)
        self._calls[stream] = call
        self._reading.deadline = math.inf
        self._note_deadline(call.deadline)
        call.received = call.told = event.stream_ended is not None
        if self._refusal is not None:
            self._finish(call, self._refusal)
        elif not _is_grpc(fields.get(b"content-type", b"")):
            self._answer_http(call)
        elif fields.get(b":method") != b"POST":
            self._finish(call, RpcStatus(Code.UNIMPLEMENTED, "a call is a POST"))
        elif timeout is None:
            self._finish(call, RpcStatus(Code.INVALID_ARGUMENT, "grpc-timeout is malformed"))
        elif timeout <= 0:
            self._late(call, now)
        elif export:
            await self._admit(call, fields)
        elif method not in (calls.CHECK, calls.WATCH):
            self._errors.note("method", self._transport.peer, calls.unimplemented(method).message)
            self._finish(call, calls.unimplemented(method))
        if call.received and stream in self._calls:
            self._end(call)

    async def _admit(self, call: _Call, fields: dict[bytes, bytes]) -> None:
        headers = [_TYPE]
        encoding = fields.get(b"grpc-encoding")
        if encoding is not None:
            headers.append((b"content-encoding", encoding))
        for name in (b"authorization", b"x-scope-orgid"):
            value = fields.get(name)
            if value is not None:
                headers.append((name, value))
        head = await self._edge.admit("POST", calls.HTTP_PATHS[call.method], headers)
        if call.id not in self._calls:
            return  # it was late meanwhile
        if isinstance(head, HttpResponse):
            self._refuse(call, head)
            return
        call.head = head
        call.body = self._edge.body(head).__enter__()

    def _take_part(self, call: _Call, frame: Frame) -> None:
        if frame.payload:
            message = call.message
            try:
                message.feed(frame.payload)
            except TooLargeError as error:
                self._too_large(call, error)
                return
            except FramingError as error:
                self._finish(call, RpcStatus(Code.INVALID_ARGUMENT, str(error)))
                return
            if call.body is not None:
                refusal = call.body.reserve(message.received)
                if refusal is not None:
                    self._refuse(call, refusal)
                    return
        if frame.ended:
            call.received = True
            self._end(call)

    def _too_large(self, call: _Call, error: TooLargeError) -> None:
        if call.head is None:
            self._finish(call, RpcStatus(Code.INVALID_ARGUMENT, str(error)))
        else:
            self._refuse(call, self._edge.too_large(call.head))

    def _end(self, call: _Call) -> None:
        """The client has sent all of its call."""
        if not call.message.complete:
            text = "the message is cut short" if call.message.length else "there is no message"
            self._finish(call, RpcStatus(Code.INVALID_ARGUMENT, text))
        elif call.head is None:
            self._answer_health(call)
        else:
            assert self._tasks is not None
            head = call.head
            if not call.message.compressed and head.encoding:
                head = Head(head.tenant, head.content_type, "", head.length)
            call.processing = True
            call.scope = trio.CancelScope()
            call.deadline = min(trio.current_time() + self._edge.answer_timeout, call.timeout)
            self._note_deadline(call.deadline)
            self._processing_bytes += call.message.received
            self._tasks.start_soon(self._process, call, head, call.scope)

    async def _process(self, call: _Call, head: Head, scope: trio.CancelScope) -> None:
        message = call.message.take()
        size = len(message)
        response: HttpResponse | None = None
        try:
            with scope:
                response = await self._edge.process(head, message)
        finally:
            self._processing_bytes -= size
            call.release()
        if self._calls.get(call.id) is call:
            if response is None:
                response = self._edge.unanswered(head, size)
            if response.status == 200:
                self._budget.answered()
                self._succeed(call, response.body)
            else:
                self._refuse(call, response)
        if self._window < WINDOW_BYTES // 2:
            self._open_window()
        await self._flush()

    def _late(self, call: _Call, now: float) -> None:
        """The deadline of a call has passed."""
        if call.method == calls.WATCH and call.watched and now < call.timeout:
            call.deadline = min(now + _CHECK_SECONDS, call.timeout)
            self._show_health(call)
        elif call.unsent:
            self._reset(call, ErrorCodes.CANCEL)
        elif now >= call.timeout:
            text = "the deadline of the call has passed; its spans may be accepted yet"
            self._finish(call, RpcStatus(Code.DEADLINE_EXCEEDED, text))
        elif call.scope is not None:
            call.deadline = math.inf
            call.scope.cancel()
        elif call.head is not None:
            self._refuse(call, self._edge.slow_body(call.head))
        else:
            self._finish(
                call, RpcStatus(Code.INVALID_ARGUMENT, "the request did not arrive in time")
            )

    # Health.

    def _answer_health(self, call: _Call) -> None:
        service = calls.service_name(bytes(call.message.take()))
        if service is None:
            self._finish(call, RpcStatus(Code.INVALID_ARGUMENT, "this is no HealthCheckRequest"))
        elif call.method == calls.WATCH:
            call.processing = True
            call.watched = (
                calls.health(self._edge) if calls.is_known(service) else calls.SERVICE_UNKNOWN
            )
            call.deadline = min(trio.current_time() + _CHECK_SECONDS, call.timeout)
            self._note_deadline(call.deadline)
            self._tell_h2(call)
            self._h2.send_headers(call.id, _HEAD)
            self._send_message(call, encode_message(call.watched))
        elif calls.is_known(service):
            self._respond(call, encode_message(calls.health(self._edge)), OK)
        else:
            self._finish(call, RpcStatus(Code.NOT_FOUND, f"there is no service {service[:100]}"))

    def _show_health(self, call: _Call) -> None:
        """Send the health anew where it has changed."""
        health = calls.health(self._edge)
        if call.watched not in (health, calls.SERVICE_UNKNOWN) and not call.unsent:
            call.watched = health
            self._send_message(call, encode_message(health))

    # Answering.

    def _refuse(self, call: _Call, response: HttpResponse) -> None:
        """End a call as admission has it."""
        if response.status in STATUSES:
            self._errors.note(response.reason, self._transport.peer, response.message)
        more = _ENCODINGS if response.status == 415 else []
        self._finish(call, status_of(response), more)

    def _finish(self, call: _Call, status: RpcStatus, more: Headers | None = None) -> None:
        """End a call without a message. Its client may not have sent all of it."""
        self._tell_h2(call)
        if call.unsent:
            self._reset(call, ErrorCodes.CANCEL)
            return
        if call.watched:
            self._h2.send_headers(call.id, trailers(status), end_stream=True)
        else:
            fields = [*_HEAD, *(more or []), *trailers(status)]
            self._h2.send_headers(call.id, fields, end_stream=True)
        self._close(call)

    def _answer_http(self, call: _Call) -> None:
        """Answer what is HTTP/2, but no gRPC."""
        self._errors.note("not gRPC", self._transport.peer, _NOT_GRPC)
        self._tell_h2(call)
        body = (_NOT_GRPC + "\n").encode()
        room = self._h2.local_flow_control_window(call.id) >= len(body)
        fields = [(b":status", b"415"), (b"content-type", b"text/plain")]
        self._h2.send_headers(call.id, fields, end_stream=not room)
        if room:
            self._h2.send_data(call.id, body, end_stream=True)
        self._close(call)

    def _succeed(self, call: _Call, message: bytes) -> None:
        """Answer an export. What all clients get goes past h2, whose records of the stream end
        here: that saves a third of what a call costs."""
        h2, size = self._h2, PREFIX_BYTES + len(message)
        fits = h2.local_flow_control_window(call.id) >= size <= h2.max_outbound_frame_size
        if not fits or h2.encoder.table_size_changes:
            self._respond(call, encode_message(message), OK)
            return
        self._pending_bytes()  # what h2 has to send goes first
        self._unsent += success(call.id, message)
        h2.outbound_flow_control_window -= size
        del h2.streams[call.id]
        self._drop(call)

    def _tell_h2(self, call: _Call) -> None:
        """Let h2 know that the client has ended its side, before it is answered through h2."""
        if call.received and not call.told:
            call.told = True
            self._h2.receive_data(frames.make(frames.DATA, frames.END_STREAM, call.id))

    def _respond(self, call: _Call, message: bytes, status: RpcStatus) -> None:
        self._tell_h2(call)
        self._h2.send_headers(call.id, _HEAD)
        call.status = status
        self._send_message(call, message)

    def _send_message(self, call: _Call, message: bytes) -> None:
        call.unsent += message
        self._send_unsent(call)

    def _send_unsent(self, call: _Call) -> None:
        """Send what the client's window allows, and then the status, if there is one."""
        while call.unsent:
            room = self._h2.local_flow_control_window(call.id)
            room = min(room, self._h2.max_outbound_frame_size)
            if room <= 0:
                call.deadline = min(trio.current_time() + SEND_SECONDS, call.deadline)
                self._note_deadline(call.deadline)
                return
            self._h2.send_data(call.id, call.unsent[:room])
            call.unsent = call.unsent[room:]
        if call.status is not None:
            self._h2.send_headers(call.id, trailers(call.status), end_stream=True)
            self._close(call)

    def _close(self, call: _Call) -> None:
        """All of the answer is sent."""
        if not call.received:
            # It stops a client that is still sending; RFC 9113, 8.1.
            self._h2.reset_stream(call.id, ErrorCodes.NO_ERROR)
        self._drop(call)

    def _reset(self, call: _Call, code: ErrorCodes) -> None:
        self._h2.reset_stream(call.id, code)
        self._drop(call)

    def _forget(self, stream: int | None) -> None:
        """The client has cancelled a call. What is queued is accepted all the same."""
        call = self._calls.get(stream or 0)
        if call is not None:
            self._drop(call)

    def _drop(self, call: _Call) -> None:
        del self._calls[call.id]
        if call.scope is None:
            call.release()
        else:  # its spans are accepted all the same, if that does not take too long
            call.scope.deadline = trio.current_time() + self._edge.answer_timeout
        if not self._calls:
            self._note_idle()

    # Sending.

    def _pending_bytes(self) -> int:
        self._unsent += self._h2.data_to_send()
        return len(self._unsent)

    def _flush_soon(self) -> None:
        if self._tasks is not None and not self._over:
            self._tasks.start_soon(self._flush)

    async def _flush(self) -> None:
        """Send what there is, unless another task does already."""
        if self._sending_since != math.inf:
            return
        try:
            while self._pending_bytes():
                data = bytes(self._unsent)
                self._unsent.clear()
                self._sending_since = trio.current_time()
                self._note_deadline(self._sending_since + SEND_SECONDS)
                await self._transport.send(data)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._reading.cancel()  # the client is gone
        finally:
            self._sending_since = math.inf
            self._sent.set()
            self._sent = trio.Event()


def _is_grpc(content_type: bytes) -> bool:
    return content_type in (b"application/grpc", b"application/grpc+proto")


def _new_h2(max_body: int) -> H2Connection:
    connection = _H2(_CONFIG)
    connection.decoder = RepeatingDecoder(frames.MAX_CONTROL_BYTES)
    connection.local_settings = Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            SettingCodes.MAX_HEADER_LIST_SIZE: frames.MAX_CONTROL_BYTES,
            SettingCodes.INITIAL_WINDOW_SIZE: min(max_body + 64 * KIB, _GRACEFUL),
            SettingCodes.MAX_FRAME_SIZE: frames.MAX_FRAME_BYTES,
        },
    )
    return connection
