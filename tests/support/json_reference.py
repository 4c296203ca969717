"""Converts OTLP JSON to protobuf wire bytes with orjson and Python: what the kernel must equal.

Protobuf's JSON mapping with OTLP's exceptions (opentelemetry.io/docs/specs/otlp, "JSON
Protobuf Encoding"): lowerCamelCase names, ids as hex in either case, enums as numbers,
64-bit integers as numbers or strings, unknown fields ignored, null as if absent.

The parser (orjson) determines some rules: the text must be UTF-8 without a byte order mark and
without lone surrogates; if an object has a name twice, the last one counts; a number beyond a
double's range is refused. It returns integers beyond 64 bits as doubles. Those are refused here as
out of range, like any integer written as a fraction that a double cannot represent exactly.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import orjson

from betrace.service.otlp.json import OtlpJsonError
from betrace.service.otlp.primitives import BYTES_TYPE, FIXED32, FIXED64, VARINT
from betrace.service.otlp.scanner import MAX_DEPTH

Pairs = dict[str | tuple[str, str], bytes]
"""Encodings already made, because requests repeat much: keys, and attributes by key and text."""

Encoder = Callable[[Any, int, Pairs], bytes]
"""Encodes a JSON value, given its message's depth and the pairs so far, as a field with its tag."""

Fields = dict[str, Encoder]
"""A message type: the encoders of its fields, by JSON name."""


class _Fault(Exception):
    """An invalid value; callers add the path to it."""

    def __init__(self, expected: str, got: object) -> None:
        super().__init__(expected)
        self.expected = expected
        self.got = got
        self.path: list[str | int] = []

    def message(self) -> str:
        path = ""
        for step in reversed(self.path):
            path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
        if isinstance(self.got, dict | list):
            got = "an object" if isinstance(self.got, dict) else "an array"
        elif isinstance(self.got, str) and len(self.got) > 60:
            got = repr(self.got[:60]) + "…"
        else:
            got = repr(self.got)
        return f"{path or 'the body'}: expected {self.expected}, got {got}."


def to_protobuf(body: bytes | memoryview) -> bytes:
    """Convert an ``ExportTraceServiceRequest`` in JSON to protobuf wire bytes.

    Raises :class:`OtlpJsonError`. Ids of a wrong length are passed on: the scanner rejects their
    spans and keeps the others.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise OtlpJsonError(
            f"The body is not JSON: {error}. Send an ExportTraceServiceRequest as JSON in UTF-8."
        ) from None
    try:
        return _message(request, _REQUEST, 0, {})
    except _Fault as fault:
        raise OtlpJsonError(fault.message()) from None


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_LENGTHS = [_varint(n) for n in range(2048)]


def _length(length: int) -> bytes:
    return _LENGTHS[length] if length < 2048 else _varint(length)


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _message(value: Any, fields: Fields, depth: int, pairs: Pairs) -> bytes:
    """Encode the content of a message, without tag and length."""
    if type(value) is not dict:
        raise _Fault("an object", value)
    parts = []
    for name, member in value.items():
        encode = fields.get(name)
        if encode is not None and member is not None:
            try:
                parts.append(encode(member, depth, pairs))
            except _Fault as fault:
                fault.path.append(name)
                raise
    return b"".join(parts)


def _single(number: int, fields: Fields, oneof: bool = False) -> Encoder:
    """Encoder of a field with one message; with ``oneof``, at most one of its fields may be set."""
    tag = _tag(number, BYTES_TYPE)

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if depth >= MAX_DEPTH:
            raise _Fault(f"values nested at most {MAX_DEPTH} messages deep", value)
        content = _message(value, fields, depth + 1, pairs)
        if oneof and len(value) > 1:
            _at_most_one(value, fields)
        return tag + _length(len(content)) + content

    return encode


def _at_most_one(value: dict[str, Any], fields: Fields) -> None:
    given = [name for name, member in value.items() if name in fields and member is not None]
    if len(given) > 1:
        raise _Fault(f"one value, not several ({', '.join(given)})", value)


def _repeated(one: Encoder) -> Encoder:
    """Encoder of a field with an array whose items ``one`` encodes."""

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if type(value) is not list:
            raise _Fault("an array", value)
        parts: list[bytes] = []
        try:
            for item in value:
                parts.append(one(item, depth, pairs))
        except _Fault as fault:
            fault.path.append(len(parts))
            raise
        return b"".join(parts)

    return encode


def _attributes(number: int) -> Encoder:
    """Encoder of a field with an array of ``KeyValue``, with a shortcut for a key and one value."""
    tag = _tag(number, BYTES_TYPE)
    one = _single(number, _KEY_VALUE)

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if type(value) is not list:
            raise _Fault("an array", value)
        parts: list[bytes] = []
        append = parts.append
        known = pairs.get
        short = depth + 2 <= MAX_DEPTH
        try:
            for item in value:
                if short and type(item) is dict and len(item) == 2:
                    key = item.get("key")
                    content = item.get("value")
                    if type(key) is str and type(content) is dict and len(content) == 1:
                        text = content.get("stringValue")
                        if type(text) is str:
                            encoded = known((key, text))
                            if encoded is None:
                                data = text.encode()
                                data = b"".join((b"\x0a", _length(len(data)), data))
                                encoded = _attribute(key, data, pairs)
                                pairs[key, text] = encoded
                            append(tag + encoded)
                            continue
                        ((member, scalar),) = content.items()
                        encode_scalar = _SCALARS.get(member)
                        if encode_scalar is not None and scalar is not None:
                            try:
                                data = encode_scalar(scalar, depth, pairs)
                            except _Fault:
                                pass  # the general encoder finds the error again, and its path
                            else:
                                append(tag + _attribute(key, data, pairs))
                                continue
                append(one(item, depth, pairs))
        except _Fault as fault:
            fault.path.append(len(parts))
            raise
        return b"".join(parts)

    return encode


def _attribute(key: str, value: bytes, pairs: Pairs) -> bytes:
    """Encode a ``KeyValue`` with its length but no tag; ``value`` is its ``AnyValue``'s content."""
    head = pairs.get(key)
    if head is None:
        data = key.encode()
        pairs[key] = head = b"\x0a%b%b\x12" % (_length(len(data)), data)
    size = _length(len(value))
    return b"".join((_length(len(head) + len(size) + len(value)), head, size, value))


def _string(number: int) -> Encoder:
    tag = _tag(number, BYTES_TYPE)

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if type(value) is not str:
            raise _Fault("a string", value)
        data = value.encode()
        return tag + _length(len(data)) + data

    return encode


def _identifier(number: int, size: int) -> Encoder:
    """Encoder of a field with an id of ``size`` bytes in hex; a wrong length stays wrong."""
    tag = _tag(number, BYTES_TYPE)
    usual = tag + _length(size)

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        expected = f"an id of {2 * size} hex digits (not base64)"
        if type(value) is not str:
            raise _Fault(expected, value)
        try:
            if len(value) == 2 * size:
                return usual + binascii.unhexlify(value)
            data = binascii.unhexlify(value if len(value) % 2 == 0 else value + "0")
        except ValueError:
            raise _Fault(expected, value) from None
        if len(data) == size:  # one digit was missing: it must not become a valid id
            data = data[:-1]
        return tag + _length(len(data)) + data

    return encode


_DIGITS = re.compile(r"-?[0-9]{1,20}\Z", re.ASCII)
_EXACT = 2.0**53  # up to here a double represents every integer


def _whole(value: Any, lowest: int, highest: int) -> int:
    """Return an integer given as a number or a string."""
    number = value
    if type(value) is str:
        number = int(value) if _DIGITS.match(value) else None
    elif type(value) is float:
        number = int(value) if value.is_integer() and abs(value) <= _EXACT else None
    if type(number) is not int or not lowest <= number <= highest:
        raise _Fault(f"an integer from {lowest} to {highest}, as a number or a string", value)
    return number


def _integer(number: int, lowest: int, highest: int) -> Encoder:
    tag = _tag(number, VARINT)

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if type(value) is int and 0 <= value <= highest:
            return tag + _length(value)
        return tag + _length(_whole(value, lowest, highest) & 0xFFFFFFFFFFFFFFFF)

    return encode


def _int64(number: int) -> Encoder:
    return _integer(number, -(2**63), 2**63 - 1)


def _int32(number: int) -> Encoder:
    return _integer(number, -(2**31), 2**31 - 1)


def _uint32(number: int) -> Encoder:
    return _integer(number, 0, 2**32 - 1)


def _enum(number: int, example: str) -> Encoder:
    tag = _tag(number, VARINT)

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if type(value) is not int or not -(2**31) <= value < 2**31:
            raise _Fault(f"the enum's number, not its name ({example})", value)
        return tag + _varint(value)

    return encode


def _fixed(number: int, wire_type: int) -> Encoder:
    """Encoder of a field with a fixed64 or fixed32."""
    tag = _tag(number, wire_type)
    size = 8 if wire_type == FIXED64 else 4
    highest = 256**size - 1

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if (
            size == 8
            and type(value) is str
            and len(value) == 19
            and value.isdecimal()
            and value.isascii()
        ):
            return tag + int(value).to_bytes(8, "little")  # a current time in nanoseconds
        return tag + _whole(value, 0, highest).to_bytes(size, "little")

    return encode


def _bool(number: int) -> Encoder:
    tag = _tag(number, VARINT)

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if type(value) is not bool:
            raise _Fault("true or false", value)
        return tag + (b"\1" if value else b"\0")

    return encode


_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?\Z", re.ASCII)
_NOT_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _double(number: int) -> Encoder:
    tag = _tag(number, FIXED64)
    pack = struct.Struct("<d").pack

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        result = value
        if type(value) is int:
            result = float(value)
        elif type(value) is str:
            result = _NOT_NUMBERS.get(value)
            if result is None and _DECIMAL.match(value) and math.isfinite(float(value)):
                result = float(value)
        if type(result) is not float:
            raise _Fault('a number, "NaN", "Infinity" or "-Infinity"', value)
        return tag + pack(result)

    return encode


def _base64(number: int) -> Encoder:
    """Encoder of a field with bytes in base64, standard or URL-safe, with or without padding."""
    tag = _tag(number, BYTES_TYPE)

    def encode(value: Any, depth: int, pairs: Pairs) -> bytes:
        if type(value) is not str:
            raise _Fault("bytes in base64", value)
        plain = value.rstrip("=").replace("-", "+").replace("_", "/")
        try:
            data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        except ValueError:
            raise _Fault("bytes in base64", value) from None
        return tag + _length(len(data)) + data

    return encode


# The messages of opentelemetry-proto. Values nest, so their fields are added later.
_KEY_VALUE: Fields = {"key": _string(1), "keyStrindex": _int32(3)}
_ANY_VALUE: Fields = {}
_KEY_VALUE["value"] = _single(2, _ANY_VALUE, oneof=True)
_SCALARS: Fields = {"boolValue": _bool(2), "intValue": _int64(3), "doubleValue": _double(4)}
_ANY_VALUE.update(
    **_SCALARS,
    stringValue=_string(1),
    arrayValue=_single(5, {"values": _repeated(_single(1, _ANY_VALUE, oneof=True))}),
    kvlistValue=_single(6, {"values": _attributes(1)}),
    bytesValue=_base64(7),
    stringValueStrindex=_int32(8),
)
_ENTITY_REF: Fields = {
    "schemaUrl": _string(1),
    "type": _string(2),
    "idKeys": _repeated(_string(3)),
    "descriptionKeys": _repeated(_string(4)),
}
_RESOURCE: Fields = {
    "attributes": _attributes(1),
    "droppedAttributesCount": _uint32(2),
    "entityRefs": _repeated(_single(3, _ENTITY_REF)),
}
_SCOPE: Fields = {
    "name": _string(1),
    "version": _string(2),
    "attributes": _attributes(3),
    "droppedAttributesCount": _uint32(4),
}
_EVENT: Fields = {
    "timeUnixNano": _fixed(1, FIXED64),
    "name": _string(2),
    "attributes": _attributes(3),
    "droppedAttributesCount": _uint32(4),
}
_LINK: Fields = {
    "traceId": _identifier(1, 16),
    "spanId": _identifier(2, 8),
    "traceState": _string(3),
    "attributes": _attributes(4),
    "droppedAttributesCount": _uint32(5),
    "flags": _fixed(6, FIXED32),
}
_STATUS: Fields = {"message": _string(2), "code": _enum(3, "2 for STATUS_CODE_ERROR")}
_SPAN: Fields = {
    "traceId": _identifier(1, 16),
    "spanId": _identifier(2, 8),
    "traceState": _string(3),
    "parentSpanId": _identifier(4, 8),
    "name": _string(5),
    "kind": _enum(6, "2 for SPAN_KIND_SERVER"),
    "startTimeUnixNano": _fixed(7, FIXED64),
    "endTimeUnixNano": _fixed(8, FIXED64),
    "attributes": _attributes(9),
    "droppedAttributesCount": _uint32(10),
    "events": _repeated(_single(11, _EVENT)),
    "droppedEventsCount": _uint32(12),
    "links": _repeated(_single(13, _LINK)),
    "droppedLinksCount": _uint32(14),
    "status": _single(15, _STATUS),
    "flags": _fixed(16, FIXED32),
}
_SCOPE_SPANS: Fields = {
    "scope": _single(1, _SCOPE),
    "spans": _repeated(_single(2, _SPAN)),
    "schemaUrl": _string(3),
}
_RESOURCE_SPANS: Fields = {
    "resource": _single(1, _RESOURCE),
    "scopeSpans": _repeated(_single(2, _SCOPE_SPANS)),
    "schemaUrl": _string(3),
}
_REQUEST: Fields = {"resourceSpans": _repeated(_single(1, _RESOURCE_SPANS))}
