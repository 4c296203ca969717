"""Instructions that numba does not expose, for kernels, and their equivalents in Python.

Every function checks its bounds and raises :exc:`IndexError` outside an array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from betrace.service.jit import general_kernel
from betrace.service.otlp.columns import Bytes

BLOCK = 16  # bytes, the size of a vector register on every 64-bit processor

_BIT, _BYTE, _WORD = ir.IntType(1), ir.IntType(8), ir.IntType(64)
_VECTOR = ir.VectorType(_BYTE, BLOCK)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, of: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index], source_etype=_BYTE), of.as_pointer())


def _stop_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _VECTOR)
    block = builder.load(pointer, align=1, typ=_VECTOR)

    def all_of(byte: int) -> Any:
        return ir.Constant(_VECTOR, [byte] * BLOCK)

    # Signed, so that bytes above 127 are below 32 as well.
    hit = builder.icmp_signed("<", block, all_of(0x20))
    hit = builder.or_(hit, builder.icmp_unsigned("==", block, all_of(0x22)))
    hit = builder.or_(hit, builder.icmp_unsigned("==", block, all_of(0x5C)))
    mask = builder.zext(builder.bitcast(hit, ir.IntType(BLOCK)), _WORD)
    mask = builder.or_(mask, ir.Constant(_WORD, 1 << BLOCK))
    return builder.cttz(mask, ir.Constant(_BIT, 1))


def _stop_python(buf: Bytes, index: int) -> int:
    for i, byte in enumerate(buf[index : index + BLOCK].tolist()):
        if byte < 0x20 or byte > 0x7F or byte in b'"\\':
            return i
    return BLOCK


def _copy_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    source = _pointer(context, builder, signature.args[0], args[0], args[1], _VECTOR)
    target = _pointer(context, builder, signature.args[2], args[2], args[3], _VECTOR)
    builder.store(builder.load(source, align=1, typ=_VECTOR), target, align=1)
    return context.get_dummy_value()


def _copy_python(buf: Bytes, index: int, out: Bytes, at: int) -> None:
    out[at : at + BLOCK] = buf[index : index + BLOCK]


def _store_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _WORD)
    builder.store(args[2], pointer, align=1)
    return context.get_dummy_value()


def _store_python(out: Bytes, at: int, value: int) -> None:
    out[at : at + 8] = np.frombuffer(int(value).to_bytes(8, "little", signed=True), np.uint8)


def _strtod_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    text = _pointer(context, builder, signature.args[0], args[0], args[1], _BYTE)
    end = ir.PointerType(ir.PointerType(_BYTE))
    kind = ir.FunctionType(ir.DoubleType(), [ir.PointerType(_BYTE), end])
    find: Any = cgutils.get_or_insert_function
    function = find(builder.module, kind, "strtod")
    return builder.call(function, [text, ir.Constant(end, None)])


def _strtod_python(buf: Bytes, start: int, end: int) -> float:
    return float(buf[start:end].tobytes())


def _bits_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.bitcast(args[0], _WORD)


def _bits_python(value: float) -> Any:
    return np.float64(value).view(np.int64)


if config.DISABLE_JIT:  # type: ignore[attr-defined]
    _stop: Any = _stop_python
    _copy: Any = _copy_python
    _store: Any = _store_python
    _strtod: Any = _strtod_python
    _bits: Any = _bits_python
else:
    _i64 = types.int64
    _stop = intrinsic(lambda context, buf, at: (_i64(buf, _i64), _stop_codegen))
    _copy = intrinsic(
        lambda context, buf, at, out, to: (types.void(buf, _i64, out, _i64), _copy_codegen)
    )
    _store = intrinsic(lambda context, out, at, n: (types.void(out, _i64, _i64), _store_codegen))
    _strtod = intrinsic(
        lambda context, buf, at, end: (types.float64(buf, _i64, _i64), _strtod_codegen)
    )
    _bits = intrinsic(lambda context, value: (_i64(types.float64), _bits_codegen))


@general_kernel
def string_stop(buf: Bytes, index: int) -> int:
    """Return how many of the ``BLOCK`` bytes from ``index`` come before the first that is a quote,
    a backslash, a control character or not ASCII; ``BLOCK`` if none is."""
    if index < 0 or index > buf.shape[0] - BLOCK:
        raise IndexError("block outside the buffer")
    stop: int = _stop(buf, index)
    return stop


@general_kernel
def copy_block(buf: Bytes, index: int, out: Bytes, at: int) -> None:
    """Copy ``BLOCK`` bytes."""
    if index < 0 or index > buf.shape[0] - BLOCK or at < 0 or at > out.shape[0] - BLOCK:
        raise IndexError("block outside the buffer")
    _copy(buf, index, out, at)


@general_kernel
def store64(out: Bytes, at: int, value: int) -> None:
    """Write an int64 as 8 bytes, little-endian."""
    if at < 0 or at > out.shape[0] - 8:
        raise IndexError("word outside the buffer")
    _store(out, at, value)


@general_kernel
def parse_decimal(buf: Bytes, start: int, end: int) -> float:
    """Return the double nearest to the decimal number ``start`` .. ``end``, with C's ``strtod``.

    The byte at ``end`` must be in ``buf`` and not continue the number: ``strtod`` stops there.
    """
    if start < 0 or start >= end or end >= buf.shape[0]:
        raise IndexError("number outside the buffer")
    value: float = _strtod(buf, start, end)
    return value


@general_kernel
def double_bits(value: float) -> int:
    """Return the 64 bits of a double as int64."""
    bits: int = _bits(value)
    return bits
