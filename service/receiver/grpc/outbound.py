"""What a gRPC connection sends: answers to calls within the client's windows, and control frames.

Answers go through ``h2``, which compresses their headers and keeps the windows. Only a successful
export does not: its frames are always the same, so they are written as they are, and ``h2``
forgets the stream. That saves a third of what a call costs.
"""

from __future__ import annotations

import math
from typing import Final

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.settings import SettingCodes, Settings

from betrace.service.config.base import KIB
from betrace.service.receiver.grpc import frames
from betrace.service.receiver.grpc.call import GrpcCall
from betrace.service.receiver.grpc.framing import (
    OK,
    PREFIX_BYTES,
    Headers,
    RpcStatus,
    encode_message,
    success,
    trailers,
)
from betrace.service.receiver.grpc.hpack_cache import RepeatingDecoder
from betrace.service.receiver.transport import Transport

MAX_STREAMS: Final = 100
MAX_WINDOW: Final = (1 << 31) - 1
_CLOSED_STREAMS: Final = 256  # that h2 remembers

_HEAD: Final = [(b":status", b"200"), (b"content-type", b"application/grpc")]
_CONFIG: Final = H2Configuration(
    client_side=False,
    header_encoding=False,
    validate_inbound_headers=False,
    normalize_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
)


class _BoundedH2(H2Connection):
    MAX_CLOSED_STREAMS = _CLOSED_STREAMS


def new_h2(max_body: int) -> H2Connection:
    """The state of a server's connection. A stream's window fits a message of ``max_body`` bytes,
    so it is never opened further."""
    connection = _BoundedH2(_CONFIG)
    connection.decoder = RepeatingDecoder(frames.MAX_CONTROL_BYTES)
    connection.local_settings = Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            SettingCodes.MAX_HEADER_LIST_SIZE: frames.MAX_CONTROL_BYTES,
            SettingCodes.INITIAL_WINDOW_SIZE: min(max_body + 64 * KIB, MAX_WINDOW),
            SettingCodes.MAX_FRAME_SIZE: frames.MAX_FRAME_BYTES,
        },
    )
    return connection


class Outbound:
    """Collects frames in order; :meth:`flush` sends them.

    ``sending_since`` is when the send in progress began, on Trio's clock, else infinity; ``sent``
    is set, and replaced, when it ends.
    """

    def __init__(self, transport: Transport, h2: H2Connection) -> None:
        self._transport = transport
        self._h2 = h2
        self._unsent = bytearray()
        self.sending_since = math.inf
        self.sent = trio.Event()

    # Frames of the connection.

    def add(self, frame: bytes) -> None:
        """Send a frame that ``h2`` does not know of."""
        self._collect()
        self._unsent += frame

    def _collect(self) -> None:
        self._unsent += self._h2.data_to_send()

    @property
    def size(self) -> int:
        """How many bytes wait to be sent."""
        self._collect()
        return len(self._unsent)

    async def flush(self) -> None:
        """Send all frames, unless another task does so already. Raises what the transport does."""
        if self.sending_since != math.inf:
            return
        try:
            while self.size:
                data = bytes(self._unsent)
                self._unsent.clear()
                self.sending_since = trio.current_time()
                await self._transport.send(data)
        finally:
            self.sending_since = math.inf
            self.sent.set()
            self.sent = trio.Event()

    # Answers. Those that end a call return True when all of it is sent, or it is reset.

    def succeed(self, call: GrpcCall, message: bytes) -> bool:
        """End an export with ``message`` and OK."""
        h2, size = self._h2, PREFIX_BYTES + len(message)
        fits = h2.local_flow_control_window(call.id) >= size <= h2.max_outbound_frame_size
        if not fits or h2.encoder.table_size_changes:
            return self.respond(call, message)
        self.add(success(call.id, message))
        h2.outbound_flow_control_window -= size
        del h2.streams[call.id]
        return True

    def respond(self, call: GrpcCall, message: bytes) -> bool:
        """End a call with ``message`` and OK, as soon as its window allows."""
        self.stream(call, message)
        call.status = OK
        return self.send_unsent(call)

    def stream(self, call: GrpcCall, message: bytes) -> None:
        """Send the first message of a call that goes on."""
        self._tell_h2(call)
        self._h2.send_headers(call.id, _HEAD)
        self.send(call, message)

    def send(self, call: GrpcCall, message: bytes) -> None:
        """Send a further message of a call."""
        call.unsent += encode_message(message)
        self.send_unsent(call)

    def send_unsent(self, call: GrpcCall) -> bool:
        """Send as much as the client's window allows, and then the status, if there is one."""
        while call.unsent:
            room = self._h2.local_flow_control_window(call.id)
            room = min(room, self._h2.max_outbound_frame_size)
            if room <= 0:
                return False
            self._h2.send_data(call.id, call.unsent[:room])
            call.unsent = call.unsent[room:]
        if call.status is None:
            return False
        self._h2.send_headers(call.id, trailers(call.status), end_stream=True)
        self._stop_client(call)
        return True

    def finish(self, call: GrpcCall, status: RpcStatus, more: Headers) -> None:
        """End a call with a status alone, and ``more`` headers. Its client may still be sending."""
        self._tell_h2(call)
        if call.unsent:
            self.reset(call, ErrorCodes.CANCEL)
            return
        head = [] if call.watched else [*_HEAD, *more]
        self._h2.send_headers(call.id, [*head, *trailers(status)], end_stream=True)
        self._stop_client(call)

    def answer_http(self, call: GrpcCall, message: str) -> None:
        """End what is HTTP/2 but not gRPC with 415 and ``message``."""
        self._tell_h2(call)
        body = (message + "\n").encode()
        fits = self._h2.local_flow_control_window(call.id) >= len(body)
        fields = [(b":status", b"415"), (b"content-type", b"text/plain")]
        self._h2.send_headers(call.id, fields, end_stream=not fits)
        if fits:
            self._h2.send_data(call.id, body, end_stream=True)
        self._stop_client(call)

    def reset(self, call: GrpcCall, code: ErrorCodes) -> None:
        """End a call without an answer."""
        self._h2.reset_stream(call.id, code)

    def _tell_h2(self, call: GrpcCall) -> None:
        """Tell ``h2``, which does not see DATA, that the client has ended its side."""
        if call.received and not call.h2_knows:
            call.h2_knows = True
            self._h2.receive_data(frames.make(frames.DATA, frames.END_STREAM, call.id))

    def _stop_client(self, call: GrpcCall) -> None:
        """After a complete answer, make a client stop that is still sending (RFC 9113, 8.1)."""
        if not call.received:
            self.reset(call, ErrorCodes.NO_ERROR)
