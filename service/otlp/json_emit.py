"""Kernels that write the scalar fields of protobuf messages from JSON values.

Positions in ``buf`` are returned with positions in ``out``, which must have room: twice the bytes
of the JSON text and 64 more are enough for any.
"""

from __future__ import annotations

import math

import numpy as np

from betrace.service.jit import general_kernel
from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.otlp.intrinsics import BLOCK, copy_block, double_bits, store64, string_stop
from betrace.service.otlp.json_fields import (
    BASE64,
    BOOL,
    DOUBLE,
    ENUM,
    FIXED32_FIELD,
    FIXED64_FIELD,
    INT64,
    SPAN_ID,
    STRING,
    TRACE_ID,
    UINT32,
)
from betrace.service.otlp.json_lex import (
    BACKSLASH,
    DOT,
    HEX,
    LETTER_F,
    LETTER_N,
    LETTER_T,
    LETTER_U,
    MINUS,
    PLUS,
    QUOTE,
    SYNTAX,
    ZERO,
    hex4,
    literal_end,
    number_end,
    number_value,
    string_end,
)
from betrace.service.otlp.primitives import int64, load64

# Errors, after those of json_lex.
BAD_VALUE = 3  # not what the field holds
ESCAPED = 4  # valid perhaps, but it must be written without escapes first

_EXACT = 2.0**53  # up to here a double represents every integer
_INT64_MIN = -(2**63)
_INFINITY = int.from_bytes(b"Infinity", "little")

# What _whole reads.
_NATURAL, _LARGE, _NEGATIVE, _NOT_WHOLE = range(4)  # _LARGE: 2**63 or more, modulo 2**64


def _base64_digits() -> Rows:
    table = np.full(256, -1, np.int64)
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for value, digit in enumerate(digits):
        table[ord(digit)] = value
    table[ord("-")] = 62
    table[ord("_")] = 63
    return table


_BASE64 = _base64_digits()


@general_kernel
def varint_size(value: int) -> int:
    """Return how many bytes a non-negative value takes as a varint."""
    size = 1
    while value > 0x7F:
        value >>= 7
        size += 1
    return size


@general_kernel
def put_varint(out: Bytes, at: int, value: int) -> int:
    """Write an int64, as unsigned, as a varint."""
    while value > 0x7F or value < 0:
        out[at] = value & 0x7F | 0x80
        value = (value >> 7) & 0x1FFFFFFFFFFFFFF
        at += 1
    out[at] = value
    return at + 1


@general_kernel
def put_padded(out: Bytes, at: int, value: int, width: int) -> None:
    """Write a varint of ``width`` bytes, however small the value is."""
    for _ in range(width - 1):
        out[at] = value & 0x7F | 0x80
        value >>= 7
        at += 1
    out[at] = value


@general_kernel
def put_tag(out: Bytes, at: int, tag: int) -> int:
    """Write a tag of one or two bytes."""
    out[at] = tag & 0xFF
    if tag < 0x100:
        return at + 1
    out[at + 1] = tag >> 8
    return at + 2


@general_kernel
def close_length(out: Bytes, length_at: int, width: int, at: int) -> int:
    """Write the length of what was written up to ``at``, in the ``width`` bytes reserved for it at
    ``length_at``, after making more room if it does not fit. Return where it ends now."""
    length = at - length_at - width
    if length < 1 << 7 * width:
        put_padded(out, length_at, length, width)
        return at
    more = varint_size(length) - width
    end = at + more
    source = at
    target = end
    while source - 8 >= length_at + width:
        source -= 8
        target -= 8
        store64(out, target, load64(out, source))
    while source > length_at + width:
        source -= 1
        target -= 1
        out[target] = out[source]
    put_padded(out, length_at, length, width + more)
    return end


@general_kernel
def _copy(buf: Bytes, start: int, end: int, out: Bytes, at: int) -> None:
    while start < end:
        if start <= buf.shape[0] - BLOCK:
            copy_block(buf, start, out, at)
        else:
            for i in range(end - start):
                out[at + i] = buf[start + i]
            return
        start += BLOCK
        at += BLOCK


@general_kernel
def unescape(buf: Bytes, pos: int, end: int, out: Bytes, at: int) -> int:
    """Write the text of the valid JSON string content ``pos`` .. ``end`` in UTF-8."""
    while pos < end:
        c = int64(buf[pos])
        if c != BACKSLASH:
            out[at] = c
            pos += 1
            at += 1
            continue
        c = int64(buf[pos + 1])
        pos += 2
        if c != LETTER_U:
            if c == 0x62:
                c = 0x08
            elif c == LETTER_F:
                c = 0x0C
            elif c == LETTER_N:
                c = 0x0A
            elif c == 0x72:
                c = 0x0D
            elif c == LETTER_T:
                c = 0x09
            out[at] = c
            at += 1
            continue
        code = hex4(buf, pos)
        pos += 4
        if code < 0x80:
            out[at] = code
            at += 1
        elif code < 0x800:
            out[at] = 0xC0 | code >> 6
            out[at + 1] = 0x80 | code & 0x3F
            at += 2
        elif code < 0xD800 or code > 0xDFFF:
            out[at] = 0xE0 | code >> 12
            out[at + 1] = 0x80 | code >> 6 & 0x3F
            out[at + 2] = 0x80 | code & 0x3F
            at += 3
        else:
            code = 0x10000 + ((code - 0xD800) << 10 | (hex4(buf, pos + 2) - 0xDC00))
            pos += 6
            out[at] = 0xF0 | code >> 18
            out[at + 1] = 0x80 | code >> 12 & 0x3F
            out[at + 2] = 0x80 | code >> 6 & 0x3F
            out[at + 3] = 0x80 | code & 0x3F
            at += 4
    return at


@general_kernel
def _is_escaped_ascii(buf: Bytes, pos: int, end: int) -> bool:
    """Whether all escapes in valid string content are for characters that need none."""
    while pos < end:
        if buf[pos] == BACKSLASH:
            if buf[pos + 1] == LETTER_U:
                code = hex4(buf, pos + 2)
                if code < 0x20 or code > 0x7E or code == QUOTE or code == BACKSLASH:
                    return False
            elif buf[pos + 1] != 0x2F:  # /
                return False
            pos += 1
        pos += 1
    return True


@general_kernel
def put_string(buf: Bytes, start: int, out: Bytes, at: int) -> tuple[int, int]:
    """Write the length and text of the string whose content begins at ``start``. Return the
    positions after it, the first ``-SYNTAX`` if it is invalid."""
    pos = start
    to = at + 1
    while pos <= buf.shape[0] - BLOCK:
        copy_block(buf, pos, out, to)
        stop = string_stop(buf, pos)
        pos += stop
        to += stop
        if stop < BLOCK:
            length = pos - start
            if buf[pos] == QUOTE and length < 0x80:
                out[at] = length
                return pos + 1, to
            break
    end, escaped = string_end(buf, start)
    if end < 0:
        return -SYNTAX, at
    if escaped:
        width = varint_size(end - start)
        to = unescape(buf, start, end, out, at + width)
        put_padded(out, at, to - at - width, width)
        return end + 1, to
    at = put_varint(out, at, end - start)
    _copy(buf, start, end, out, at)
    return end + 1, at + end - start


@general_kernel
def _whole(text: Bytes, pos: int, end: int) -> tuple[int, int]:
    """Return the integer ``pos`` .. ``end`` (an optional sign, then digits), and which it is."""
    negative = pos < end and text[pos] == MINUS
    if negative:
        pos += 1
    if pos == end:
        return 0, _NOT_WHOLE
    while pos < end - 1 and text[pos] == ZERO:
        pos += 1
    if end - pos > 20:
        return 0, _NOT_WHOLE
    value = int64(0)
    large = False
    while pos < end:
        digit = int64(text[pos]) - ZERO
        if digit < 0 or digit > 9 or large:
            return 0, _NOT_WHOLE
        if value >= 922337203685477580:  # the next one may be 2**63 or more
            if value > 1844674407370955161 or (value == 1844674407370955161 and digit > 5):
                return 0, _NOT_WHOLE
            large = value > 922337203685477580 or digit > 7
        value = value * 10 + digit
        pos += 1
    if negative:
        if large and value != _INT64_MIN:
            return 0, _NOT_WHOLE
        return (-value, _NEGATIVE) if value != 0 else (value, _NATURAL)
    return value, _LARGE if large else _NATURAL


@general_kernel
def _whole_of_double(value: float) -> tuple[int, int]:
    """Return the integer that a double is, if it is one and every integer near it is a double."""
    if not (-_EXACT <= value <= _EXACT) or value != math.floor(value):
        return 0, _NOT_WHOLE
    whole = int64(value)
    return whole, _NEGATIVE if whole < 0 else _NATURAL


@general_kernel
def _put_whole(out: Bytes, at: int, kind: int, value: int, which: int) -> int:
    """Write an integer field; -1 if the integer is outside the field's range."""
    if which == _NOT_WHOLE:
        return -1
    if kind == FIXED64_FIELD:
        if which == _NEGATIVE:
            return -1
        store64(out, at, value)
        return at + 8
    if which == _LARGE:
        return -1
    if kind == UINT32 or kind == FIXED32_FIELD:
        if value < 0 or value > 0xFFFFFFFF:
            return -1
    elif kind != INT64 and (value < -0x80000000 or value > 0x7FFFFFFF):
        return -1
    if kind == FIXED32_FIELD:
        store64(out, at, value)
        return at + 4
    return put_varint(out, at, value)


@general_kernel
def _put_double(out: Bytes, at: int, value: float) -> int:
    store64(out, at, double_bits(value))
    return at + 8


@general_kernel
def _is_decimal(text: Bytes, pos: int, end: int) -> bool:
    """Whether the text is a decimal number; unlike in JSON, it may begin with zeros."""
    if pos < end and text[pos] == MINUS:
        pos += 1
    for part in range(3):
        if part == 1:
            if pos >= end or text[pos] != DOT:
                continue
            pos += 1
        elif part == 2:
            if pos >= end or (text[pos] != 0x65 and text[pos] != 0x45):
                continue
            pos += 1
            if pos < end and (text[pos] == PLUS or text[pos] == MINUS):
                pos += 1
        first = pos
        while pos < end and ZERO <= text[pos] <= 0x39:
            pos += 1
        if pos == first:
            return False
    return pos == end


@general_kernel
def _put_double_text(text: Bytes, start: int, end: int, out: Bytes, at: int) -> int:
    """Write a double given as text; -1 if the text is not a double."""
    length = end - start
    if length == 3 and text[start] == 0x4E and text[start + 1] == 0x61 and text[start + 2] == 0x4E:
        return _put_double(out, at, math.nan)
    minus = length > 0 and text[start] == MINUS
    if length == 8 + minus:
        first = start + minus
        word = load64(text, first) if first + 8 <= text.shape[0] else int64(0)
        if word == _INFINITY:
            return _put_double(out, at, -math.inf if minus else math.inf)
    if not _is_decimal(text, start, end):
        return -1
    value = number_value(text, start, end)
    return -1 if math.isinf(value) else _put_double(out, at, value)


@general_kernel
def _put_id(text: Bytes, start: int, end: int, out: Bytes, at: int, size: int) -> int:
    """Write an id in hex; one of a wrong length keeps a wrong length."""
    digits = end - start
    length = (digits + 1) // 2
    if length == size and digits != 2 * size:  # one digit is missing
        length -= 1
    at = put_varint(out, at, length)
    bad = int64(0)
    pos = start
    while pos < end:
        high = HEX[text[pos]]
        low = HEX[text[pos + 1]] if pos + 1 < end else int64(0)
        bad |= high | low
        out[at] = (high << 4 | low) & 0xFF
        at += 1
        pos += 2
    if length != (digits + 1) // 2:
        at -= 1
    return -1 if bad < 0 else at


@general_kernel
def _put_base64(text: Bytes, start: int, end: int, out: Bytes, at: int) -> int:
    """Write bytes in base64, standard or URL-safe, with any padding."""
    while end > start and text[end - 1] == 0x3D:
        end -= 1
    rest = (end - start) % 4
    if rest == 1:
        return -1
    at = put_varint(out, at, (end - start) * 3 // 4)
    bits = int64(0)
    count = 0
    pos = start
    while pos < end:
        value = _BASE64[text[pos]]
        if value < 0:
            return -1
        bits = (bits << 6 | value) & 0xFFFF
        count += 6
        if count >= 8:
            count -= 8
            out[at] = bits >> count & 0xFF
            at += 1
        pos += 1
    return at


@general_kernel
def _put_text(text: Bytes, start: int, end: int, out: Bytes, at: int, kind: int) -> int:
    """Write a field that is not a string from the text of a JSON string; -1 if it is no value of
    the field."""
    if kind == TRACE_ID:
        return _put_id(text, start, end, out, at, 16)
    if kind == SPAN_ID:
        return _put_id(text, start, end, out, at, 8)
    if kind == DOUBLE:
        return _put_double_text(text, start, end, out, at)
    if kind == BASE64:
        return _put_base64(text, start, end, out, at)
    if kind == BOOL or kind == ENUM:
        return -1
    if end - start > 20 + (start < end and text[start] == MINUS):
        return -1
    value, which = _whole(text, start, end)
    return _put_whole(out, at, kind, value, which)


@general_kernel
def put_scalar(buf: Bytes, pos: int, out: Bytes, at: int, kind: int, tag: int) -> tuple[int, int]:
    """Write a field that is not a message from the JSON value at ``pos``. Return the positions
    after it, or as the first ``-SYNTAX``, ``-BAD_VALUE`` or ``-ESCAPED``."""
    c = int64(buf[pos])
    at = put_tag(out, at, tag)
    if c == QUOTE:
        if kind == STRING:
            return put_string(buf, pos + 1, out, at)
        end, escaped = string_end(buf, pos + 1)
        if end < 0:
            return -SYNTAX, at
        if escaped:
            return (-ESCAPED if _is_escaped_ascii(buf, pos + 1, end) else -BAD_VALUE), at
        at = _put_text(buf, pos + 1, end, out, at, kind)
        return (end + 1, at) if at >= 0 else (-BAD_VALUE, at)
    if kind == BOOL:
        if c == LETTER_T or c == LETTER_F:
            end = pos + (4 if c == LETTER_T else 5)
            if literal_end(buf, pos) != end:
                return -SYNTAX, at
            out[at] = 1 if c == LETTER_T else 0
            return end, at + 1
        return -BAD_VALUE, at
    if c != MINUS and not ZERO <= c <= 0x39:
        return -BAD_VALUE, at
    if kind == STRING or kind == TRACE_ID or kind == SPAN_ID or kind == BASE64:
        return -BAD_VALUE, at
    end, integral = number_end(buf, pos)
    if end < 0 or end >= buf.shape[0]:
        return -SYNTAX, at
    if kind == DOUBLE:
        number = number_value(buf, pos, end)
        if integral and number == 0:
            number = 0.0  # an integer -0 has no sign
        return end, _put_double(out, at, number)
    if integral:
        value, which = _whole(buf, pos, end)
    elif kind == ENUM:
        return -BAD_VALUE, at
    else:
        value, which = _whole_of_double(number_value(buf, pos, end))
    at = _put_whole(out, at, kind, value, which)
    return (end, at) if at >= 0 else (-BAD_VALUE, at)
