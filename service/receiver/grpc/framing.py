"""gRPC over HTTP/2 (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md) as bytes: length-prefixed
messages, timeouts, and statuses as trailers. No input or output here."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final

import numpy as np
from google.protobuf.any_pb2 import Any  # type: ignore[import-untyped]
from google.protobuf.duration_pb2 import Duration  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from betrace.service.receiver.responses import RPC_CODES, HttpResponse

PREFIX_BYTES: Final = 5
MAX_TEXT_CHARACTERS: Final = 1000  # of a status message: clients limit trailers to 8 KiB

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

Headers = list[tuple[bytes, bytes]]

# RFC 7541: ":status: 200" is entry 8 of the static table, "content-type" entry 31.
_SUCCESS_BLOCK = b"\x88\x0f\x10\x10application/grpc"
_SUCCESS_TRAILERS = b"\x00\x0bgrpc-status\x010"
_SUCCESS_HEAD = len(_SUCCESS_BLOCK).to_bytes(3, "big") + b"\x01\x04"  # HEADERS, END_HEADERS
_SUCCESS_TRAILERS_HEAD = len(_SUCCESS_TRAILERS).to_bytes(3, "big") + b"\x01\x05"  # END_STREAM too


class GrpcCode(IntEnum):
    """The status codes that are sent (google.rpc.GrpcCode)."""

    OK = 0
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """The outcome of a call. With ``retry_seconds`` the client may send it again then."""

    code: int
    message: str = ""
    retry_seconds: int | None = None


OK: Final = RpcStatus(GrpcCode.OK)


class FramingError(Exception):
    """What arrived is not one gRPC message; the text says why."""


class TooLargeError(FramingError):
    """The message is larger than one may be."""


class MessageReader:
    """Collects the one message of a unary call, of at most ``limit`` bytes, from the parts of its
    DATA. ``length`` is None before its prefix is complete."""

    __slots__ = ("_buffer", "_head", "_whole", "compressed", "length", "limit", "received")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.compressed = False
        self.length: int | None = None
        self.received = 0
        self._head = b""
        self._buffer: memoryview | None = None
        self._whole: memoryview | None = None

    @property
    def complete(self) -> bool:
        """Whether the whole message has arrived."""
        return self.received == self.length

    def feed(self, part: memoryview) -> None:
        """Take the next part. Raises :exc:`FramingError`."""
        if self.length is None:
            part = self._begin(part)
            if self.length is None:
                return
        end = self.received + len(part)
        if end > self.length:
            raise FramingError("more than one message was sent; a call has one")
        if self._buffer is not None:
            self._buffer[self.received : end] = part
        self.received = end

    def _begin(self, part: memoryview) -> memoryview:
        """Take the prefix; what follows it."""
        needed = PREFIX_BYTES - len(self._head)
        self._head += part[:needed]
        part = part[needed:]
        if len(self._head) < PREFIX_BYTES:
            return part
        if self._head[0] > 1:
            raise FramingError(f"the compressed flag is {self._head[0]}, not 0 or 1")
        self.compressed = bool(self._head[0])
        length = int.from_bytes(self._head[1:], "big")
        if length > self.limit:
            raise TooLargeError(f"the message is larger than {self.limit} bytes")
        self.length = length
        if len(part) >= length:
            self._whole = part[:length]  # not copied: the received bytes stay in memory
        else:
            # Its memory is not touched before bytes arrive in it.
            self._buffer = np.empty(length, np.uint8).data
        return part

    def take(self) -> memoryview:
        """The complete message, still compressed if ``compressed``."""
        whole = self._whole if self._whole is not None else self._buffer
        return whole if whole is not None else memoryview(b"")


def success(stream: int, message: bytes) -> bytes:
    """The frames of a complete answer with ``message`` and OK: HEADERS, DATA, trailers. The headers
    are literals that no dynamic table remembers, so they are the same bytes each time."""
    id = stream.to_bytes(4, "big")
    size = PREFIX_BYTES + len(message)
    return b"%b%b%b%b%b\x00%b%b%b%b%b" % (
        _SUCCESS_HEAD,
        id,
        _SUCCESS_BLOCK,
        size.to_bytes(3, "big") + b"\x00\x00",
        id,
        len(message).to_bytes(4, "big"),
        message,
        _SUCCESS_TRAILERS_HEAD,
        id,
        _SUCCESS_TRAILERS,
    )


def encode_message(message: bytes) -> bytes:
    """An uncompressed message with its prefix."""
    return b"\x00" + len(message).to_bytes(4, "big") + message


def parse_timeout(value: bytes) -> float | None:
    """The seconds of a ``grpc-timeout`` header; None where it is malformed."""
    match = _TIMEOUT.fullmatch(value)
    return int(match[1]) * _UNITS[match[2]] if match else None


def percent_encode(text: str) -> bytes:
    """``grpc-message``: UTF-8, with what is not printable ASCII, and %, as %XX."""
    raw = text[:MAX_TEXT_CHARACTERS].encode("utf-8", "replace")
    if raw.isascii() and b"%" not in raw and text.isprintable():
        return raw
    return b"".join(
        b"%c" % byte if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte for byte in raw
    )


@lru_cache(maxsize=256)
def trailers(status: RpcStatus) -> Headers:
    """The trailers of a call that ends with ``status``.

    The wait before a retry is where OTLP says, in ``grpc-status-details-bin``, and once more in
    ``google.rpc.retryinfo-bin``, where the Python exporter looks for it.
    """
    fields = [(b"grpc-status", b"%d" % status.code)]
    if status.message:
        fields.append((b"grpc-message", percent_encode(status.message)))
    if status.retry_seconds is not None:
        retry = RetryInfo(retry_delay=Duration(seconds=status.retry_seconds))
        detail = Any()
        detail.Pack(retry)
        text = status.message[:MAX_TEXT_CHARACTERS]
        details = Status(code=int(status.code), message=text, details=[detail])
        fields.append((b"grpc-status-details-bin", _binary(details.SerializeToString())))
        fields.append((b"google.rpc.retryinfo-bin", _binary(retry.SerializeToString())))
    return fields


def _binary(value: bytes) -> bytes:
    return base64.b64encode(value).rstrip(b"=")


def status_of(response: HttpResponse) -> RpcStatus:
    """The status for what :mod:`betrace.service.receiver.admission` answers. A client may send a
    request again when it gets UNAVAILABLE or RESOURCE_EXHAUSTED with a wait, as OTLP has it."""
    if response.status == 200:
        return OK
    retry = None
    for name, value in response.headers:
        if name == b"retry-after":
            retry = int(value)
    code = RPC_CODES[response.status]
    if response.status in (404, 405, 415):
        code = GrpcCode.UNIMPLEMENTED
    return RpcStatus(code, response.message, retry)
