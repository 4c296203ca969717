"""Reads protobuf messages column by column: one field of many messages in one kernel call.

For code off the hot path that needs all of a span, such as the archive. The scanner
(:mod:`betrace.service.otlp.scanner`) keeps what rules need; this module finds the rest. The bytes
must have been accepted by the scanner; malformed bytes end their message.

Messages are rows whose first two columns are offset and length in ``buf``.
"""

from __future__ import annotations

import numpy as np

from betrace.service.jit import general_kernel
from betrace.service.otlp.attributes import MISSING, merge_any_value, skip
from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.otlp.primitives import (
    BYTES_TYPE,
    FIXED32,
    FIXED64,
    int64,
    read_length,
    read_tag,
)

# Columns of a found message.
OFFSET, SIZE, PARENT = range(3)
FOUND_COLUMNS = 3

# Columns of a KeyValue; VALUE_TYPE to VALUE_SIZE are laid out like find_attribute's out.
KEY_OFFSET, KEY_SIZE, VALUE_TYPE, VALUE, VALUE_SIZE = range(5)
KEY_VALUE_COLUMNS = 5

_FIRST_CAPACITY = 1024


@general_kernel
def _find(buf: Bytes, messages: Rows, field: int, out: Rows) -> int:
    """See :func:`submessages`. Return how many there are, even if ``out`` has fewer rows."""
    wanted = field << 3 | BYTES_TYPE
    found = 0
    for row in range(len(messages)):
        pos = messages[row, OFFSET]
        end = pos + messages[row, SIZE]
        while pos < end:
            tag, pos = read_tag(buf, pos, end)
            if pos < 0:
                break
            if tag == wanted:
                size, pos = read_length(buf, pos, end)
                if pos < 0:
                    break
                if found < len(out):
                    out[found, OFFSET] = pos
                    out[found, SIZE] = size
                    out[found, PARENT] = row
                found += 1
                pos += size
            else:
                pos = skip(buf, pos, end, tag)
                if pos < 0:
                    break
    return found


def submessages(buf: Bytes, messages: Rows, field: int) -> Rows:
    """Return the occurrences of a length-delimited field (message, text or bytes) in ``messages``,
    in order: rows of offset, size and the row of the enclosing message."""
    out = np.empty((max(_FIRST_CAPACITY, 2 * len(messages)), FOUND_COLUMNS), np.int64)
    found = _find(buf, messages, field, out)
    if found > len(out):
        out = np.empty((found, FOUND_COLUMNS), np.int64)
        _find(buf, messages, field, out)
    return out[:found]


@general_kernel
def _last_fixed(buf: Bytes, messages: Rows, field: int, size: int, out: Rows) -> None:
    wanted = field << 3 | (FIXED64 if size == 8 else FIXED32)
    for row in range(len(messages)):
        out[row] = 0
        pos = messages[row, OFFSET]
        end = pos + messages[row, SIZE]
        while pos < end:
            tag, pos = read_tag(buf, pos, end)
            if pos < 0:
                break
            if tag == wanted:
                if pos > end - size:
                    break
                out[row] = 0
                for k in range(size):
                    out[row] |= int64(buf[pos + k]) << (8 * k)
                pos += size
            else:
                pos = skip(buf, pos, end, tag)
                if pos < 0:
                    break


def fixed_numbers(buf: Bytes, messages: Rows, field: int, size: int) -> Rows:
    """Return a fixed-size number (``size`` 4 or 8 bytes) of each message: 0 if absent, the last if
    repeated. Unsigned 64-bit numbers keep their bits in int64."""
    out = np.empty(len(messages), np.int64)
    _last_fixed(buf, messages, field, size, out)
    return out


def last_of_each(found: Rows, messages: int) -> Rows:
    """Return the last occurrence that :func:`submessages` found in each message, as rows of offset
    and size. The size is -1 if a message has none."""
    out = np.zeros((messages, 2), np.int64)
    out[:, SIZE] = -1
    out[found[:, PARENT]] = found[:, :2]  # for repeated indices numpy keeps the last
    return out


@general_kernel
def _key_values(buf: Bytes, messages: Rows, out: Rows) -> None:
    for row in range(len(messages)):
        for column in range(KEY_VALUE_COLUMNS):
            out[row, column] = 0
        out[row, VALUE_TYPE] = MISSING
        pos = messages[row, OFFSET]
        end = pos + messages[row, SIZE]
        while pos < end:
            tag, pos = read_tag(buf, pos, end)
            if pos < 0:
                break
            if tag in (1 << 3 | BYTES_TYPE, 2 << 3 | BYTES_TYPE):
                size, pos = read_length(buf, pos, end)
                if pos < 0:
                    break
                if tag >> 3 == 1:
                    out[row, KEY_OFFSET] = pos
                    out[row, KEY_SIZE] = size
                else:
                    merge_any_value(buf, pos, pos + size, out[row, VALUE_TYPE:])
                pos += size
            else:
                pos = skip(buf, pos, end, tag)
                if pos < 0:
                    break


def key_values(buf: Bytes, messages: Rows) -> Rows:
    """Read ``messages`` as ``KeyValue``. Return rows of the key's offset and size, and the value's
    type, value and size as in :func:`betrace.service.otlp.attributes.find_attribute`."""
    out = np.empty((len(messages), KEY_VALUE_COLUMNS), np.int64)
    _key_values(buf, messages, out)
    return out


@general_kernel
def _gather(buf: Bytes, ranges: Rows, out: Bytes) -> None:
    at = 0
    for row in range(len(ranges)):
        start = ranges[row, OFFSET]
        for k in range(ranges[row, SIZE]):
            out[at] = buf[start + k]
            at += 1


def gather(buf: Bytes, ranges: Rows) -> tuple[Bytes, Rows]:
    """Return the bytes of ``ranges`` end to end (negative sizes count as empty), and the start of
    each followed by the total: one more number than ranges."""
    starts = np.zeros(len(ranges) + 1, np.int64)
    np.cumsum(np.maximum(ranges[:, SIZE], 0), out=starts[1:])
    out = np.empty(starts[-1], np.uint8)
    _gather(buf, ranges, out)
    return out, starts
