"""The calls of one gRPC connection: each is admitted, collects its message, waits for its outcome,
and is answered. No input or output here: frames to send go to an :class:`Outbound`."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio
from h2.errors import ErrorCodes
from h2.events import RequestReceived

from betrace.service.receiver.admission import Admission
from betrace.service.receiver.client_errors import STATUSES, ClientErrors
from betrace.service.receiver.grpc import methods
from betrace.service.receiver.grpc.call import GrpcCall
from betrace.service.receiver.grpc.frames import DATA, Http2Error, Http2Frame
from betrace.service.receiver.grpc.framing import (
    PREFIX_BYTES,
    FramingError,
    GrpcCode,
    Headers,
    RpcStatus,
    TooLargeError,
    parse_timeout,
    status_of,
)
from betrace.service.receiver.grpc.outbound import Outbound
from betrace.service.receiver.heads import Head
from betrace.service.receiver.limits import SEND_SECONDS, Limits
from betrace.service.receiver.responses import MEDIA_TYPES, PROTOBUF, HttpResponse

NOT_GRPC: Final = (
    "this port takes OTLP over gRPC; for OTLP over HTTP use the port of ingest.address (4318), "
    "with gRPC use the content type application/grpc"
)
HEALTH_SECONDS: Final = 1.0  # between checks of a health that is watched

_STOPPING: Final = RpcStatus(GrpcCode.UNAVAILABLE, "the service is stopping")
_NONE: Final[Headers] = []
_TYPE: Final = (b"content-type", MEDIA_TYPES[PROTOBUF])
_ENCODINGS: Final = [(b"grpc-accept-encoding", b"identity,gzip,deflate,zstd")]
_METADATA: Final = (b"authorization", b"x-scope-orgid")


class Calls:
    """The calls in progress on a connection.

    ``peer`` returns the client's address for the log. With a ``refusal``, every call ends with it.
    ``settled`` is awaited when a call has its outcome. ``waiting_bytes`` is the size of complete
    messages that wait for the pipeline.
    """

    def __init__(
        self,
        admission: Admission,
        limits: Limits,
        errors: ClientErrors,
        peer: Callable[[], str],
        out: Outbound,
        refusal: RpcStatus | None,
        settled: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._admission = admission
        self._limits = limits
        self._errors = errors
        self._peer = peer
        self._out = out
        self._refusal = refusal
        self._settled = settled
        self._calls: dict[int, GrpcCall] = {}
        self.tasks: trio.Nursery | None = None
        self.waiting_bytes = 0
        self.last_stream = 0

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def only_watching(self) -> bool:
        """Whether no call is in progress except those that watch the health."""
        return all(call.watched for call in self._calls.values())

    @property
    def deadline(self) -> float:
        """When :meth:`end_late` is due, on Trio's clock."""
        return min((call.deadline for call in self._calls.values()), default=math.inf)

    # The way of a call.

    async def begin(self, event: RequestReceived, length: int | None) -> None:
        """A call begins: refuse it, or wait for its message, of ``length`` bytes if that is known
        already."""
        assert event.stream_id is not None
        assert event.headers is not None
        self.last_stream = event.stream_id
        fields = dict(event.headers)
        for name in _METADATA:
            if name in fields:  # perhaps repeated
                fields[name] = b", ".join(value for key, value in event.headers if key == name)
        method = fields.get(b":path", b"").decode("latin-1")
        now = trio.current_time()
        given = fields.get(b"grpc-timeout")
        timeout = math.inf if given is None else parse_timeout(given)
        export = method in methods.HTTP_PATHS
        limit = self._limits.body_bytes if export else methods.MAX_HEALTH_BYTES
        until, gives_up = now + self._limits.body, now + (timeout or 0.0)
        call = GrpcCall(event.stream_id, method, until, gives_up, limit)
        self._calls[call.id] = call
        call.received = call.h2_knows = event.stream_ended is not None
        if self._refusal is not None:
            self._finish(call, self._refusal)
        elif not _is_grpc(fields.get(b"content-type", b"")):
            self._errors.note("not gRPC", self._peer(), NOT_GRPC)
            self._out.answer_http(call, NOT_GRPC)
            self._drop(call)
        elif fields.get(b":method") != b"POST":
            self._finish(call, RpcStatus(GrpcCode.UNIMPLEMENTED, "use POST for a call"))
        elif timeout is None:
            self._finish(call, RpcStatus(GrpcCode.INVALID_ARGUMENT, "grpc-timeout is malformed"))
        elif timeout <= 0:
            self._end_late(call, now)
        elif export:
            await self._admit(call, fields, length)
        elif method not in (methods.CHECK, methods.WATCH):
            status = methods.unimplemented(method)
            self._errors.note("method", self._peer(), status.message)
            self._finish(call, status)
        if call.received and call.id in self._calls:
            self._complete(call)

    async def _admit(self, call: GrpcCall, fields: dict[bytes, bytes], length: int | None) -> None:
        headers = [_TYPE]
        if length is not None:  # refused spans are estimated from it
            headers.append((b"content-length", b"%d" % length))
        if (encoding := fields.get(b"grpc-encoding")) is not None:
            headers.append((b"content-encoding", encoding))
        headers += [(name, fields[name]) for name in _METADATA if name in fields]
        head = await self._admission.admit("POST", methods.HTTP_PATHS[call.method], headers)
        if call.id not in self._calls:
            return  # its deadline passed in the meantime
        if isinstance(head, HttpResponse):
            self._refuse(call, head)
            return
        call.head = head
        call.body = self._admission.body(head).__enter__()

    def take(self, frame: Http2Frame) -> bool:
        """Take a part of DATA; False if its call is not in progress."""
        call = self._calls.get(frame.stream)
        if call is None or call.received:
            return False
        if frame.payload and not self._feed(call, frame.payload):
            return True
        if frame.ended:
            call.received = True
            self._complete(call)
        return True

    def _feed(self, call: GrpcCall, part: memoryview) -> bool:
        """Add a part to the message; False if the call is refused for it."""
        message = call.message
        try:
            message.feed(part)
        except FramingError as error:
            if isinstance(error, TooLargeError) and call.head is not None:
                self._refuse(call, self._admission.refusals.too_large(call.head))
            else:
                self._finish(call, RpcStatus(GrpcCode.INVALID_ARGUMENT, str(error)))
            return False
        if call.body is not None:
            refusal = call.body.reserve(message.received)
            if refusal is not None:
                self._refuse(call, refusal)
                return False
        return True

    def take_trailers(self, stream: int | None) -> None:
        """The client ends a call with trailers, which HTTP/2 allows."""
        call = self._calls.get(stream or 0)
        if call is None:
            return
        if call.received:  # with DATA, which h2 has not seen
            raise Http2Error(ErrorCodes.STREAM_CLOSED, "headers after the end of a call")
        call.received = call.h2_knows = True
        self._complete(call)

    def _complete(self, call: GrpcCall) -> None:
        """The client has sent all of its call."""
        if not call.message.complete:
            text = "the message is cut short" if call.message.length else "there is no message"
            self._finish(call, RpcStatus(GrpcCode.INVALID_ARGUMENT, text))
        elif call.head is None:
            self._answer_health(call)
        else:
            assert self.tasks is not None
            head = call.head
            if head.encoding and not call.message.compressed:
                head = Head(head.tenant, head.content_type, "", head.length)
            call.processing = True
            call.scope = trio.CancelScope()
            call.deadline = min(trio.current_time() + self._admission.answer_timeout, call.timeout)
            self.waiting_bytes += call.message.received
            self.tasks.start_soon(self._process, call, head, call.scope)

    async def _process(self, call: GrpcCall, head: Head, scope: trio.CancelScope) -> None:
        message = call.message.take()
        size = len(message)
        response: HttpResponse | None = None
        try:
            with scope:
                response = await self._admission.process(head, message)
        finally:
            self.waiting_bytes -= size
            call.release()
        accepted = False
        if self._calls.get(call.id) is call:
            response = response or self._admission.refusals.unanswered(head, size)
            accepted = response.status == 200
            if not accepted:
                self._refuse(call, response)
            elif self._out.succeed(call, response.body):
                self._drop(call)
            else:
                self._wait_for_window(call)
        await self._settled(accepted)

    # Health.

    def _answer_health(self, call: GrpcCall) -> None:
        service = methods.service_name(bytes(call.message.take()))
        if service is None:
            self._finish(
                call, RpcStatus(GrpcCode.INVALID_ARGUMENT, "this is no HealthCheckRequest")
            )
        elif call.method == methods.WATCH:
            known = methods.is_known(service)
            call.processing = True
            call.watched = methods.health(self._admission) if known else methods.SERVICE_UNKNOWN
            call.deadline = min(trio.current_time() + HEALTH_SECONDS, call.timeout)
            self._out.stream(call, call.watched)
        elif not methods.is_known(service):
            self._finish(
                call, RpcStatus(GrpcCode.NOT_FOUND, f"there is no service {service[:100]}")
            )
        elif self._out.respond(call, methods.health(self._admission)):
            self._drop(call)
        else:
            self._wait_for_window(call)

    def _watch_health(self, call: GrpcCall) -> None:
        """Send the health if it has changed."""
        health = methods.health(self._admission)
        if call.watched not in (health, methods.SERVICE_UNKNOWN) and not call.unsent:
            call.watched = health
            self._out.send(call, health)

    # The end of a call.

    def _refuse(self, call: GrpcCall, response: HttpResponse) -> None:
        """End a call with what admission answers."""
        if response.status in STATUSES:
            self._errors.note(response.reason, self._peer(), response.message)
        self._finish(call, status_of(response), _ENCODINGS if response.status == 415 else _NONE)

    def _finish(self, call: GrpcCall, status: RpcStatus, more: Headers = _NONE) -> None:
        """End a call without a message."""
        self._out.finish(call, status, more)
        self._drop(call)

    def _wait_for_window(self, call: GrpcCall) -> None:
        call.deadline = min(trio.current_time() + SEND_SECONDS, call.deadline)

    def send_unsent(self) -> None:
        """The client's windows have changed."""
        for call in [call for call in self._calls.values() if call.unsent]:
            if self._out.send_unsent(call):
                self._drop(call)

    def forget(self, stream: int | None) -> None:
        """The client has cancelled a call. Queued spans are accepted nevertheless."""
        call = self._calls.get(stream or 0)
        if call is not None:
            self._drop(call)

    def _drop(self, call: GrpcCall) -> None:
        del self._calls[call.id]
        if call.scope is None:
            call.release()
        else:  # the pipeline may still have it, but not forever
            call.scope.deadline = trio.current_time() + self._admission.answer_timeout

    def end_late(self, now: float) -> None:
        """End the calls whose deadline has passed."""
        for call in [call for call in self._calls.values() if call.deadline <= now]:
            self._end_late(call, now)

    def _end_late(self, call: GrpcCall, now: float) -> None:
        if call.watched and now < call.timeout:
            call.deadline = min(now + HEALTH_SECONDS, call.timeout)
            self._watch_health(call)
        elif call.unsent:
            self._out.reset(call, ErrorCodes.CANCEL)
            self._drop(call)
        elif now >= call.timeout:
            text = "the deadline of the call has passed; its spans may still be accepted"
            self._finish(call, RpcStatus(GrpcCode.DEADLINE_EXCEEDED, text))
        elif call.scope is not None:
            call.deadline = math.inf
            call.scope.cancel()
        elif call.head is not None:
            self._refuse(call, self._admission.refusals.slow_body(call.head))
        else:
            self._finish(call, RpcStatus(GrpcCode.INVALID_ARGUMENT, "the request came too slowly"))

    def end_watches(self) -> None:
        """The service stops: end the calls that would never end."""
        for call in [call for call in self._calls.values() if call.watched]:
            self._finish(call, _STOPPING)

    def end_arriving(self) -> None:
        """The service stops: refuse the calls that are still arriving."""
        for call in list(self._calls.values()):
            if not call.processing and call.head is not None:
                self._refuse(call, self._admission.refusals.slow_body(call.head))

    def abandon(self, *, answer: bool = True) -> None:
        """Nothing more will arrive: forget the calls that are not complete; without ``answer``,
        forget all of them. Queued spans are accepted nevertheless."""
        for call in list(self._calls.values()):
            if call.scope is None or not answer:
                self._drop(call)
            else:
                call.scope.deadline = call.deadline


def announced(frame: Http2Frame | None, stream: int | None) -> int | None:
    """The length of a call's message, if ``frame`` is the DATA that it begins with."""
    if frame is None or frame.stream != stream or len(frame.payload) < PREFIX_BYTES:
        return None
    return int.from_bytes(frame.payload[1:PREFIX_BYTES], "big") if frame.kind == DATA else None


def _is_grpc(content_type: bytes) -> bool:
    return content_type in (b"application/grpc", b"application/grpc+proto")
