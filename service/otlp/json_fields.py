"""The fields of the trace messages in OTLP JSON, and the tables by which kernels find them.

Field numbers and types: opentelemetry-proto 1.x.
"""

from __future__ import annotations

import itertools

import numpy as np

from betrace.service.otlp.columns import Rows
from betrace.service.otlp.primitives import BYTES_TYPE, FIXED32, FIXED64, VARINT

# Message types.
(
    REQUEST,
    RESOURCE_SPANS,
    RESOURCE,
    ENTITY_REF,
    SCOPE_SPANS,
    SCOPE,
    SPAN,
    EVENT,
    LINK,
    STATUS,
    KEY_VALUE,
    ANY_VALUE,
    ARRAY_VALUE,
    KVLIST_VALUE,
) = range(14)
MESSAGES = 14

# Kinds of fields.
(
    UNKNOWN,
    MESSAGE,
    REPEATED_MESSAGE,
    REPEATED_STRING,
    STRING,
    TRACE_ID,
    SPAN_ID,
    BASE64,
    BOOL,
    DOUBLE,
    ENUM,
    INT32,
    INT64,
    UINT32,
    FIXED32_FIELD,
    FIXED64_FIELD,
) = range(16)

_WIRE_TYPES = {
    BOOL: VARINT,
    DOUBLE: FIXED64,
    ENUM: VARINT,
    INT32: VARINT,
    INT64: VARINT,
    UINT32: VARINT,
    FIXED32_FIELD: FIXED32,
    FIXED64_FIELD: FIXED64,
}

Field = tuple[int, int] | tuple[int, int, int]
"""Field number, kind, and for messages their type."""

FIELDS: dict[int, dict[str, Field]] = {
    REQUEST: {"resourceSpans": (1, REPEATED_MESSAGE, RESOURCE_SPANS)},
    RESOURCE_SPANS: {
        "resource": (1, MESSAGE, RESOURCE),
        "scopeSpans": (2, REPEATED_MESSAGE, SCOPE_SPANS),
        "schemaUrl": (3, STRING),
    },
    RESOURCE: {
        "attributes": (1, REPEATED_MESSAGE, KEY_VALUE),
        "droppedAttributesCount": (2, UINT32),
        "entityRefs": (3, REPEATED_MESSAGE, ENTITY_REF),
    },
    ENTITY_REF: {
        "schemaUrl": (1, STRING),
        "type": (2, STRING),
        "idKeys": (3, REPEATED_STRING),
        "descriptionKeys": (4, REPEATED_STRING),
    },
    SCOPE_SPANS: {
        "scope": (1, MESSAGE, SCOPE),
        "spans": (2, REPEATED_MESSAGE, SPAN),
        "schemaUrl": (3, STRING),
    },
    SCOPE: {
        "name": (1, STRING),
        "version": (2, STRING),
        "attributes": (3, REPEATED_MESSAGE, KEY_VALUE),
        "droppedAttributesCount": (4, UINT32),
    },
    SPAN: {
        "traceId": (1, TRACE_ID),
        "spanId": (2, SPAN_ID),
        "traceState": (3, STRING),
        "parentSpanId": (4, SPAN_ID),
        "name": (5, STRING),
        "kind": (6, ENUM),
        "startTimeUnixNano": (7, FIXED64_FIELD),
        "endTimeUnixNano": (8, FIXED64_FIELD),
        "attributes": (9, REPEATED_MESSAGE, KEY_VALUE),
        "droppedAttributesCount": (10, UINT32),
        "events": (11, REPEATED_MESSAGE, EVENT),
        "droppedEventsCount": (12, UINT32),
        "links": (13, REPEATED_MESSAGE, LINK),
        "droppedLinksCount": (14, UINT32),
        "status": (15, MESSAGE, STATUS),
        "flags": (16, FIXED32_FIELD),
    },
    EVENT: {
        "timeUnixNano": (1, FIXED64_FIELD),
        "name": (2, STRING),
        "attributes": (3, REPEATED_MESSAGE, KEY_VALUE),
        "droppedAttributesCount": (4, UINT32),
    },
    LINK: {
        "traceId": (1, TRACE_ID),
        "spanId": (2, SPAN_ID),
        "traceState": (3, STRING),
        "attributes": (4, REPEATED_MESSAGE, KEY_VALUE),
        "droppedAttributesCount": (5, UINT32),
        "flags": (6, FIXED32_FIELD),
    },
    STATUS: {"message": (2, STRING), "code": (3, ENUM)},
    KEY_VALUE: {"key": (1, STRING), "value": (2, MESSAGE, ANY_VALUE), "keyStrindex": (3, INT32)},
    ANY_VALUE: {
        "stringValue": (1, STRING),
        "boolValue": (2, BOOL),
        "intValue": (3, INT64),
        "doubleValue": (4, DOUBLE),
        "arrayValue": (5, MESSAGE, ARRAY_VALUE),
        "kvlistValue": (6, MESSAGE, KVLIST_VALUE),
        "bytesValue": (7, BASE64),
        "stringValueStrindex": (8, INT32),
    },
    ARRAY_VALUE: {"values": (1, REPEATED_MESSAGE, ANY_VALUE)},
    KVLIST_VALUE: {"values": (1, REPEATED_MESSAGE, KEY_VALUE)},
}

NAMES = sorted({name for fields in FIELDS.values() for name in fields})
"""All field names; a name's number is its index."""

# A field in an int64: its kind, its slot in its message, the type of its messages, its tag (one
# byte, or two in wire order), its name's number. 0 is an unknown field.
SLOT_SHIFT, CHILD_SHIFT, TAG_SHIFT, NAME_SHIFT = 8, 16, 24, 40
SLOTS = max(len(fields) for fields in FIELDS.values())


def _packed(slot: int, name: str, field: Field) -> int:
    number, kind, *rest = field
    tag = number << 3 | _WIRE_TYPES.get(kind, BYTES_TYPE)
    if tag >= 0x80:
        tag = tag & 0x7F | 0x80 | tag >> 7 << 8
    child = rest[0] if rest else 0
    return (
        kind
        | slot << SLOT_SHIFT
        | child << CHILD_SHIFT
        | tag << TAG_SHIFT
        | NAMES.index(name) << NAME_SHIFT
    )


def packed(message: int, name: str) -> int:
    """Return a field as it is in ``TABLE``."""
    return _packed(list(FIELDS[message]).index(name), name, FIELDS[message][name])


# Names are found by a hash of their length and their first and last bytes that has no collisions
# among them.
HASHES = 256
_LONGEST = 32


def _hash_factors() -> tuple[int, int]:
    for first, last in itertools.product(range(1, HASHES), repeat=2):
        hashes = {(len(n) + first * ord(n[0]) + last * ord(n[-1])) % HASHES for n in NAMES}
        if len(hashes) == len(NAMES):
            return first, last
    raise AssertionError("no factors without collisions")


FIRST_FACTOR, LAST_FACTOR = _hash_factors()


def _name_tables() -> tuple[Rows, Rows, np.ndarray]:
    by_hash = np.full(HASHES, -1, np.int64)
    lengths = np.zeros(len(NAMES), np.int64)
    texts = np.zeros(len(NAMES) * _LONGEST, np.uint8)
    for number, name in enumerate(NAMES):
        key = (len(name) + FIRST_FACTOR * ord(name[0]) + LAST_FACTOR * ord(name[-1])) % HASHES
        by_hash[key] = number
        lengths[number] = len(name)
        texts[number * _LONGEST :][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return by_hash, lengths, texts


NAME_BY_HASH, NAME_LENGTHS, NAME_TEXTS = _name_tables()
NAME_STRIDE = _LONGEST


def _table() -> Rows:
    table = np.zeros(MESSAGES * len(NAMES), np.int64)
    for message, fields in FIELDS.items():
        for slot, (name, field) in enumerate(fields.items()):
            table[message * len(NAMES) + NAMES.index(name)] = _packed(slot, name, field)
    return table


TABLE = _table()
"""The field named ``NAMES[n]`` of message type ``m`` is at ``m * len(NAMES) + n``, packed."""
NAME_COUNT = len(NAMES)
