"""Kernels for the smallest parts of a protobuf message: words, varints, UTF-8, hashes.

Wire format: protobuf.dev/programming-guides/encoding. The limits (a tag or a length has at most
five bytes, a value at most ten, a length is below 2**31 - 1) are those of the protobuf library
(upb), so a message is accepted here exactly if the library accepts it.

Every function here is a kernel: with the JIT on, it is compiled with bounds checks; with
``NUMBA_DISABLE_JIT=1`` it runs as Python on numpy scalars, with the same results.
Positions and lengths are byte offsets into ``buf``, a one-dimensional ``uint8`` array.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from betrace.service.jit import general_kernel
from betrace.service.otlp.columns import Bytes

int64: Any = np.int64  # Any: kernels mix it with int, and numba treats it as int

# Errors in a body; wire.ERRORS has their messages. Readers return them negated instead of a
# position.
TRUNCATED = 1
BAD_VARINT = 2
BAD_TAG = 3
BAD_WIRE_TYPE = 4
BAD_LENGTH = 5
BAD_UTF8 = 6
TOO_DEEP = 7
BAD_GROUP = 8

# Wire types.
VARINT, FIXED64, BYTES_TYPE, START_GROUP, END_GROUP, FIXED32 = range(6)

_MAX_LENGTH = 2**31 - 1  # exclusive
_HIGH_BITS = -0x7F7F7F7F7F7F7F80  # 0x8080808080808080 as int64
_HASH_SEED = 0x2545F4914F6CDD1D
_HASH_FACTOR = -0x61C8864680B583EB  # 2**64 / golden ratio, as int64


def _word_codegen(big: bool) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        word = ir.IntType(64)
        pointer = builder.gep(array.data, [args[1]], source_etype=ir.IntType(8))
        pointer = builder.bitcast(pointer, word.as_pointer())
        value = builder.load(pointer, align=1, typ=word)
        swap = big != (sys.byteorder == "big")
        return builder.bswap(value) if swap else value

    return codegen


def _word_reader(big: bool) -> Any:
    """The 8 bytes at an index as int64, without bounds check; for the two functions below."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        order: Literal["big", "little"] = "big" if big else "little"
        return lambda buf, i: int64(int.from_bytes(buf[i : i + 8].tobytes(), order, signed=True))

    def typing(typing_context: Any, buf: Any, index: Any) -> Any:
        return types.int64(buf, types.int64), _word_codegen(big)

    return intrinsic(typing)


_little_word = _word_reader(False)
_big_word = _word_reader(True)


@general_kernel
def load64(buf: Bytes, index: int) -> int:
    """The 8 bytes from ``index``, little-endian, as int64; :exc:`IndexError` outside ``buf``."""
    if index < 0 or index > buf.shape[0] - 8:
        raise IndexError("word outside the buffer")
    word: int = _little_word(buf, index)
    return word


@general_kernel
def load64_big(buf: Bytes, index: int) -> int:
    """The 8 bytes from ``index``, big-endian, as int64; :exc:`IndexError` outside ``buf``."""
    if index < 0 or index > buf.shape[0] - 8:
        raise IndexError("word outside the buffer")
    word: int = _big_word(buf, index)
    return word


def _memory_copier() -> Any:
    """Copies bytes from one array to another, without bounds check; for :func:`copy_bytes`."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]

        def copy(buf: Bytes, start: int, out: Bytes, at: int, length: int) -> None:
            out[at : at + length] = buf[start : start + length]

        return copy

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        source = context.make_array(signature.args[0])(context, builder, args[0])
        target = context.make_array(signature.args[2])(context, builder, args[2])
        source_at = builder.gep(source.data, [args[1]], source_etype=byte)
        target_at = builder.gep(target.data, [args[3]], source_etype=byte)
        cgutils.raw_memcpy(builder, target_at, source_at, args[4], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    def typing(typing_context: Any, buf: Any, start: Any, out: Any, at: Any, length: Any) -> Any:
        return types.none(buf, types.int64, out, types.int64, types.int64), codegen

    return intrinsic(typing)


_copy_memory = _memory_copier()


@general_kernel
def copy_bytes(buf: Bytes, start: int, end: int, out: Bytes, at: int) -> int:
    """Copy the bytes ``start`` .. ``end`` of ``buf`` to ``at`` in ``out``, another array; returns
    the position after them. :exc:`IndexError` outside either."""
    length = end - start
    if start < 0 or length < 0 or end > buf.shape[0] or at < 0 or at > out.shape[0] - length:
        raise IndexError("bytes outside the buffer")
    _copy_memory(buf, start, out, at, length)
    return at + length


@general_kernel
def hash_bytes(buf: Bytes, off: int, length: int) -> int:
    """A 64-bit hash of ``length`` bytes from ``off``: 8 bytes a step, multiply and fold.

    Fast rather than strong: a lookup by this hash must compare the bytes as well.
    """
    end = off + length
    h: int = int64(_HASH_SEED) ^ (int64(length) * int64(_HASH_FACTOR))
    while off + 8 <= end:
        h = (h ^ load64(buf, off)) * int64(_HASH_FACTOR)
        h ^= (h >> 32) & 0xFFFFFFFF
        off += 8
    if off < end:
        h = (h ^ _partial_word(buf, off, end)) * int64(_HASH_FACTOR)
        h ^= (h >> 32) & 0xFFFFFFFF
    return h


@general_kernel
def _partial_word(buf: Bytes, off: int, end: int) -> int:
    """The 1 to 7 bytes ``off`` .. ``end`` as the upper bytes of a word, the rest zero."""
    if off <= buf.shape[0] - 8:
        return load64(buf, off) << (64 - 8 * (end - off))
    word: int = int64(0)
    shift = 64 - 8 * (end - off)
    while off < end:
        word |= int64(buf[off]) << shift
        shift += 8
        off += 1
    return word


@general_kernel
def same_bytes(a: Bytes, a_off: int, b: Bytes, b_off: int, length: int) -> bool:
    """Whether the ``length`` bytes of ``a`` from ``a_off`` equal those of ``b`` from ``b_off``."""
    end = a_off + length
    while a_off + 8 <= end:
        if load64(a, a_off) != load64(b, b_off):
            return False
        a_off += 8
        b_off += 8
    while a_off < end:
        if a[a_off] != b[b_off]:
            return False
        a_off += 1
        b_off += 1
    return True


@general_kernel
def is_ascii(buf: Bytes, off: int, end: int) -> bool:
    """Whether the bytes ``off`` .. ``end`` are all below 128."""
    seen: int = int64(0)
    while off + 8 <= end:
        seen |= load64(buf, off)
        off += 8
    if off < end:
        seen |= _partial_word(buf, off, end)
    return (seen & _HIGH_BITS) == 0


@general_kernel
def is_utf8(buf: Bytes, off: int, end: int) -> bool:
    """Whether the bytes ``off`` .. ``end`` are UTF-8 (RFC 3629: no surrogates, shortest form)."""
    if is_ascii(buf, off, end):
        return True
    while off < end:
        lead = int64(buf[off])
        off += 1
        if lead < 0x80:
            continue
        lowest = 0x80  # range of the second byte
        highest = 0xBF
        if 0xC2 <= lead <= 0xDF:
            more = 1
        elif 0xE0 <= lead <= 0xEF:
            more = 2
            if lead == 0xE0:
                lowest = 0xA0
            elif lead == 0xED:
                highest = 0x9F
        elif 0xF0 <= lead <= 0xF4:
            more = 3
            if lead == 0xF0:
                lowest = 0x90
            elif lead == 0xF4:
                highest = 0x8F
        else:
            return False
        if off + more > end or buf[off] < lowest or buf[off] > highest:
            return False
        for i in range(off + 1, off + more):
            if buf[i] < 0x80 or buf[i] > 0xBF:
                return False
        off += more
    return True


@general_kernel
def read_varint(buf: Bytes, pos: int, end: int) -> tuple[int, int]:
    """The varint at ``pos`` (modulo 2**64, as int64) and the position after it.

    Instead of the position: ``-TRUNCATED`` if it runs past ``end``, ``-BAD_VARINT`` if it has
    more than ten bytes.
    """
    value = int64(0)
    shift = 0
    while shift < 70:
        if pos >= end:
            return 0, -TRUNCATED
        byte = int64(buf[pos])
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
        shift += 7
    return 0, -BAD_VARINT


@general_kernel
def _read_short_varint(buf: Bytes, pos: int, end: int, error: int) -> tuple[int, int]:
    """A varint of at most five bytes; if longer, ``-error`` instead of the position."""
    value = int64(0)
    shift = 0
    while shift < 35:
        if pos >= end:
            return 0, -TRUNCATED
        byte = int64(buf[pos])
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
        shift += 7
    return 0, -error


@general_kernel
def read_tag(buf: Bytes, pos: int, end: int) -> tuple[int, int]:
    """The tag (field number << 3 | wire type) at ``pos`` and the position after it.

    Instead of the position: ``-TRUNCATED``, or ``-BAD_TAG`` for more than five bytes or 32 bits.
    """
    if pos < end and buf[pos] < 0x80:
        return int64(buf[pos]), pos + 1
    tag, after = _read_short_varint(buf, pos, end, BAD_TAG)
    if tag > 0xFFFFFFFF:
        return 0, -BAD_TAG
    return tag, after


@general_kernel
def read_length(buf: Bytes, pos: int, end: int) -> tuple[int, int]:
    """The length at ``pos``, checked to fit before ``end``, and the position after it.

    Instead of the position: ``-TRUNCATED`` if the length or the bytes it counts run past ``end``,
    ``-BAD_LENGTH`` for more than five bytes or 2**31 - 2.
    """
    if pos < end and buf[pos] < 0x80:
        length = int64(buf[pos])
        after = pos + 1
    else:
        length, after = _read_short_varint(buf, pos, end, BAD_LENGTH)
        if after < 0:
            return int64(0), after
        if length >= _MAX_LENGTH:
            return 0, -BAD_LENGTH
    if length > end - after:
        return 0, -TRUNCATED
    return length, after
