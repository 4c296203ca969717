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
from betrace.service.receiver.admission import Edge, Head
from betrace.service.receiver.client_errors import STATUSES, ClientErrors
from betrace.service.receiver.grpc import calls, frames
from betrace.service.receiver.grpc.budget import Budget
from betrace.service.receiver.grpc.call import Call
from betrace.service.receiver.grpc.frames import Frame, FrameReader, Http2Error
from betrace.service.receiver.grpc.framing import (
    Code,
    FramingError,
    Headers,
    RpcStatus,
    TooLargeError,
    parse_timeout,
    status_of,
)
from betrace.service.receiver.grpc.outbound import MAX_WINDOW, Outbound, new_h2
from betrace.service.receiver.limits import (
    LINGER_SECONDS,
    RETIRE_SECONDS,
    SEND_SECONDS,
    Limits,
)
from betrace.service.receiver.responses import MEDIA_TYPES, PROTOBUF, HttpResponse
from betrace.service.receiver.transport import TlsTransport, Transport

WINDOW_BYTES: Final = 4 * MIB
MAX_UNSENT_BYTES: Final = 64 * KIB
SMALL_DATA_BYTES: Final = 256  # such frames cost more than they bring
_CHECK_SECONDS: Final = 1.0  # between looks at the health that is watched

_ENCODINGS: Final = [(b"grpc-accept-encoding", b"identity,gzip,deflate,zstd")]
_NONE: Final[Headers] = []
_TYPE: Final = (b"content-type", MEDIA_TYPES[PROTOBUF])
_NOT_GRPC: Final = (
    "this port takes OTLP over gRPC; for OTLP over HTTP use the port of ingest.address (4318), "
    "with gRPC use the content type application/grpc"
)

_log = logging.getLogger("service.grpc")


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
        self._h2 = new_h2(limits.body_bytes)
        self._out = Outbound(transport, self._h2)
        self._frames = FrameReader()
        self._budget = Budget(now)
        self._calls: dict[int, Call] = {}
        self._last_stream = 0
        self._window = WINDOW_BYTES  # what the client may send
        self._processing_bytes = 0
        self._begun = False  # the preface has come
        self._partial_since = math.inf
        self._reading = trio.CancelScope()
        self._tasks: trio.Nursery | None = None
        self._closing = False
        self._over = False  # nothing is read any more
        self._farewell = b""
        self._received = begun
        self._refusal = refusal

    # What the listener decides.

    @property
    def idle(self) -> bool:
        """Whether no call is in progress, except those that watch the health."""
        return all(call.watched for call in self._calls.values())

    def expire(self) -> None:
        """End what is late; the connection if it is idle. Before the deadline, end the connection
        if it is idle, to make room for another one."""
        now = trio.current_time()
        if now < self.deadline:
            if self.idle:
                self._leave(ErrorCodes.NO_ERROR, "the connection is idle")
            return
        if now - self._out.sending_since >= SEND_SECONDS:
            self._abort()
            return
        late = min(self._idle_until, self._partial_since + self._limits.head)
        if not self._calls and now < late:
            self.deadline = late  # what the deadline was for has ended
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
        self._note_deadline(self._out.sending_since + SEND_SECONDS)
        self._flush_soon()

    def retire(self) -> None:
        """The service stops: the connection ends once its calls are answered."""
        self._closing = True
        if not self._begun or self._tasks is None:
            self._reading.cancel()
            return
        goaway = frames.goaway(MAX_WINDOW, ErrorCodes.NO_ERROR, "the service is stopping")
        self._out.add(goaway)
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
            self._out.add(frames.window_update(0, WINDOW_BYTES - 65_535))
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
                    if self._out.send_unsent(call):
                        self._drop(call)
            elif isinstance(event, TrailersReceived):
                self._take_trailers(event.stream_id)

    def _take_trailers(self, stream: int | None) -> None:
        """The client ends a call with trailers, which gRPC does not know but HTTP/2 allows."""
        call = self._calls.get(stream or 0)
        if call is None:
            return
        if call.received:  # by DATA, which h2 has not seen
            raise Http2Error(ErrorCodes.STREAM_CLOSED, "headers after the end of a call")
        call.received = call.h2_knows = True
        self._end(call)

    def _take_ping(self, frame: Frame) -> None:
        if frame.stream or len(frame.payload) != 8:
            raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "this is not a PING")
        if not frame.flags & frames.ACK:
            self._out.add(frames.make(frames.PING, frames.ACK, 0, bytes(frame.payload)))

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
            self._out.add(frames.window_update(0, allowed - self._window))
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
        call = Call(stream, method, now + self._limits.body, now + (timeout or 0.0), limit)
        self._calls[stream] = call
        self._reading.deadline = math.inf
        self._note_deadline(call.deadline)
        call.received = call.h2_knows = event.stream_ended is not None
        if self._refusal is not None:
            self._finish(call, self._refusal)
        elif not _is_grpc(fields.get(b"content-type", b"")):
            self._errors.note("not gRPC", self._transport.peer, _NOT_GRPC)
            self._out.answer_http(call, _NOT_GRPC)
            self._drop(call)
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

    async def _admit(self, call: Call, fields: dict[bytes, bytes]) -> None:
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

    def _take_part(self, call: Call, frame: Frame) -> None:
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

    def _too_large(self, call: Call, error: TooLargeError) -> None:
        if call.head is None:
            self._finish(call, RpcStatus(Code.INVALID_ARGUMENT, str(error)))
        else:
            self._refuse(call, self._edge.too_large(call.head))

    def _end(self, call: Call) -> None:
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

    async def _process(self, call: Call, head: Head, scope: trio.CancelScope) -> None:
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
                self._succeed(call, response.body, export=True)
            else:
                self._refuse(call, response)
        if self._window < WINDOW_BYTES // 2:
            self._open_window()
        await self._flush()

    def _late(self, call: Call, now: float) -> None:
        """The deadline of a call has passed."""
        if call.method == calls.WATCH and call.watched and now < call.timeout:
            call.deadline = min(now + _CHECK_SECONDS, call.timeout)
            self._show_health(call)
        elif call.unsent:
            self._out.reset(call, ErrorCodes.CANCEL)
            self._drop(call)
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

    def _answer_health(self, call: Call) -> None:
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
            self._out.stream(call, call.watched)
        elif calls.is_known(service):
            self._succeed(call, calls.health(self._edge), export=False)
        else:
            self._finish(call, RpcStatus(Code.NOT_FOUND, f"there is no service {service[:100]}"))

    def _show_health(self, call: Call) -> None:
        """Send the health anew where it has changed."""
        health = calls.health(self._edge)
        if call.watched not in (health, calls.SERVICE_UNKNOWN) and not call.unsent:
            call.watched = health
            self._out.send(call, health)

    # Answering.

    def _refuse(self, call: Call, response: HttpResponse) -> None:
        """End a call with what admission answers."""
        if response.status in STATUSES:
            self._errors.note(response.reason, self._transport.peer, response.message)
        self._finish(call, status_of(response), _ENCODINGS if response.status == 415 else [])

    def _finish(self, call: Call, status: RpcStatus, more: Headers = _NONE) -> None:
        """End a call without a message."""
        self._out.finish(call, status, more)
        self._drop(call)

    def _succeed(self, call: Call, message: bytes, *, export: bool) -> None:
        """End a call with ``message``, now or when the client's window allows."""
        out = self._out
        if out.succeed(call, message) if export else out.respond(call, message):
            self._drop(call)
        else:
            self._wait_for_window(call)

    def _wait_for_window(self, call: Call) -> None:
        call.deadline = min(trio.current_time() + SEND_SECONDS, call.deadline)
        self._note_deadline(call.deadline)

    def _forget(self, stream: int | None) -> None:
        """The client has cancelled a call. Spans that are queued are accepted all the same."""
        call = self._calls.get(stream or 0)
        if call is not None:
            self._drop(call)

    def _drop(self, call: Call) -> None:
        """A call has ended."""
        del self._calls[call.id]
        if call.scope is None:
            call.release()
        else:  # the wait for the pipeline goes on without it, but not for ever
            call.scope.deadline = trio.current_time() + self._edge.answer_timeout
        if not self._calls:
            self._note_idle()

    def _flush_soon(self) -> None:
        if self._tasks is not None and not self._over:
            self._tasks.start_soon(self._flush)

    async def _flush(self) -> None:
        self._note_deadline(trio.current_time() + SEND_SECONDS)
        try:
            await self._out.flush()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._reading.cancel()  # the client is gone


def _is_grpc(content_type: bytes) -> bool:
    return content_type in (b"application/grpc", b"application/grpc+proto")
