"""A kernel that copies the spans of some traces out of a request, without scanning the others.

The result is a request again: every message keeps its fields in their order, except that spans of
other traces are missing, and scopes and resources without spans. Lengths of messages that became
shorter are written as varints of five bytes. The bytes must have passed the scanner.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from betrace.service.jit import lean_kernel
from betrace.service.otlp.attributes import skip
from betrace.service.otlp.columns import Bytes
from betrace.service.otlp.encoding import Body
from betrace.service.otlp.primitives import (
    BYTES_TYPE,
    copy_bytes,
    load64_big,
    read_length,
    read_tag,
)

RESOURCE_SPANS = 1 << 3 | BYTES_TYPE  # of the request
SCOPE_SPANS = 2 << 3 | BYTES_TYPE  # of ResourceSpans
SPAN = 2 << 3 | BYTES_TYPE  # of ScopeSpans
_TRACE_ID = 1 << 3 | BYTES_TYPE  # of Span

HEAD = 6  # bytes of a tag and a length of five bytes
_BITS = 1 << 14


def wanted_traces(lows: Iterable[int]) -> Bytes:
    """The traces to be copied, by the lower halves of their ids (int64): one byte for each value of
    the lowest bits."""
    found = np.zeros(_BITS, np.uint8)
    found[np.fromiter(lows, np.int64) & (_BITS - 1)] = 1
    return found


def spans_of(body: Body | bytes, wanted: Bytes) -> bytes:
    """The part of a request that has the spans of the wanted traces, and perhaps of a few others;
    empty without one."""
    buf = np.frombuffer(body, np.uint8)
    out = np.empty(3 * len(buf) + 2 * HEAD, np.uint8)
    return out[: _copy_request(buf, wanted, out)].tobytes()


@lean_kernel
def put_head(out: Bytes, at: int, tag: int, end: int) -> None:
    """Write the tag and length of a message at ``at``; its content is from ``at + HEAD`` to
    ``end``."""
    length = end - at - HEAD
    out[at] = tag
    for i in range(1, HEAD - 1):
        out[at + i] = (length & 0x7F) | 0x80
        length >>= 7
    out[at + HEAD - 1] = length


@lean_kernel
def _is_wanted(buf: Bytes, start: int, end: int, wanted: Bytes) -> bool:
    """Whether the span's trace id, the last one if there are several, is wanted."""
    found = False
    pos = start
    while pos < end:
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            return False
        if tag == _TRACE_ID:
            length, pos = read_length(buf, pos, end)
            if pos < 0:
                return False
            found = length == 16 and wanted[load64_big(buf, pos + 8) & (_BITS - 1)] != 0
            pos += length
            continue
        pos = skip(buf, pos, end, tag)
        if pos < 0:
            return False
    return found


@lean_kernel
def _copy_scope(buf: Bytes, start: int, end: int, wanted: Bytes, out: Bytes, at: int) -> int:
    """Copy a ScopeSpans message behind ``at``; returns its end, or ``at`` without a span."""
    spans = 0
    to = at + HEAD
    pos = start
    while pos < end:
        field = pos
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            return at
        if tag == SPAN:
            length, pos = read_length(buf, pos, end)
            if pos < 0:
                return at
            if _is_wanted(buf, pos, pos + length, wanted):
                to = copy_bytes(buf, field, pos + length, out, to)
                spans += 1
            pos += length
            continue
        pos = skip(buf, pos, end, tag)
        if pos < 0:
            return at
        to = copy_bytes(buf, field, pos, out, to)
    if spans == 0:
        return at
    put_head(out, at, SCOPE_SPANS, to)
    return to


@lean_kernel
def _copy_resource(buf: Bytes, start: int, end: int, wanted: Bytes, out: Bytes, at: int) -> int:
    """Copy a ResourceSpans message behind ``at``; returns its end, or ``at`` without a span."""
    scopes = 0
    to = at + HEAD
    pos = start
    while pos < end:
        field = pos
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            return at
        if tag == SCOPE_SPANS:
            length, pos = read_length(buf, pos, end)
            if pos < 0:
                return at
            after = _copy_scope(buf, pos, pos + length, wanted, out, to)
            scopes += after != to
            to = after
            pos += length
            continue
        pos = skip(buf, pos, end, tag)
        if pos < 0:
            return at
        to = copy_bytes(buf, field, pos, out, to)
    if scopes == 0:
        return at
    put_head(out, at, RESOURCE_SPANS, to)
    return to


@lean_kernel
def _copy_request(buf: Bytes, wanted: Bytes, out: Bytes) -> int:
    """Copy the spans of wanted traces; returns the number of bytes in ``out``."""
    at = 0
    pos = 0
    end = len(buf)
    while pos < end:
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            return at
        if tag != RESOURCE_SPANS:
            pos = skip(buf, pos, end, tag)
            if pos < 0:
                return at
            continue
        length, pos = read_length(buf, pos, end)
        if pos < 0:
            return at
        at = _copy_resource(buf, pos, pos + length, wanted, out, at)
        pos += length
    return at
