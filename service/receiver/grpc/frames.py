"""HTTP/2 frames (RFC 9113, section 4) as bytes: taken apart before ``h2`` sees them, and made.

``h2`` keeps the state of a connection, but it would copy every byte of a body four times and hold
each frame until it is complete. So DATA is taken out here and handed on as it arrives. What ``h2``
gets is bounded: a frame other than DATA has at most 16 KiB, and so has a header block, with its
CONTINUATION frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from h2.errors import ErrorCodes

from betrace.service.config.base import KIB

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_CONTROL_BYTES: Final = 16 * KIB
MAX_FRAME_BYTES: Final = (1 << 24) - 1
MAX_CONTINUATIONS: Final = 16

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 1
ACK: Final = 1
END_HEADERS: Final = 4
PADDED: Final = 8

_HEAD_BYTES: Final = 9
_EMPTY = memoryview(b"")


class Http2Error(Exception):
    """The connection must end: ``code`` goes into GOAWAY, and the text is its debug data."""

    def __init__(self, code: ErrorCodes, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class Http2Frame:
    """A whole frame, or a part of a DATA frame.

    ``raw`` is the whole frame as it arrived, empty for DATA. ``payload`` is without padding.
    ``flow_bytes`` is how much flow-control window a part of DATA uses. ``ended`` is set on the last
    part of a DATA frame that ends its stream.
    """

    kind: int
    flags: int
    stream: int
    payload: memoryview
    raw: memoryview = _EMPTY
    flow_bytes: int = 0
    ended: bool = False


def make(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame as bytes."""
    return b"%b%c%c%b%b" % (
        len(payload).to_bytes(3, "big"),
        kind,
        flags,
        stream.to_bytes(4, "big"),
        payload,
    )


def window_update(stream: int, increment: int) -> bytes:
    """WINDOW_UPDATE."""
    return make(WINDOW_UPDATE, 0, stream, increment.to_bytes(4, "big"))


def goaway(last_stream: int, code: int, text: str = "") -> bytes:
    """GOAWAY with ``text`` as debug data."""
    head = last_stream.to_bytes(4, "big") + code.to_bytes(4, "big")
    return make(GOAWAY, 0, 0, head + text.encode()[:1000])


class FrameReader:
    """Cuts what a client sends after the preface into frames. ``missing`` is how many bytes of a
    DATA frame are still to come."""

    __slots__ = (
        "_block",
        "_block_bytes",
        "_continuations",
        "_data",
        "_padding",
        "_rest",
        "missing",
    )

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a frame
        self._data: tuple[int, int] | None = None  # flags and stream of the DATA frame under way
        self.missing = 0
        self._padding = 0  # of the DATA frame, after its payload
        self._block = 0  # the stream whose header block is under way
        self._block_bytes = 0
        self._continuations = 0

    @property
    def in_block(self) -> bool:
        """Whether a header block has begun and is not complete."""
        return bool(self._block)

    @property
    def partial(self) -> bool:
        """Whether a header block or a frame other than DATA has begun and is not complete."""
        return bool(self._rest or self._block)

    def feed(self, received: bytes) -> list[Http2Frame]:
        """The frames, and parts of DATA frames, that are complete with ``received``. Raises
        :exc:`Http2Error`."""
        if self._rest:
            received = self._rest + received
            self._rest = b""
        view = memoryview(received)
        size = len(received)
        position = 0
        frames: list[Http2Frame] = []
        while True:
            if self._data is not None:
                position += self._take_data(view[position:], frames)
                if self._data is not None:
                    return frames
            if size - position < _HEAD_BYTES:
                break
            length = int.from_bytes(received[position : position + 3], "big")
            kind = received[position + 3]
            flags = received[position + 4]
            stream = int.from_bytes(received[position + 5 : position + 9], "big") & 0x7FFFFFFF
            if self._block:
                self._check_block(kind, stream)
            if kind == DATA:
                end = position + _HEAD_BYTES + length
                if end <= size and stream and not flags & PADDED:  # the usual case
                    payload = view[position + _HEAD_BYTES : end]
                    ended = flags & END_STREAM == END_STREAM
                    frames.append(Http2Frame(DATA, flags, stream, payload, _EMPTY, length, ended))
                    position = end
                    continue
                padded = flags & PADDED
                if padded and size - position == _HEAD_BYTES and length:
                    break  # the length of the padding is the next byte
                position += _HEAD_BYTES
                self._begin_data(
                    length, flags, stream, received[position] if padded and length else None
                )
                frame = Http2Frame(DATA, flags, stream, _EMPTY)
                if padded:
                    position += 1
                    frame.flow_bytes = 1
                if not self.missing:
                    frame.ended = bool(flags & END_STREAM)
                    self._data = None
                    frames.append(frame)
                elif padded:
                    frames.append(frame)
                continue
            if length > MAX_CONTROL_BYTES:
                raise Http2Error(
                    ErrorCodes.ENHANCE_YOUR_CALM,
                    f"a frame of type {kind} has {length} bytes; at most {MAX_CONTROL_BYTES} are "
                    "allowed, send less metadata",
                )
            end = position + _HEAD_BYTES + length
            if size < end:
                break
            if kind in (HEADERS, CONTINUATION):
                self._follow_block(kind, flags, stream, length)
            frames.append(
                Http2Frame(kind, flags, stream, view[position + 9 : end], view[position:end])
            )
            position = end
        self._rest = received[position:]
        return frames

    def _begin_data(self, length: int, flags: int, stream: int, padding: int | None) -> None:
        if not stream:
            raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "DATA belongs to a stream")
        if flags & PADDED:
            if padding is None or padding >= length:
                raise Http2Error(ErrorCodes.PROTOCOL_ERROR, "the padding is too long")
            length -= 1
            self._padding = padding
        self._data = (flags, stream)
        self.missing = length

    def _take_data(self, view: memoryview, frames: list[Http2Frame]) -> int:
        """Hand on what is there of the DATA frame; returns how many bytes that is."""
        assert self._data is not None
        flags, stream = self._data
        taken = min(self.missing, len(view))
        if not taken:
            return 0
        self.missing -= taken
        payload = view[: max(0, taken - max(0, self._padding - self.missing))]
        last = not self.missing
        ended = last and bool(flags & END_STREAM)
        frames.append(Http2Frame(DATA, flags, stream, payload, flow_bytes=taken, ended=ended))
        if last:
            self._data = None
            self._padding = 0
        return taken

    def _check_block(self, kind: int, stream: int) -> None:
        """Nothing may come between the parts of a header block (RFC 9113, 6.10)."""
        if kind != CONTINUATION or stream != self._block:
            raise Http2Error(
                ErrorCodes.PROTOCOL_ERROR, "a header block is interrupted by another frame"
            )

    def _follow_block(self, kind: int, flags: int, stream: int, length: int) -> None:
        if kind == HEADERS:
            self._block_bytes = self._continuations = 0
        else:
            self._continuations += 1
        self._block_bytes += length
        if self._block_bytes > MAX_CONTROL_BYTES or self._continuations > MAX_CONTINUATIONS:
            raise Http2Error(
                ErrorCodes.ENHANCE_YOUR_CALM,
                f"the metadata has more than {MAX_CONTROL_BYTES} bytes or {MAX_CONTINUATIONS} "
                "CONTINUATION frames; send less",
            )
        self._block = 0 if flags & END_HEADERS else stream
