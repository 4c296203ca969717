"""The file format of the span log, and how valid frames are found in damaged files.

A segment is a file header followed by frames, without gaps; all integers are little-endian::

    file header, 128 bytes              frame header, 40 bytes, then the payload
      0  magic "BTSPLOG\\n"                0  magic F7 42 54 46
      8  u16 version                      4  salt, 8 bytes, as in the file header
     10  u16 0                           12  u32 crc of all of the frame
     12  u32 day, since 1970-01-01       16  u32 crc of the frame header
     16  u64 segment number              20  i64 received, ns since 1970
     24  salt, 8 random bytes            28  u32 payload length
     32  tenant, 64 bytes, 0-padded      32  u32 accepted spans
     96  u32 crc of bytes 0 to 96        36  u8 version, u8 content type, u8 encoding, u8 0
    100  zeros                           40  payload

Checksums are CRC-32 (zlib's, computed by ISA-L). A frame's header checksum starts with the salt
and the position, so that a moved frame, or bytes that merely look like a frame (a client may send a
copy of a log file), are never mistaken for one. The checksum of the whole frame continues from
there over the payload.

A position is an int64: the segment's number times 2**32, plus the offset of the frame in it.
Positions of a tenant only increase.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from isal.isal_zlib import crc32

from betrace.service.storage.spanlog.damage import FILE_HEADER

ContentType = Literal["protobuf", "json"]
Encoding = Literal["", "gzip", "deflate", "zstd"]

VERSION = 1
FILE_HEADER_BYTES = 128
FRAME_HEADER_BYTES = 40
MAX_PAYLOAD_BYTES = 1 << 30
MAX_SEGMENT = (1 << 31) - 1

_FILE_MAGIC = b"BTSPLOG\n"
_FILE = struct.Struct("<8sHHIQ8s64s")
_MAGIC = b"\xf7BTF"
_FIELDS = struct.Struct("<qIIBBBB")
_HEADER = struct.Struct("<4s8sII")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_CONTENT_TYPES: tuple[ContentType, ...] = ("protobuf", "json")
_ENCODINGS: tuple[Encoding, ...] = ("", "gzip", "deflate", "zstd")
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """One request body as it was received: ``payload`` is still in its ``encoding``.
    ``received_ns`` is the wall clock, in nanoseconds since 1970; ``spans`` is the number of its
    spans that were accepted."""

    content_type: ContentType
    encoding: Encoding
    received_ns: int
    payload: bytes | bytearray | memoryview
    spans: int

    @property
    def stored_bytes(self) -> int:
        """The frame's size in a segment."""
        return FRAME_HEADER_BYTES + len(self.payload)


def pack_position(segment: int, offset: int) -> int:
    """The position of the frame at ``offset`` of ``segment``."""
    return segment << 32 | offset


def unpack_position(position: int) -> tuple[int, int]:
    """The segment and offset of a position."""
    return position >> 32, position & 0xFFFFFFFF


def file_header(tenant: str, day: int, segment: int, salt: bytes) -> bytes:
    """The first bytes of a segment; ``day`` counts from 1970-01-01."""
    head = _FILE.pack(_FILE_MAGIC, VERSION, 0, day, segment, salt, tenant.encode())
    return (head + _U32.pack(crc32(head))).ljust(FILE_HEADER_BYTES, b"\0")


def read_file_header(header: bytes, tenant: str, segment: int) -> bytes | None:
    """The salt of a segment, None if its header is damaged.

    Raises :exc:`ValueError` if the header is valid but belongs to another segment or tenant, or has
    a version that this program cannot read.
    """
    head = header[: _FILE.size]
    if len(header) < FILE_HEADER_BYTES or header[_FILE.size : _FILE.size + 4] != _U32.pack(
        crc32(head)
    ):
        return None
    _, version, _, _, number, salt, name = _FILE.unpack(head)
    if version != VERSION:
        raise ValueError(f"format version {version}, this program reads version {VERSION}")
    owner = name.rstrip(b"\0").decode("ascii", "replace")
    if (owner, number) != (tenant, segment):
        raise ValueError(f"the file belongs to tenant {owner}, segment {number}; move it back")
    return cast(bytes, salt)


def frame_header(frame: Frame, salt: bytes, position: int) -> bytes:
    """The header of ``frame`` for storing it at ``position``. Raises :exc:`ValueError` if the frame
    is too large."""
    if len(frame.payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a frame holds at most {MAX_PAYLOAD_BYTES} bytes")
    fields = _FIELDS.pack(
        frame.received_ns,
        len(frame.payload),
        frame.spans,
        VERSION,
        _CONTENT_TYPES.index(frame.content_type),
        _ENCODINGS.index(frame.encoding),
        0,
    )
    check = crc32(fields, crc32(salt + _U64.pack(position)))
    return _HEADER.pack(_MAGIC, salt, crc32(frame.payload, check), check) + fields


@dataclass(frozen=True, slots=True)
class Header:
    """A valid frame header."""

    salt: bytes
    crc: int
    check: int
    received_ns: int
    length: int
    spans: int
    version: int
    content_type: int
    encoding: int

    def frame(self, payload: bytes) -> Frame | str:
        """The frame with this payload, or why it is invalid."""
        if len(payload) < self.length:
            return "torn frame"
        if crc32(payload, self.check) != self.crc:
            return "damaged payload"
        if (
            self.version != VERSION
            or self.content_type >= len(_CONTENT_TYPES)
            or self.encoding >= len(_ENCODINGS)
        ):
            return f"frame of a format this program does not know (version {self.version})"
        return Frame(
            _CONTENT_TYPES[self.content_type],
            _ENCODINGS[self.encoding],
            self.received_ns,
            payload,
            self.spans,
        )


def read_header(data: bytes, position: int, salt: bytes | None) -> Header | str:
    """The frame header at the start of ``data``, or why it is invalid. Without ``salt`` (if the
    file header is damaged), the frame's own salt is trusted."""
    if len(data) < FRAME_HEADER_BYTES:
        return "torn frame header"
    magic, own, crc, check = _HEADER.unpack_from(data)
    fields = data[_HEADER.size : FRAME_HEADER_BYTES]
    if (
        magic != _MAGIC
        or (salt is not None and own != salt)
        or check != crc32(fields, crc32(own + _U64.pack(position)))
    ):
        return "damaged frame header"
    received_ns, length, spans, version, content_type, encoding, _ = _FIELDS.unpack(fields)
    return Header(own, crc, check, received_ns, length, spans, version, content_type, encoding)


class SegmentReader:
    """Finds the frames of one segment between two offsets.

    ``read(offset, length)`` returns the file's bytes, fewer only at its end. Where there is no
    valid frame, the reader searches for the next one and reports the bytes in between by calling
    ``skipped(offset, bytes, reason, lost)``, where ``lost`` are the headers that can still be read.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        tenant: str,
        segment: int,
        skipped: Callable[[int, int, str, Sequence[Header]], None],
    ) -> None:
        self._read = read
        self._segment = segment
        self._skipped = skipped
        self._base = 0
        self._block = read(0, FILE_HEADER_BYTES)
        self.salt = read_file_header(self._block, tenant, segment)
        """None if the file header is damaged, until a valid frame provides it."""

    def frames(self, start: int, end: int) -> Iterator[tuple[int, Frame]]:
        """The frames between the offsets, each with its offset, in order. ``start`` is the offset
        of a frame, or 0."""
        if self.salt is None and start < FILE_HEADER_BYTES and end > 0:
            self._skipped(0, min(FILE_HEADER_BYTES, end), FILE_HEADER, ())
        offset = max(start, FILE_HEADER_BYTES)
        bad: tuple[int, str] | None = None
        lost: list[Header] = []
        while offset < end:
            header = self._header(offset, end)
            found = header if isinstance(header, str) else self._frame(header, offset, end)
            if isinstance(found, str):
                bad = bad or (offset, found)
                if not isinstance(header, str) and self.salt is not None:
                    lost.append(header)  # its length is valid, too
                    offset = min(offset + FRAME_HEADER_BYTES + header.length, end)
                else:
                    offset = self._search(offset + 1, end)
                continue
            if bad:
                self._skipped(bad[0], offset - bad[0], bad[1], lost)
                bad, lost = None, []
            yield offset, found
            offset += found.stored_bytes
        if bad:
            self._skipped(bad[0], end - bad[0], bad[1], lost)

    def tail(self, end: int) -> tuple[int, str]:
        """How the segment ends: (``end``, "") if the last frame is whole; otherwise the offset of
        the problem and "torn" (what follows can only be the beginning of one frame) or "damaged".
        Reads only the headers, and the last frame's payload."""
        if self.salt is None:
            return 0, "damaged"
        offset, last = FILE_HEADER_BYTES, None
        while offset < end:
            data = self._read(offset, min(FRAME_HEADER_BYTES, end - offset))
            header = read_header(data, pack_position(self._segment, offset), self.salt)
            if isinstance(header, str):
                return offset, "torn" if len(data) < FRAME_HEADER_BYTES else "damaged"
            if offset + FRAME_HEADER_BYTES + header.length > end:
                return offset, "torn"
            last = offset
            offset += FRAME_HEADER_BYTES + header.length
        if last is not None:
            header = self._header(last, end)
            if isinstance(header, str) or isinstance(self._frame(header, last, end), str):
                return last, "damaged"
        return end, ""

    def _header(self, offset: int, end: int) -> Header | str:
        return read_header(
            self._bytes(offset, FRAME_HEADER_BYTES, end),
            pack_position(self._segment, offset),
            self.salt,
        )

    def _frame(self, header: Header, offset: int, end: int) -> Frame | str:
        payload = self._bytes(offset + FRAME_HEADER_BYTES, header.length, end)
        found = header.frame(payload)
        if self.salt is None and isinstance(found, Frame):
            self.salt = header.salt
        return found

    def _search(self, offset: int, end: int) -> int:
        """The offset of the next bytes that look like a frame, from ``offset`` on; or ``end``."""
        wanted = _MAGIC + (self.salt or b"")
        while offset < end:
            self._fill(offset, len(wanted))
            stop = min(len(self._block), end - self._base)
            index = self._block.find(wanted, offset - self._base, stop)
            if index >= 0:
                return self._base + index
            if self._base + stop >= end or stop < offset - self._base + len(wanted):
                return end
            offset = self._base + stop - len(wanted) + 1
        return end

    def _bytes(self, offset: int, length: int, end: int) -> bytes:
        length = max(0, min(length, end - offset))
        self._fill(offset, length)
        return self._block[offset - self._base : offset - self._base + length]

    def _fill(self, offset: int, length: int) -> None:
        """Read ``length`` bytes from ``offset`` on into the block, as far as the file has them."""
        if offset < self._base or offset + length > self._base + len(self._block):
            self._block = self._read(offset, max(length, _BLOCK))
            self._base = offset
