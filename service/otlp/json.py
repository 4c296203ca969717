"""Converts OTLP JSON to protobuf wire bytes, for the scanner.

Protobuf's JSON mapping with OTLP's exceptions (opentelemetry.io/docs/specs/otlp, "JSON
Protobuf Encoding"): lowerCamelCase names, ids as hex in either case, enums as numbers,
64-bit integers as numbers or strings, unknown fields ignored, null as if absent.

The text must be UTF-8 without a byte order mark and without lone surrogates; if an object has a
name twice, the last one counts; a number beyond a double's range is refused. An integer written
as a fraction, or beyond 64 bits, must be one that a double represents exactly.

The work is done by :func:`betrace.service.otlp.json_transcode.transcode`; this module turns its
errors into words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.otlp.json_emit import BAD_VALUE
from betrace.service.otlp.json_fields import (
    ANY_VALUE,
    BASE64,
    BOOL,
    DOUBLE,
    ENUM,
    FIELDS,
    FIXED32_FIELD,
    FIXED64_FIELD,
    INT32,
    INT64,
    NAMES,
    REPEATED_STRING,
    SLOTS,
    SPAN_ID,
    STRING,
    TRACE_ID,
    UINT32,
)
from betrace.service.otlp.json_lex import (
    BYTES_A_CONTAINER,
    CLOSE_ARRAY,
    CLOSE_OBJECT,
    COMMA,
    MAX_LEVELS,
    OPEN_ARRAY,
    OPEN_OBJECT,
    QUOTE,
    TOO_DENSE,
    string_end,
)
from betrace.service.otlp.json_transcode import (
    EDITS,
    ERROR,
    ERROR_DEPTH,
    ERROR_FIELD,
    ERROR_GIVEN,
    ERROR_OFF,
    FRAMES,
    INFO,
    LENGTH,
    NOT_ARRAY,
    NOT_OBJECT,
    PATH_COLUMNS,
    SEVERAL_VALUES,
    STACK_COLUMNS,
    TOO_DEEP,
    edit,
    transcode,
)
from betrace.service.otlp.scanner import MAX_DEPTH

_FEW = 64  # edits found in the first pass

_HEX = "an id of {} hex digits (not base64)"
_WHOLE = "an integer from {} to {}, as a number or a string"

_VALUES = {
    REPEATED_STRING: "a string",
    STRING: "a string",
    TRACE_ID: _HEX.format(32),
    SPAN_ID: _HEX.format(16),
    BASE64: "bytes in base64",
    BOOL: "true or false",
    DOUBLE: 'a number, "NaN", "Infinity" or "-Infinity"',
    INT32: _WHOLE.format(-(2**31), 2**31 - 1),
    INT64: _WHOLE.format(-(2**63), 2**63 - 1),
    UINT32: _WHOLE.format(0, 2**32 - 1),
    FIXED32_FIELD: _WHOLE.format(0, 2**32 - 1),
    FIXED64_FIELD: _WHOLE.format(0, 2**64 - 1),
}
_EXAMPLES = {"kind": "2 for SPAN_KIND_SERVER", "code": "2 for STATUS_CODE_ERROR"}


class OtlpJsonError(ValueError):
    """The body is not OTLP JSON; the message says where, and what was expected."""


def to_protobuf(body: bytes | bytearray | memoryview) -> bytes:
    """Convert an ``ExportTraceServiceRequest`` in JSON to protobuf wire bytes.

    Raises :class:`OtlpJsonError`. Ids of a wrong length are passed on: the scanner rejects their
    spans and keeps the others.
    """
    buf = np.frombuffer(body, np.uint8)
    buf.flags.writeable = False
    out = np.empty(2 * len(buf) + 64, np.uint8)
    info = np.empty(INFO, np.int64)
    path = np.empty((FRAMES, PATH_COLUMNS), np.int64)
    edits = np.empty((_FEW, 2), np.int64)
    _transcode(body, buf, out, edits, path, info)
    if info[EDITS]:
        if info[EDITS] > _FEW:
            edits = np.empty((info[EDITS], 2), np.int64)
            _transcode(body, buf, out, edits, path, info)
        text = buf.copy()
        edit(buf, edits[: info[EDITS]], text)
        buf = text
        buf.flags.writeable = False
        _transcode(body, buf, out, edits, path, info)
        assert not info[EDITS]
    if info[ERROR]:
        raise OtlpJsonError(_message(buf, path, info))
    return out[: info[LENGTH]].tobytes()


def _transcode(
    body: bytes | bytearray | memoryview,
    buf: Bytes,
    out: Bytes,
    edits: Rows,
    path: Rows,
    info: Rows,
) -> None:
    """Run the kernel; raise if ``buf`` is not JSON."""
    stack = np.empty((FRAMES, STACK_COLUMNS), np.int64)
    seen = np.full((FRAMES, SLOTS), -1, np.int64)
    opened = np.empty(MAX_LEVELS, np.int64)
    with np.errstate(over="ignore"):  # large integers wrap around, which warns with the JIT off
        code = transcode(buf, out, stack, seen, opened, edits, path, info)
    if code == TOO_DENSE:
        raise OtlpJsonError(
            f"The body has more than one JSON object or array for every {BYTES_A_CONTAINER} bytes. "
            "Send spans and attributes that are not empty."
        )
    if code:
        raise OtlpJsonError(_not_json(body))


def _not_json(body: bytes | bytearray | memoryview) -> str:
    """Say what is wrong with text that the kernel refused: orjson finds the place faster than the
    kernel found the text wrong."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        return f"The body is not JSON: {error}. Send an ExportTraceServiceRequest as JSON in UTF-8."
    return f"the body: expected an object, got {_shown(value)}."  # a number that ends the text


def _message(buf: Bytes, path: Rows, info: Rows) -> str:
    """Say what is wrong with a value, and where it is."""
    code = info[ERROR]
    where = ""
    for name, index in path[: info[ERROR_DEPTH] + 1].tolist():
        where += f".{NAMES[name]}" if where else NAMES[name]
        if index >= 0:
            where += f"[{index}]"
    if code == NOT_OBJECT:
        expected = "an object"
    elif code == NOT_ARRAY:
        expected = "an array"
    elif code == TOO_DEEP:
        expected = f"values nested at most {MAX_DEPTH} messages deep"
    elif code == SEVERAL_VALUES:
        expected = f"one value, not several ({', '.join(_given(info))})"
    else:
        assert code == BAD_VALUE
        kind = info[ERROR_FIELD] & 0xFF
        if kind == ENUM:
            name = NAMES[path[info[ERROR_DEPTH], 0]]
            expected = f"the enum's number, not its name ({_EXAMPLES[name]})"
        else:
            expected = _VALUES[int(kind)]
    return f"{where or 'the body'}: expected {expected}, got {_value(buf, int(info[ERROR_OFF]))}."


def _given(info: Rows) -> list[str]:
    """Return the names of the values given in an ``AnyValue``, in their order."""
    names = list(FIELDS[ANY_VALUE])
    offsets = info[ERROR_GIVEN + 1 :]
    slots = [slot for slot in range(len(names)) if info[ERROR_GIVEN] >> slot & 1]
    return [names[slot] for slot in sorted(slots, key=lambda slot: int(offsets[slot]))]


def _value(buf: Bytes, off: int) -> str:
    """Describe the JSON value at an offset."""
    first = buf[off]
    if first == OPEN_OBJECT:
        return "an object"
    if first == OPEN_ARRAY:
        return "an array"
    end = off + 1
    if first == QUOTE:
        end = string_end(buf, end)[0] + 1
    else:
        while end < len(buf) and buf[end] not in _ENDS:
            end += 1
    return _shown(orjson.loads(buf[off:end].tobytes()))


_ENDS = frozenset([COMMA, CLOSE_OBJECT, CLOSE_ARRAY, *b" \t\r\n"])


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) > 60:
        return repr(value[:60]) + "…"
    return repr(value)


def warm_up() -> None:
    """Compile the kernels for JSON, or load them from the cache on disk."""
    to_protobuf(b'{"resourceSpans": 0, "resourceSpans": []}')
