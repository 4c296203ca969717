"""The format of the messages of ``SPANS_p``.

A message is a 12-byte header and a body::

      0  magic "BTE1"
      4  u8 kind: 1 spans, 2 tick, 3 rules marker, 4 seal
      5  u8 flags: 1 the body is compressed with zstd
      6  u16 0
      8  u32 crc of bytes 4 to 8 and of the body as stored

The body of an envelope of spans is, for each frame, u8 length of the tenant's name, the name, i64
received (ns since 1970), u32 accepted spans, u32 length, u32 crc of the frame from the name's
length to the end of its body (this field left out), and the body: an ``ExportTraceServiceRequest``
as protobuf. All frames of an envelope are compressed together, at level 1. A tenant has at most one
frame, so tenant and position identify it. The body of a rules marker is u8 length of the
tenant's name, the name, u64 revision, and the definitions. All integers are little-endian;
checksums are CRC-32.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import zstandard
from isal.isal_zlib import crc32

_MAGIC = b"BTE1"
_HEADER = struct.Struct("<4sBBHI")
_SIGNED = struct.Struct("<BBH")
_FRAME = struct.Struct("<qII")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SPANS, _TICK, _RULES, _SEAL = 1, 2, 3, 4
_COMPRESSED = 1
_LARGEST = 1 << 30

_local = threading.local()


class EnvelopeCorrupt(ValueError):  # noqa: N818
    """The message is damaged or has an unknown format."""


@dataclass(frozen=True, slots=True)
class TenantFrame:
    """Spans of one tenant: ``body`` is an ``ExportTraceServiceRequest`` as protobuf with ``spans``
    accepted spans, received at ``received_ns`` (ns since 1970)."""

    tenant: str
    received_ns: int
    spans: int
    body: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Spans:
    """Frames of different tenants."""

    frames: Sequence[TenantFrame]


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time."""


@dataclass(frozen=True, slots=True)
class RulesMarker:
    """From here on, new traces of ``tenant`` use these definitions. ``revision`` is the config
    bucket's."""

    tenant: str
    revision: int
    definitions: bytes


@dataclass(frozen=True, slots=True)
class Seal:
    """The end of the log of a former partition: what comes later belongs to its successors. The
    first seal counts."""


Envelope = Spans | Tick | RulesMarker | Seal


def pack(message: Envelope) -> bytes:
    """The message as bytes. Raises :exc:`ValueError` for two frames of a tenant."""
    if isinstance(message, Tick):
        return _checked(_TICK, 0, b"")
    if isinstance(message, Seal):
        return _checked(_SEAL, 0, b"")
    if isinstance(message, RulesMarker):
        body = _named(message.tenant) + _U64.pack(message.revision) + message.definitions
        return _checked(_RULES, _COMPRESSED, _compressor().compress(body))
    if len({frame.tenant for frame in message.frames}) < len(message.frames):
        raise ValueError("an envelope has at most one frame per tenant")
    parts: list[bytes | memoryview] = []
    for frame in message.frames:
        head = _named(frame.tenant)
        fields = _FRAME.pack(frame.received_ns, frame.spans, len(frame.body))
        crc = crc32(frame.body, crc32(fields, crc32(head)))
        parts += (head, fields, _U32.pack(crc), frame.body)
    return _checked(_SPANS, _COMPRESSED, _compressor().compress(b"".join(parts)))


def unpack(data: bytes) -> Envelope:
    """The inverse of :func:`pack`. The bodies are views of one buffer. Raises
    :exc:`EnvelopeCorrupt`."""
    if len(data) < _HEADER.size:
        raise EnvelopeCorrupt("the message is too short for an envelope")
    magic, kind, flags, zero, crc = _HEADER.unpack_from(data)
    stored = memoryview(data)[_HEADER.size :]
    if magic != _MAGIC:
        raise EnvelopeCorrupt("the message is not an envelope")
    if crc != crc32(stored, crc32(_SIGNED.pack(kind, flags, zero))):
        raise EnvelopeCorrupt("damaged envelope")
    try:
        body = memoryview(_decompressed(stored) if flags & _COMPRESSED else stored)
        if kind == _TICK:
            return Tick()
        if kind == _SEAL:
            return Seal()
        if kind == _SPANS:
            return Spans(_frames(body))
        if kind == _RULES:
            name, at = _name(body, 0)
            (revision,) = _U64.unpack_from(body, at)
            return RulesMarker(name, revision, bytes(body[at + _U64.size :]))
    except (struct.error, zstandard.ZstdError, UnicodeDecodeError, IndexError) as error:
        raise EnvelopeCorrupt(f"damaged envelope: {error}") from error
    raise EnvelopeCorrupt(f"unknown kind of envelope {kind}; was it written by a newer version?")


def _frames(body: memoryview) -> list[TenantFrame]:
    frames = []
    at = 0
    while at < len(body):
        start = at
        tenant, at = _name(body, at)
        received_ns, spans, length = _FRAME.unpack_from(body, at)
        fields_end = at + _FRAME.size
        (crc,) = _U32.unpack_from(body, fields_end)
        at = fields_end + _U32.size
        content = body[at : at + length]
        if len(content) < length or crc != crc32(content, crc32(body[start:fields_end])):
            raise EnvelopeCorrupt("damaged frame in an envelope")
        frames.append(TenantFrame(tenant, received_ns, spans, content))
        at += length
    return frames


def _checked(kind: int, flags: int, body: bytes) -> bytes:
    crc = crc32(body, crc32(_SIGNED.pack(kind, flags, 0)))
    return _HEADER.pack(_MAGIC, kind, flags, 0, crc) + body


def _named(tenant: str) -> bytes:
    name = tenant.encode()
    return bytes((len(name),)) + name


def _name(body: memoryview, at: int) -> tuple[str, int]:
    end = at + 1 + body[at]
    if end > len(body):
        raise EnvelopeCorrupt("damaged frame in an envelope")
    return str(body[at + 1 : end], "utf-8"), end


def _decompressed(stored: memoryview) -> bytes:
    size = zstandard.frame_content_size(stored)
    if not 0 <= size <= _LARGEST:
        raise EnvelopeCorrupt("the size of the envelope is missing or too large")
    return _decompressor().decompress(stored)


# zstandard's contexts are not safe for use by several threads.
def _compressor() -> zstandard.ZstdCompressor:
    found: zstandard.ZstdCompressor | None = getattr(_local, "compressor", None)
    if found is None:
        found = _local.compressor = zstandard.ZstdCompressor(level=1)
    return found


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found
