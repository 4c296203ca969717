"""Scans protobuf request bodies into columns: the interface of the scanner.

Decodes ``opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest``
(opentelemetry-proto 1.x). It accepts exactly what the protobuf library accepts, with the same
values. The kernels are in :mod:`betrace.service.otlp.scanner`,
:mod:`betrace.service.otlp.attributes` and :mod:`betrace.service.otlp.primitives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from betrace.service.otlp.attributes import (
    LENGTH,
    OUT_SIZE,
    SPAN_ATTRIBUTES,
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

_RESEND = "Send a complete ExportTraceServiceRequest as application/x-protobuf."
ERRORS: dict[int, str] = {
    TRUNCATED: f"The body ends, or a message in it ends, in the middle of a field. {_RESEND}",
    BAD_VARINT: f"A number has more than ten bytes, the limit in protobuf. {_RESEND}",
    BAD_TAG: f"A field has the number 0, or one above the limit in protobuf. {_RESEND}",
    BAD_WIRE_TYPE: f"A field has the wire type 6 or 7, which protobuf does not define. {_RESEND}",
    BAD_LENGTH: f"A field is longer than 2 GiB, the limit in protobuf. {_RESEND}",
    BAD_UTF8: "A text field is not valid UTF-8. Send text as UTF-8 and other bytes as bytes_value.",
    TOO_DEEP: f"Values are nested more than {MAX_DEPTH} messages deep. Send flatter attributes.",
    BAD_GROUP: f"A group is not closed, or is closed without being open. {_RESEND}",
}
"""For each value of the body column ``ERROR``: what is wrong and what to do."""

SMALLEST_SPAN = 30
"""Bytes of the smallest accepted span: a trace id of 2 + 16, a span id of 2 + 8, and the span's tag
and length."""
# It bounds the spans in a body of a given size, and the resources and scopes too, because
# those get a row only with their first accepted span.
_USUAL_SPAN = 120
_USUAL_SPANS_PER_RESOURCE = 4


class TooManySpans(ValueError):  # noqa: N818 - named for what it is, HTTP 413
    """A body has more spans than allowed."""


def hash_text(text: str) -> int:
    """:func:`hash_bytes` of the text's UTF-8."""
    data = _as_array(text.encode())
    with np.errstate(over="ignore"):
        return int(hash_bytes(data, 0, len(data)))


def _as_array(data: bytes | bytearray | memoryview) -> Bytes:
    """View ``data`` as a read-only array, so that kernels see one type."""
    array = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    return array


def scan_bodies(
    tenant: str, bodies: Sequence[bytes | bytearray | memoryview], most_spans: int | None = None
) -> SpanBatch:
    """Scan the protobuf bodies of one tenant's requests in one kernel call.

    Row *i* of the batch's ``bodies`` describes ``bodies[i]``. A body with an error (``ERROR`` not
    0, see ``ERRORS``) contributes no spans and does not affect the others. A span with an invalid
    trace or span id is left out and counted in its body's row. A resource or scope has a row only
    if a span in it was accepted.

    A single body is not copied: the batch's ``buf`` is its memory, which must not change while the
    batch is in use. Raises :exc:`TooManySpans` if the bodies together have more than
    ``most_spans``.
    """
    buf = _as_array(bodies[0] if len(bodies) == 1 else b"".join(bodies))
    starts = np.array([0, *accumulate(map(len, bodies))], np.int64)
    most = len(buf) // SMALLEST_SPAN
    if most_spans is not None:
        most = min(most, most_spans)
    capacity = min(most, len(buf) // _USUAL_SPAN + 16)
    other_capacity = min(most, capacity // _USUAL_SPANS_PER_RESOURCE + 16)
    body_rows = np.empty((len(bodies), BODY_COLUMNS), np.int64)
    stack = np.empty((MAX_DEPTH, STACK_COLUMNS), np.int64)
    out = np.empty(OUT_SIZE, np.int64)
    counts = np.empty(COUNTS, np.int64)
    while True:
        spans = np.empty((capacity, SPAN_COLUMNS), np.int64)
        resources = np.empty((other_capacity, RESOURCE_COLUMNS), np.int64)
        scopes = np.empty((other_capacity, SCOPE_COLUMNS), np.int64)
        with np.errstate(over="ignore"):  # the hash wraps around, which warns with the JIT off
            full = scan(buf, starts, spans, resources, scopes, body_rows, stack, out, counts)
        if not full:
            break
        if capacity == other_capacity == most:
            raise TooManySpans
        capacity = other_capacity = most  # cannot be exceeded
    return SpanBatch(
        tenant=tenant,
        buf=buf,
        spans=spans[: counts[SPANS]],
        resources=resources[: counts[RESOURCES]],
        scopes=scopes[: counts[SCOPES]],
        bodies=body_rows,
    )


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field whose tag and length take one byte each."""
    return bytes([number << 3 | BYTES_TYPE, len(payload)]) + payload


def sample() -> bytes:
    """A request with one span; the resource and the span have the attribute k = ["v"]."""
    attribute = _field(1, b"k") + _field(2, _field(5, _field(1, _field(1, b"v"))))
    span = _field(1, b"\1" * 16) + _field(2, b"\1" * 8) + _field(5, b"a") + _field(9, attribute)
    return _field(1, _field(1, _field(1, attribute)) + _field(2, _field(2, span)))


def warm_up() -> None:
    """Compile every kernel of this package, or load it from the cache on disk.

    Takes seconds without a cache: call it from a worker thread at start.
    """
    batch = scan_bodies("warm-up", [sample()])
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
