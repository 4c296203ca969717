"""Protobuf request bodies to columns: the front of the scanner.

Decodes ``opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest``
(opentelemetry-proto 1.x). Accepts what the protobuf library accepts, gives the same values, and
refuses the rest. The kernels behind it, and what they promise, are in
:mod:`betrace.service.otlp.scanner`, :mod:`betrace.service.otlp.attributes` and
:mod:`betrace.service.otlp.primitives`; what others need of them is found here as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from betrace.service.otlp.attributes import (
    ARRAY,
    BOOL,
    BYTES,
    DOUBLE,
    INT,
    KVLIST,
    LENGTH,
    MISSING,
    OUT_SIZE,
    RESOURCE_ATTRIBUTES,
    SPAN_ATTRIBUTES,
    STRING,
    TYPE,
    VALUE,
    find_attribute,
    find_resource_attribute,
    next_array_item,
)
from betrace.service.otlp.columns import (
    BODY_COLUMNS,
    MSG_LEN,
    MSG_OFF,
    RESOURCE_COLUMNS,
    RESOURCE_LEN,
    RESOURCE_OFF,
    SCOPE_COLUMNS,
    SPAN_COLUMNS,
    Bytes,
    SpanBatch,
)
from betrace.service.otlp.primitives import (
    BAD_GROUP,
    BAD_LENGTH,
    BAD_TAG,
    BAD_UTF8,
    BAD_VARINT,
    BAD_WIRE_TYPE,
    BYTES_TYPE,
    TOO_DEEP,
    TRUNCATED,
    hash_bytes,
    same_bytes,
)
from betrace.service.otlp.scanner import (
    COUNTS,
    MAX_DEPTH,
    RESOURCES,
    SCOPES,
    SPANS,
    STACK_COLUMNS,
    scan,
)

__all__ = [
    "ARRAY",
    "BOOL",
    "BYTES",
    "DOUBLE",
    "ERRORS",
    "INT",
    "KVLIST",
    "LENGTH",
    "MISSING",
    "OUT_SIZE",
    "RESOURCE_ATTRIBUTES",
    "SPAN_ATTRIBUTES",
    "STRING",
    "TYPE",
    "VALUE",
    "find_attribute",
    "find_resource_attribute",
    "hash_bytes",
    "hash_text",
    "next_array_item",
    "same_bytes",
    "scan_bodies",
    "warm_up",
]

_RESEND = "Send an ExportTraceServiceRequest as application/x-protobuf, whole and unaltered."
ERRORS: dict[int, str] = {
    TRUNCATED: f"The body ends, or a message in it ends, in the middle of a field. {_RESEND}",
    BAD_VARINT: f"A number has more than the ten bytes that protobuf allows. {_RESEND}",
    BAD_TAG: f"A field has the number 0 or one beyond what protobuf allows. {_RESEND}",
    BAD_WIRE_TYPE: f"A field has the wire type 6 or 7, which protobuf does not know. {_RESEND}",
    BAD_LENGTH: f"A field's length is beyond the 2 GiB that protobuf allows. {_RESEND}",
    BAD_UTF8: "A text field is not valid UTF-8. Send text as UTF-8, other bytes as bytes_value.",
    TOO_DEEP: f"Values are nested more than {MAX_DEPTH} messages deep. Send flatter attributes.",
    BAD_GROUP: f"A group is not closed, or closed without being open. {_RESEND}",
}
"""For each value of the body column ``ERROR``: what is wrong, and what to do."""

# The smallest span that is accepted: a trace id of 2 + 16 bytes, a span id of 2 + 8, and the
# tag and length of the span itself. So a body has at most this many spans for its size, and
# as many resources and scopes, which get a row only with the first span accepted in them.
_SMALLEST_SPAN = 30
_USUAL_SPAN = 120
_USUAL_SPANS_PER_RESOURCE = 4


def hash_text(text: str) -> int:
    """:func:`hash_bytes` of the text's UTF-8."""
    data = _as_array(text.encode())
    with np.errstate(over="ignore"):
        return int(hash_bytes(data, 0, len(data)))


def _as_array(data: bytes | bytearray | memoryview) -> Bytes:
    """``data`` as an array on the same memory, read-only, so that kernels see one type."""
    array = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    return array


def scan_bodies(tenant: str, bodies: Sequence[bytes | bytearray | memoryview]) -> SpanBatch:
    """Scan the protobuf bodies of one tenant's requests in one kernel call.

    Returns a batch whose ``bodies`` row *i* tells about ``bodies[i]``. A body with an error
    (``ERROR`` not 0, see ``ERRORS``) contributes no spans and leaves the others alone.
    A span with a trace id or a span id that is not one is left out and counted in its body's
    row. A resource or a scope has a row only if a span in it was accepted.

    A single body is not copied: the batch's ``buf`` is its memory, which must not change
    while the batch is in use.
    """
    buf = _as_array(bodies[0] if len(bodies) == 1 else b"".join(bodies))
    starts = np.zeros(len(bodies) + 1, np.int64)
    np.cumsum([len(body) for body in bodies], out=starts[1:])
    most = len(buf) // _SMALLEST_SPAN
    room = min(most, len(buf) // _USUAL_SPAN + 16)
    other_room = min(most, room // _USUAL_SPANS_PER_RESOURCE + 16)
    body_rows = np.empty((len(bodies), BODY_COLUMNS), np.int64)
    stack = np.empty((MAX_DEPTH, STACK_COLUMNS), np.int64)
    out = np.empty(OUT_SIZE, np.int64)
    counts = np.empty(COUNTS, np.int64)
    while True:
        spans = np.empty((room, SPAN_COLUMNS), np.int64)
        resources = np.empty((other_room, RESOURCE_COLUMNS), np.int64)
        scopes = np.empty((other_room, SCOPE_COLUMNS), np.int64)
        with np.errstate(over="ignore"):  # the hash wraps around; matters with the JIT off
            full = scan(buf, starts, spans, resources, scopes, body_rows, stack, out, counts)
        if not full:
            break
        room = other_room = most  # cannot be exceeded
    return SpanBatch(
        tenant=tenant,
        buf=buf,
        spans=spans[: counts[SPANS]],
        resources=resources[: counts[RESOURCES]],
        scopes=scopes[: counts[SCOPES]],
        bodies=body_rows,
    )


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field, small enough that its tag and length take a byte each."""
    return bytes([number << 3 | BYTES_TYPE, len(payload)]) + payload


def _sample() -> bytes:
    """A request with one span; the resource and the span have the attribute k = ["v"]."""
    attribute = _field(1, b"k") + _field(2, _field(5, _field(1, _field(1, b"v"))))
    span = _field(1, b"\1" * 16) + _field(2, b"\1" * 8) + _field(5, b"a") + _field(9, attribute)
    return _field(1, _field(1, _field(1, attribute)) + _field(2, _field(2, span)))


def warm_up() -> None:
    """Compile every kernel of this package, or load it from the cache on disk.

    Takes seconds when there is no cache, so call it from a worker thread at start.
    """
    batch = scan_bodies("warm-up", [_sample()])
    key = _as_array(b"k")
    out = np.zeros(OUT_SIZE, np.int64)
    span, resource = batch.spans[0], batch.resources[0]
    find_attribute(batch.buf, span[MSG_OFF], span[MSG_LEN], SPAN_ATTRIBUTES, key, 0, len(key), out)
    next_array_item(batch.buf, out[VALUE], out[LENGTH], 0, out)
    find_resource_attribute(
        batch.buf, resource[RESOURCE_OFF], resource[RESOURCE_LEN], key, 0, len(key), out
    )
    hash_text("warm-up")
    same_bytes(key, 0, key, 0, len(key))
