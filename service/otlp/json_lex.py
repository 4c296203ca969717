"""Kernels that read JSON text (RFC 8259): space, strings, numbers, and whole values to skip.

They accept what orjson accepts: UTF-8 without lone surrogates, nesting up to 1024 levels, numbers
within a double's range. Positions are byte offsets into ``buf``.
"""

from __future__ import annotations

import math

import numpy as np

from betrace.service.jit import general_kernel
from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.otlp.intrinsics import BLOCK, parse_decimal, string_stop
from betrace.service.otlp.primitives import int64, is_utf8

MAX_LEVELS = 1024  # nested arrays and objects: orjson's limit

# Errors; functions that return a position return them negated in its place.
SYNTAX = 1
TOO_DENSE = 2

# A body may have FREE_CONTAINERS objects and arrays, and one more for each BYTES_A_CONTAINER bytes
# read so far. The shortest attribute value with content, {"intValue":1}, takes 15 bytes with its
# comma; an empty object takes 3.
FREE_CONTAINERS = 4096
BYTES_A_CONTAINER = 4
CONTAINERS = 0  # entry of info: how many were read

QUOTE, BACKSLASH, COMMA, COLON, MINUS, PLUS, DOT = 0x22, 0x5C, 0x2C, 0x3A, 0x2D, 0x2B, 0x2E
OPEN_OBJECT, CLOSE_OBJECT, OPEN_ARRAY, CLOSE_ARRAY = 0x7B, 0x7D, 0x5B, 0x5D
LETTER_F, LETTER_N, LETTER_T, LETTER_U = 0x66, 0x6E, 0x74, 0x75
ZERO = 0x30

_BITS = 53  # of a double's mantissa
_EXACT_POWER = 22  # powers of ten up to this one are doubles
_POWERS = np.array([10.0**k for k in range(_EXACT_POWER + 1)])
_LARGE = 300  # numbers below 10**_LARGE are finite


def _hex_digits() -> Rows:
    table = np.full(256, -1, np.int64)
    for value, digit in enumerate("0123456789abcdef"):
        table[ord(digit)] = table[ord(digit.upper())] = value
    return table


HEX = _hex_digits()
"""The value of a hex digit; -1 for other bytes."""


@general_kernel
def skip_space(buf: Bytes, pos: int) -> int:
    """Return the position of the first byte from ``pos`` that is not white space."""
    n = buf.shape[0]
    while pos < n:
        c = buf[pos]
        if c > 0x20 or not (c == 0x20 or c == 0x0A or c == 0x0D or c == 0x09):
            break
        pos += 1
    return pos


@general_kernel
def hex4(buf: Bytes, pos: int) -> int:
    """Return the value of four hex digits, or -1."""
    if pos + 4 > buf.shape[0]:
        return -1
    value = int64(0)
    for i in range(pos, pos + 4):
        digit = HEX[buf[i]]
        if digit < 0:
            return -1
        value = value << 4 | digit
    return value


@general_kernel
def _escape_end(buf: Bytes, pos: int) -> int:
    """Return the position after the escape whose backslash is at ``pos``; a surrogate pair counts
    as one. -1 if it is invalid."""
    if pos + 1 >= buf.shape[0]:
        return -1
    c = buf[pos + 1]
    if c == LETTER_U:
        unit = hex4(buf, pos + 2)
        if unit < 0 or 0xDC00 <= unit < 0xE000:
            return -1
        if 0xD800 <= unit < 0xDC00:
            if pos + 12 > buf.shape[0] or buf[pos + 6] != BACKSLASH or buf[pos + 7] != LETTER_U:
                return -1
            low = hex4(buf, pos + 8)
            return pos + 12 if 0xDC00 <= low < 0xE000 else -1
        return pos + 6
    if (
        c == QUOTE
        or c == BACKSLASH
        or c == 0x2F  # /
        or c == 0x62  # b
        or c == LETTER_F
        or c == LETTER_N
        or c == 0x72  # r
        or c == LETTER_T
    ):
        return pos + 2
    return -1


@general_kernel
def string_end(buf: Bytes, start: int) -> tuple[int, bool]:
    """Return the position of the quote that ends the string whose content begins at ``start``, and
    whether there are escapes in it. The position is -1 if the string is invalid."""
    n = buf.shape[0]
    pos = start
    escaped = False
    ascii_only = True
    while pos < n:
        if pos <= n - BLOCK:
            stop = string_stop(buf, pos)
            pos += stop
            if stop == BLOCK:
                continue
        c = buf[pos]
        if c == QUOTE:
            if not ascii_only and not is_utf8(buf, start, pos):
                return -1, False
            return pos, escaped
        if c == BACKSLASH:
            escaped = True
            pos = _escape_end(buf, pos)
            if pos < 0:
                return -1, False
        elif c < 0x20:
            return -1, False
        else:
            while c >= 0x80:
                ascii_only = False
                pos += 1
                if pos >= n:
                    return -1, False
                c = buf[pos]
            if c >= 0x20 and c != QUOTE and c != BACKSLASH:
                pos += 1
    return -1, False


@general_kernel
def literal_end(buf: Bytes, pos: int) -> int:
    """Return the position after ``true``, ``false`` or ``null``; -1 for anything else."""
    n = buf.shape[0]
    if pos + 4 > n:
        return -1
    a = buf[pos]
    b = buf[pos + 1]
    c = buf[pos + 2]
    d = buf[pos + 3]
    if a == LETTER_N:
        return pos + 4 if b == LETTER_U and c == 0x6C and d == 0x6C else -1
    if a == LETTER_T:
        return pos + 4 if b == 0x72 and c == LETTER_U and d == 0x65 else -1
    if a == LETTER_F and b == 0x61 and c == 0x6C and d == 0x73:
        return pos + 5 if pos + 4 < n and buf[pos + 4] == 0x65 else -1
    return -1


@general_kernel
def _digits_end(buf: Bytes, pos: int) -> int:
    n = buf.shape[0]
    while pos < n and ZERO <= buf[pos] <= 0x39:
        pos += 1
    return pos


@general_kernel
def number_end(buf: Bytes, start: int) -> tuple[int, bool]:
    """Return the position after the number at ``start``, and whether it is written as an integer.
    The position is -1 if the number is invalid or beyond a double's range."""
    n = buf.shape[0]
    pos = start
    if pos < n and buf[pos] == MINUS:
        pos += 1
    first = pos
    pos = _digits_end(buf, pos)
    digits = pos - first
    if digits == 0 or (digits > 1 and buf[first] == ZERO):
        return -1, False
    integral = True
    exponent = int64(0)
    if pos < n and buf[pos] == DOT:
        integral = False
        fraction = pos + 1
        pos = _digits_end(buf, fraction)
        if pos == fraction:
            return -1, False
    if pos < n and (buf[pos] == 0x65 or buf[pos] == 0x45):
        integral = False
        pos += 1
        negative = False
        if pos < n and (buf[pos] == PLUS or buf[pos] == MINUS):
            negative = buf[pos] == MINUS
            pos += 1
        power = pos
        pos = _digits_end(buf, power)
        if pos == power:
            return -1, False
        exponent = _exponent(buf, power, pos, negative)
    if digits + exponent > _LARGE and (pos >= n or math.isinf(parse_decimal(buf, start, pos))):
        return -1, False
    return pos, integral


@general_kernel
def _exponent(buf: Bytes, pos: int, end: int, negative: bool) -> int:
    """Return the exponent in the digits ``pos`` .. ``end``, or one as large for any purpose."""
    value = int64(0)
    while pos < end:
        if value < 100_000_000:
            value = value * 10 + (int64(buf[pos]) - ZERO)
        pos += 1
    return -value if negative else value


@general_kernel
def number_value(buf: Bytes, start: int, end: int) -> float:
    """Return the double nearest to the valid decimal number ``start`` .. ``end``.

    Exact in one operation if the digits and the power of ten are both doubles (Clinger, How to
    Read Floating Point Numbers Accurately, 1990); others are left to ``strtod``.
    """
    pos = start
    negative = buf[pos] == MINUS
    if negative:
        pos += 1
    mantissa = int64(0)
    power = int64(0)
    in_fraction = False
    while pos < end:
        c = int64(buf[pos])
        if c == DOT:
            in_fraction = True
        elif c == 0x65 or c == 0x45:
            pos += 1
            minus = buf[pos] == MINUS
            if minus or buf[pos] == PLUS:
                pos += 1
            power += _exponent(buf, pos, end, minus)
            break
        else:
            mantissa = mantissa * 10 + (c - ZERO)
            if mantissa > 1 << _BITS:
                return parse_decimal(buf, start, end)
            if in_fraction:
                power -= 1
        pos += 1
    value = float(mantissa)
    if mantissa != 0:
        if power < -_EXACT_POWER or power > _EXACT_POWER:
            return parse_decimal(buf, start, end)
        if power >= 0:
            value *= _POWERS[power]
        else:
            value /= _POWERS[-power]
    return -value if negative else value


@general_kernel
def count_container(pos: int, info: Rows) -> bool:
    """Count an object or array at ``pos`` in ``info``; False if there are too many by now."""
    info[CONTAINERS] += 1
    return info[CONTAINERS] <= FREE_CONTAINERS + pos // BYTES_A_CONTAINER


@general_kernel
def _after_key(buf: Bytes, pos: int) -> int:
    """Return the position after the key and colon from ``pos``, or -1."""
    n = buf.shape[0]
    pos = skip_space(buf, pos)
    if pos >= n or buf[pos] != QUOTE:
        return -1
    end, _ = string_end(buf, pos + 1)
    if end < 0:
        return -1
    pos = skip_space(buf, end + 1)
    return pos + 1 if pos < n and buf[pos] == COLON else -1


@general_kernel
def skip_value(buf: Bytes, pos: int, levels: int, opened: Rows, info: Rows) -> int:
    """Return the position after the value at ``pos``, or ``-SYNTAX`` or ``-TOO_DENSE``.

    ``levels`` is how many objects and arrays are open around it; ``opened`` is scratch of
    ``MAX_LEVELS`` entries.
    """
    n = buf.shape[0]
    depth = 0
    while True:
        pos = skip_space(buf, pos)
        if pos >= n:
            return -SYNTAX
        c = int64(buf[pos])
        if c == QUOTE:
            pos, _ = string_end(buf, pos + 1)
            if pos < 0:
                return -SYNTAX
            pos += 1
        elif c == OPEN_OBJECT or c == OPEN_ARRAY:
            if levels + depth >= MAX_LEVELS:
                return -SYNTAX
            if not count_container(pos, info):
                return -TOO_DENSE
            pos = skip_space(buf, pos + 1)
            if pos < n and buf[pos] == c + 2:  # }, ]
                pos += 1
            else:
                opened[depth] = c
                depth += 1
                if c == OPEN_OBJECT:
                    pos = _after_key(buf, pos)
                    if pos < 0:
                        return -SYNTAX
                continue
        elif c == LETTER_T or c == LETTER_F or c == LETTER_N:
            pos = literal_end(buf, pos)
            if pos < 0:
                return -SYNTAX
        else:
            pos, _ = number_end(buf, pos)
            if pos < 0:
                return -SYNTAX
        while True:
            if depth == 0:
                return pos
            pos = skip_space(buf, pos)
            if pos >= n:
                return -SYNTAX
            c = int64(buf[pos])
            pos += 1
            if c == COMMA:
                if opened[depth - 1] == OPEN_OBJECT:
                    pos = _after_key(buf, pos)
                    if pos < 0:
                        return -SYNTAX
                break
            if c != opened[depth - 1] + 2:
                return -SYNTAX
            depth -= 1
