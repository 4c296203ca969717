"""One connection of the ingestion listener: requests in, responses out, in order.

Time limits cost nothing per request. A connection sets ``deadline`` when its state changes; the
listener checks all connections regularly and calls :meth:`Connection.expire` on those that are
late. One cancel scope is enough for the whole connection, because a missed deadline ends it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

import trio

from betrace.service.receiver.admission import Admission
from betrace.service.receiver.bodies import Body
from betrace.service.receiver.client_errors import STATUSES, ClientErrors
from betrace.service.receiver.cors import Cors
from betrace.service.receiver.grpc.connection import GrpcConnection
from betrace.service.receiver.grpc.framing import GrpcCode, RpcStatus
from betrace.service.receiver.heads import Head
from betrace.service.receiver.http1 import (
    CONTINUE,
    HEAD_END,
    HTTP2_PREFACE,
    MAX_HEAD_BYTES,
    ChunkedBody,
    NotHttpError,
    RequestHead,
    parse_head,
    render,
    too_large_head,
)
from betrace.service.receiver.known_heads import KnownHeads
from betrace.service.receiver.limits import (
    LINGER_BYTES,
    LINGER_SECONDS,
    RETIRE_SECONDS,
    SEND_SECONDS,
    Limits,
)
from betrace.service.receiver.responses import HttpResponse
from betrace.service.receiver.transport import TlsTransport, Transport

# Each call of a gRPC client at the wrong port is answered so for this long; then it must reconnect.
WRONG_PORT_SECONDS: Final = 60.0

_log = logging.getLogger("service.http")


class Connection:
    """Serves ``transport`` until either side ends it.

    ``deadline`` is the time on Trio's clock when :meth:`expire` must be called, ``slow_since`` the
    time since which part of a request is missing (infinity if none is), ``peer`` the client's
    address, and ``proven`` whether it has sent a request.
    """

    __slots__ = (
        "_admission",
        "_closing",
        "_cors",
        "_errors",
        "_heads",
        "_idle",
        "_limits",
        "_owed",
        "_processing",
        "_rest",
        "_scope",
        "_stranger",
        "_transport",
        "_unread",
        "deadline",
        "peer",
        "proven",
        "slow_since",
    )

    def __init__(
        self,
        transport: Transport,
        admission: Admission,
        limits: Limits,
        errors: ClientErrors,
        cors: Cors | None = None,
        heads: KnownHeads | None = None,
    ) -> None:
        self.peer = transport.peer
        self.proven = False
        self.slow_since = math.inf
        self._transport = transport
        self._admission = admission
        self._limits = limits
        self._errors = errors
        self._cors = cors
        self._heads = KnownHeads() if heads is None else heads
        self._scope = trio.CancelScope()
        self._rest = b""  # received and not yet used
        self._unread: int | ChunkedBody = 0  # rest of the current body: bytes, or chunks
        self._idle = True
        self._closing = False
        self._processing = False  # the request is complete, its outcome unknown
        self._stranger: GrpcConnection | None = None  # serves a client that speaks gRPC
        self._owed: Callable[[], HttpResponse] | None = None  # the answer if the deadline passes
        self.deadline = trio.current_time() + limits.idle

    # For the listener.

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        return self._idle

    def expire(self) -> None:
        """End the connection because its deadline has passed, with an answer if one is due."""
        self.deadline = math.inf
        self._scope.cancel()

    def abandon(self) -> None:
        """End the connection at once, without an answer."""
        self._owed = None
        self.expire()

    def retire(self) -> None:
        """End the connection because the service stops: soon if it is idle, otherwise once the
        request in progress is answered."""
        self._closing = True
        if self._stranger is not None:
            self._stranger.retire()
        if self._idle:
            self._scope.deadline = trio.current_time() + RETIRE_SECONDS

    def give_up(self) -> None:
        """End the connection if its request is still arriving."""
        if not self._processing:
            self.expire()

    # The life of the connection.

    async def run(self) -> None:
        """Serve requests until the end. Raises nothing, except when cancelled from outside."""
        try:
            with self._scope:
                try:
                    await self._serve()
                except NotHttpError as error:
                    response = self._admission.refusals.malformed(error.status, error.message)
                    self._note(response)
                    await self._part(response)
            if self._scope.cancelled_caught and self._owed is not None:
                with trio.move_on_after(LINGER_SECONDS):
                    await self._part(self._owed())
        except (OSError, trio.BrokenResourceError):
            pass  # the client is gone
        except Exception:
            _log.exception("a connection of the ingestion listener failed and is closed")
        finally:
            if isinstance(self._unread, ChunkedBody):
                self._unread.release()
            self._unread = 0
            self._owed = None  # it refers to this object
            await self._transport.close()

    async def _serve(self) -> None:
        if isinstance(self._transport, TlsTransport):
            self.deadline = trio.current_time() + self._limits.head
            await self._transport.handshake()
        while (block := await self._read_head()) is not None:
            if block == HTTP2_PREFACE:
                await self._refuse_http2()
                return
            if not await self._answer(block):
                break
        if self._rest:
            await self._linger()

    async def _answer(self, block: bytes) -> bool:
        """Read the body of the request with this head and answer it; returns whether the connection
        stays open."""
        admission = self._admission
        self.deadline = math.inf
        head: Head | HttpResponse | None = None
        known = self._heads.find(block)
        if known is not None:
            request, admitted = known
            self._unread = request.length or 0
            head = admission.admit_again(admitted, request.headers)
        else:
            request = parse_head(block)
            self._unread = ChunkedBody() if request.length is None else request.length
            if self._cors is not None and request.method == "OPTIONS":
                preflight = self._cors.preflight(request.path, request.headers)
                if preflight is not None:
                    return await self._refuse(request, preflight)
        if head is None:
            head = await admission.admit(request.method, request.path, request.headers)
            if isinstance(head, Head):
                self._heads.keep(block, request, head)
        if isinstance(head, HttpResponse):
            return await self._refuse(request, head)
        with admission.body(head) as memory:
            body: bytes | memoryview | HttpResponse | None
            if request.length is None:
                body = await self._read_chunks(request, head, memory)
            else:
                body = await self._read_body(request, head, memory, request.length)
            if body is None:
                return False
            if not isinstance(body, HttpResponse):
                size = len(body)
                self._owed = lambda: admission.refusals.unanswered(head, size)
                self.deadline = trio.current_time() + admission.answer_timeout
                self._processing = True
                self.slow_since = math.inf
                response = await admission.process(head, body)
                self._owed = None
                self.proven = True
                more = await self._send(request, response)
                self._processing = False
                return more
        self._owed = None
        self.slow_since = math.inf
        return await self._refuse(request, body)

    # Reading.

    async def _read_head(self) -> bytes | None:
        """The head of the next request, None at the end."""
        received = self._rest
        if received:
            await trio.lowlevel.checkpoint()  # the last request may not have waited for anything
        else:
            if self._closing:
                return None
            self._idle = True
            self.slow_since = math.inf
            self.deadline = trio.current_time() + self._limits.idle
            received = await self._transport.receive()
            if not received:
                return None
            self._idle = False
            self._scope.deadline = math.inf
        end = received.find(HEAD_END) + len(HEAD_END)
        if not len(HEAD_END) < end <= MAX_HEAD_BYTES:
            return await self._gather_head(received)
        self._rest = received[end:]
        return received[:end]

    async def _gather_head(self, received: bytes) -> bytes | None:
        """The head of a request that arrives in parts."""
        self.slow_since = trio.current_time()
        self.deadline = self.slow_since + self._limits.head
        self._owed = self._admission.refusals.slow_head
        gathered = bytearray()
        searched = 0
        while received:
            gathered += received
            while gathered.startswith(b"\r\n"):  # empty lines before a request are tolerated
                del gathered[:2]
                searched = 0
            end = gathered.find(HEAD_END, max(0, searched - 3))
            searched = len(gathered)
            if max(end + len(HEAD_END), 0 if end >= 0 else searched) > MAX_HEAD_BYTES:
                raise too_large_head()
            if end >= 0:
                end += len(HEAD_END)
                self._owed = None
                self._rest = bytes(gathered[end:])
                return bytes(gathered[:end])
            if gathered and not gathered[:1].isupper() and gathered != b"\r":
                raise NotHttpError(400, "this is not an HTTP/1.1 request; is it TLS or HTTP/2?")
            received = await self._transport.receive()
        return None

    async def _read_body(
        self, request: RequestHead, head: Head, memory: Body, length: int
    ) -> bytes | memoryview | HttpResponse | None:
        """A body of known length, or the response that refuses it; None if the client is gone."""
        received = self._rest
        refusal = memory.reserve(min(len(received), length))
        if refusal is not None:
            return refusal
        self._rest = received[length:]
        self._unread = 0
        if len(received) >= length:
            return received[:length]
        await self._begin_body(request, head, received)

        def claim(arrived: int) -> bool:
            nonlocal refusal
            refusal = memory.reserve(arrived)
            self._unread = length - arrived if refusal is not None else 0
            return refusal is None

        body = await self._transport.receive_body(received, length, claim)
        return body if refusal is None else refusal

    async def _read_chunks(
        self, request: RequestHead, head: Head, memory: Body
    ) -> memoryview | HttpResponse | None:
        """The same for a chunked body."""
        chunks = self._unread
        assert isinstance(chunks, ChunkedBody)
        received = self._rest
        await self._begin_body(request, head, received)
        while True:
            self._rest = chunks.feed(received)
            refusal = memory.reserve(len(chunks.data))
            if refusal is not None:
                return refusal
            if chunks.complete:
                self._unread = 0
                body = memoryview(chunks.data)
                chunks.release()
                return body
            received = await self._transport.receive()
            if not received:
                return None

    async def _begin_body(self, request: RequestHead, head: Head, received: bytes) -> None:
        """Set the time limit of a body that is not complete, and ask for it if the client waits."""
        self._owed = lambda: self._admission.refusals.slow_body(head)
        now = trio.current_time()
        self.slow_since = min(self.slow_since, now)
        self.deadline = now + self._limits.body
        if request.expects_continue and not received:
            await self._transport.send(CONTINUE)

    async def _discard(self) -> bool:
        """Read and drop the rest of the body; returns whether its end was reached."""
        left = self._unread
        received = self._rest
        dropped = 0
        while dropped <= LINGER_BYTES:
            if isinstance(left, ChunkedBody):
                self._rest = left.feed(received)
                left.data.clear()
                if left.complete:
                    return True
            elif len(received) >= left:
                self._rest = received[left:]
                return True
            else:
                left -= len(received)
            dropped += len(received)
            received = await self._transport.receive()
            if not received:
                break
        return False

    # Answering.

    async def _send(self, request: RequestHead, response: HttpResponse, keep: bool = True) -> bool:
        """Send a response; returns whether the connection stays open, which needs ``keep``."""
        keep = keep and request.persistent and not self._closing
        if response.status in STATUSES:
            self._note(response)
        if self._cors is not None and response.status != 204:
            response = self._cors.expose(request.headers, response)
        self.deadline = trio.current_time() + SEND_SECONDS
        data = render(response, close=not keep, bodiless=request.method == "HEAD")
        await self._transport.send(data)
        return keep

    def _note(self, response: HttpResponse) -> None:
        """Leave a line in the log about a request that its client must change."""
        if response.status in STATUSES:
            self._errors.note(response.reason, self._transport.peer, response.message)

    async def _refuse(self, request: RequestHead, response: HttpResponse) -> bool:
        """Send a response before the whole body was read; returns whether the connection stays
        open.

        It stays open if the rest of the body can be read soon. A client that waits for ``100
        Continue`` may or may not send the body, so only the client knows where the next request
        starts.
        """
        left = self._unread
        keep = isinstance(left, ChunkedBody) or left <= LINGER_BYTES
        keep = await self._send(request, response, keep and not request.expects_continue)
        self.deadline = trio.current_time() + LINGER_SECONDS
        await trio.lowlevel.checkpoint()  # this request may not have waited anywhere else
        if not keep:
            await self._linger()
            return False
        try:
            return await self._discard()
        except NotHttpError:
            return False  # the request is answered

    async def _refuse_http2(self) -> None:
        """Tell a gRPC client, in answer to each of its calls, where it belongs. (It would only
        connect again at once after GOAWAY.)"""
        message = (
            "this port takes OTLP over HTTP/1.1; send OTLP over gRPC to the port of "
            "ingest.grpc_address (4317)"
        )
        self._note(self._admission.refusals.malformed(505, message))
        self.deadline = trio.current_time() + WRONG_PORT_SECONDS
        self._stranger = GrpcConnection(
            self._transport,
            self._admission,
            self._limits,
            self._errors,
            begun=HTTP2_PREFACE + self._rest,
            refusal=RpcStatus(GrpcCode.UNIMPLEMENTED, message),
        )
        if self._closing:
            self._stranger.retire()
        await self._stranger.run()

    async def _part(self, response: HttpResponse) -> None:
        """Send a last response and end the connection."""
        self._owed = None
        self.deadline = trio.current_time() + LINGER_SECONDS
        await self._transport.send(render(response, close=True))
        await self._linger()

    async def _linger(self) -> None:
        """Signal the end to the client, and wait until it closes too."""
        self._rest = b""
        self.deadline = trio.current_time() + LINGER_SECONDS
        await self._transport.end()
        dropped = 0
        while dropped <= LINGER_BYTES and (received := await self._transport.receive()):
            dropped += len(received)
