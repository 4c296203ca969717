"""Decodes the ``Content-Encoding`` of a request body, within a limit.

A few bytes can expand to gigabytes, so decompression stops as soon as the limit is exceeded. It
uses at most the limit and a few MiB of memory. gzip (RFC 1952) and deflate (RFC 1950, or RFC 1951
without the wrapper, as some clients send) are inflated by ISA-L, more than twice as fast as zlib;
zstd is RFC 8878.
"""

from __future__ import annotations

import io
from typing import Any, TypeVar

import zstandard
from isal import igzip, isal_zlib

Body = TypeVar("Body", bound=bytes | memoryview)

SUPPORTED = ("gzip", "zstd", "deflate", "identity")

_GZIP, _ZLIB, _RAW = 31, 15, -15  # window bits, which select the format in zlib

_IsalError: Any = isal_zlib.error
_IGzipFile: Any = igzip.IGzipFile

_ZSTD_WINDOW = 8 << 20  # RFC 8878 asks decoders to support this; levels up to 19 need less
_ZSTD_PIECE = 256  # bytes decompressed at once: at most 64 blocks of 128 KiB
_ZSTD_FRAMES = 1000


class EncodingError(ValueError):
    """The body cannot be decoded; the message says what to do."""


class BodyTooLarge(EncodingError):  # noqa: N818 - named for what it is, HTTP 413
    """The decoded body is larger than allowed."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(
            f"The body is larger than {max_bytes} bytes when decompressed. Send fewer spans in "
            "one request (a smaller batch), or raise the limit in the server's configuration."
        )


class BadEncoding(EncodingError):  # noqa: N818 - named for what it is, HTTP 400
    """The body is not valid in its ``Content-Encoding``."""

    def __init__(self, encoding: str, what: str) -> None:
        super().__init__(
            f"The body is not valid {encoding}: {what}. Send the whole body in its "
            "Content-Encoding, or uncompressed without that header."
        )


class UnknownEncoding(EncodingError):  # noqa: N818 - named for what it is, HTTP 415
    """A ``Content-Encoding`` that is not supported."""

    def __init__(self, encoding: str) -> None:
        super().__init__(
            f"Content-Encoding {encoding[:40]!r} is not supported. "
            f"Use one of {', '.join(SUPPORTED)}, or omit the header."
        )


def decode_body(body: Body, encoding: str, max_bytes: int) -> Body | bytes:
    """Decode ``body`` from its ``Content-Encoding``, given in any case ("" for none).

    An empty body is valid in every encoding, because some clients send the header without a body.

    Raises:
      UnknownEncoding: the encoding is not supported.
      BadEncoding: the body is damaged or truncated, or has trailing data.
      BodyTooLarge: the decoded body has more than ``max_bytes``.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        if len(body) > max_bytes:
            raise BodyTooLarge(max_bytes)
        return body
    if name in ("gzip", "x-gzip"):
        decode = _gunzip
    elif name == "zstd":
        decode = _unzstd
    elif name == "deflate":
        decode = _inflate
    else:
        raise UnknownEncoding(encoding)
    return decode(body, max_bytes) if body else b""


def _gunzip(body: bytes | memoryview, max_bytes: int) -> bytes:
    try:
        member = isal_zlib.decompressobj(_GZIP)
        data: bytes = member.decompress(body, max_bytes + 1)
        if len(data) > max_bytes:
            raise BodyTooLarge(max_bytes)
        if member.eof and member.unused_data:  # several members; join them
            data = _IGzipFile(fileobj=io.BytesIO(body)).read(max_bytes + 1)
            if len(data) > max_bytes:
                raise BodyTooLarge(max_bytes)
        elif not member.eof:
            raise BadEncoding("gzip", "it is truncated")
    except EOFError:
        raise BadEncoding("gzip", "it is truncated") from None
    except (_IsalError, OSError) as error:
        raise BadEncoding("gzip", str(error)) from None
    return data


def _inflate(body: bytes | memoryview, max_bytes: int) -> bytes:
    wrapped = len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
    if not wrapped:
        return _inflate_as(body, max_bytes, _RAW)
    try:
        return _inflate_as(body, max_bytes, _ZLIB)
    except BadEncoding as error:
        try:  # by chance, raw data can look wrapped
            return _inflate_as(body, max_bytes, _RAW)
        except BadEncoding:
            raise error from None


def _inflate_as(body: bytes | memoryview, max_bytes: int, window_bits: int) -> bytes:
    stream = isal_zlib.decompressobj(window_bits)
    try:
        data: bytes = stream.decompress(body, max_bytes + 1)
    except _IsalError as error:
        raise BadEncoding("deflate", str(error)) from None
    if len(data) > max_bytes:
        raise BodyTooLarge(max_bytes)
    if not stream.eof:
        raise BadEncoding("deflate", "it is truncated")
    if stream.unused_data:
        raise BadEncoding("deflate", "it has trailing data")
    return data


def _unzstd(body: bytes | memoryview, max_bytes: int) -> bytes:
    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    try:
        # Usually the body is one frame with its size. Everything else takes the general path, even
        # an empty frame, because this call would not check what follows it.
        if 0 < zstandard.frame_content_size(body) <= max_bytes:
            return context.decompress(body, allow_extra_data=False)
    except zstandard.ZstdError:
        pass
    return _unzstd_frames(context, body, max_bytes)


def _unzstd_frames(
    context: zstandard.ZstdDecompressor, body: bytes | memoryview, max_bytes: int
) -> bytes:
    pieces: list[bytes] = []
    size = 0
    frame = context.decompressobj()
    frames = 1
    view = memoryview(body)
    for start in range(0, len(body), _ZSTD_PIECE):
        rest: bytes | memoryview = view[start : start + _ZSTD_PIECE]
        while rest:
            if frame.eof:
                frame = context.decompressobj()
                frames += 1
                if frames > _ZSTD_FRAMES:
                    raise BadEncoding("zstd", f"it has more than {_ZSTD_FRAMES} frames")
            try:
                piece = frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise BadEncoding("zstd", _zstd_reason(error)) from None
            size += len(piece)
            if size > max_bytes:
                raise BodyTooLarge(max_bytes)
            pieces.append(piece)
            rest = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise BadEncoding("zstd", "it is truncated")
    return b"".join(pieces)


def _zstd_reason(error: zstandard.ZstdError) -> str:
    reason = str(error)
    if "too much memory" in reason:
        return f"its window is larger than {_ZSTD_WINDOW >> 20} MiB; use level 19 or lower"
    return reason
