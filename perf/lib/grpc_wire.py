"""OTLP over gRPC as a client sends it, with few CPU cycles: one call at a time on a connection.

DATA is cut into frames of 16 KiB, as Go's and JavaScript's gRPC do. Headers are compressed with a
dynamic table, so that from the second call on they are a few bytes.
"""

from __future__ import annotations

from hpack import Decoder, Encoder

from betrace.service.receiver.grpc.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    FrameReader,
    make,
)
from betrace.service.receiver.grpc.methods import EXPORT

FRAME_BYTES = 16_384
HTTP_STATUS = {0: 200, 3: 400, 7: 403, 8: 429, 12: 415, 14: 503, 16: 401}


class GrpcWire:
    """One connection. ``replies`` are frames that must be sent, such as acknowledgements."""

    def __init__(self, authority: str) -> None:
        self._fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", EXPORT.encode()),
            (b":authority", authority.encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (b"user-agent", b"betrace-load"),
        ]
        self._encoder, self._decoder = Encoder(), Decoder()
        self._frames = FrameReader()
        self._stream = -1
        self.replies = PREFACE + make(SETTINGS, 0, 0)

    def request(self, body: memoryview, tenant: str, gzip: bool) -> list[memoryview]:
        """A call with ``body`` as its message, as parts to be sent in order."""
        self._stream += 2
        fields = list(self._fields)
        if tenant:
            fields.append((b"x-scope-orgid", tenant.encode()))
        if gzip:
            fields.append((b"grpc-encoding", b"gzip"))
        block = self._encoder.encode(fields)
        prefix = bytes([gzip]) + len(body).to_bytes(4, "big")
        head = self.replies + make(HEADERS, END_HEADERS, self._stream, block)
        self.replies = b""
        parts = [memoryview(head)]
        start = 0
        while True:
            room = FRAME_BYTES - (len(prefix) if not start else 0)
            part = body[start : start + room]
            last = start + len(part) == len(body)
            length = len(part) + (len(prefix) if not start else 0)
            frame = length.to_bytes(3, "big") + bytes([DATA, END_STREAM if last else 0])
            frame += self._stream.to_bytes(4, "big")
            parts += [memoryview(frame if start else frame + prefix), part]
            start += len(part)
            if last:
                return parts

    def feed(self, received: bytes) -> int | None:
        """The HTTP status that the call's outcome amounts to, once it has one; 0 where the server
        ends the connection."""
        status = None
        for frame in self._frames.feed(received):
            if frame.kind == HEADERS:
                fields = dict(self._decoder.decode(bytes(frame.payload), raw=True))
                if frame.flags & END_STREAM and frame.stream == self._stream:
                    code = int(fields.get(b"grpc-status", b"2"))
                    status = HTTP_STATUS.get(code, 500)
            elif frame.kind == SETTINGS and not frame.flags & ACK:
                self.replies += make(SETTINGS, ACK, 0)
            elif frame.kind == PING and not frame.flags & ACK:
                self.replies += make(PING, ACK, 0, bytes(frame.payload))
            elif frame.kind == GOAWAY or (
                frame.kind == RST_STREAM and frame.stream == self._stream and status is None
            ):
                return 0
        return status
