"""Compares the protobuf library's reading of a request with the scanner's."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValueList

from betrace.service.otlp import wire
from betrace.service.otlp.attributes import (
    ARRAY,
    BOOL,
    BYTES,
    DOUBLE,
    INT,
    KVLIST,
    MISSING,
    OUT_SIZE,
    SPAN_ATTRIBUTES,
    STRING,
    TYPE,
    find_attribute,
    find_resource_attribute,
    next_array_item,
)
from betrace.service.otlp.columns import (
    BODY,
    COMPLETE,
    END,
    ERROR,
    FIRST_SPAN,
    FLAGS,
    HAS_PARENT,
    KIND,
    MESSAGE_LEN,
    MESSAGE_OFF,
    MSG_LEN,
    MSG_OFF,
    NAME_HASH,
    PARENT_ID,
    REJECTED_SPAN_ID,
    REJECTED_TRACE_ID,
    RESOURCE,
    RESOURCE_LEN,
    RESOURCE_OFF,
    SCOPE,
    SCOPE_NAME_LEN,
    SCOPE_NAME_OFF,
    SERVICE_LEN,
    SERVICE_OFF,
    SPAN_COUNT,
    SPAN_ID,
    START,
    STATUS,
    TRACE_HI,
    TRACE_LO,
    SpanBatch,
)  # fmt: skip

_TYPES = {
    None: MISSING,
    "string_value": STRING,
    "bool_value": BOOL,
    "int_value": INT,
    "double_value": DOUBLE,
    "array_value": ARRAY,
    "kvlist_value": KVLIST,
    "bytes_value": BYTES,
    "string_value_strindex": MISSING,  # only in the profiles signal
}


def parse(body: bytes) -> Any:
    """Return the request as read by the library, or None if it refuses."""
    try:
        return ExportTraceServiceRequest.FromString(body)
    except DecodeError:
        return None


def check(bodies: Sequence[bytes], strict: bool = False) -> int:
    """Scan ``bodies`` together and compare everything; return how many were accepted.

    ``strict``: no value contains two arrays, of which the finder may return only the last.
    """
    batch = wire.scan_bodies("tenant", bodies)
    assert len(batch.bodies) == len(bodies)
    row = accepted = 0
    for number, body in enumerate(bodies):
        request = parse(body)
        summary = batch.bodies[number]
        assert summary[FIRST_SPAN] == row
        if request is None:
            assert summary[ERROR] in wire.ERRORS, body.hex()
            assert 0 <= summary[5] <= len(body)
            assert summary[SPAN_COUNT] == 0
            assert summary[REJECTED_TRACE_ID] == summary[REJECTED_SPAN_ID] == 0
            continue
        assert summary[ERROR] == 0, (wire.ERRORS[int(summary[ERROR])], body.hex())
        accepted += 1
        bad_trace_ids = bad_span_ids = 0
        first = row
        for resource_spans in request.resource_spans:
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    if len(span.trace_id) != 16 or not any(span.trace_id):
                        bad_trace_ids += 1
                    elif len(span.span_id) != 8 or not any(span.span_id):
                        bad_span_ids += 1
                    else:
                        _check_span(batch, row, number, span, strict)
                        _check_surroundings(batch, row, resource_spans, scope_spans, strict)
                        row += 1
        assert summary[SPAN_COUNT] == row - first
        assert summary[REJECTED_TRACE_ID] == bad_trace_ids
        assert summary[REJECTED_SPAN_ID] == bad_span_ids
    assert len(batch) == row
    return accepted


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _check_span(batch: SpanBatch, row: int, number: int, span: Any, strict: bool) -> None:
    columns = batch.spans[row]
    assert columns[TRACE_HI] == _signed(span.trace_id[:8])
    assert columns[TRACE_LO] == _signed(span.trace_id[8:])
    assert columns[SPAN_ID] == _signed(span.span_id)
    parent = span.parent_span_id
    assert columns[PARENT_ID] == (_signed(parent) if len(parent) == 8 else 0)
    assert bool(columns[FLAGS] & HAS_PARENT) == any(parent)
    assert columns[START] == min(span.start_time_unix_nano, 2**63 - 1)
    assert columns[END] == min(span.end_time_unix_nano, 2**63 - 1)
    assert batch.name(row) == span.name
    assert columns[NAME_HASH] == wire.hash_text(span.name)
    assert columns[KIND] == span.kind
    assert columns[STATUS] == span.status.code
    message = batch.text(int(columns[MESSAGE_OFF]), int(columns[MESSAGE_LEN]))
    assert message == span.status.message
    assert columns[BODY] == number
    reparsed = type(span).FromString(_bytes(batch, columns[MSG_OFF], columns[MSG_LEN]))
    assert _same(reparsed, span)
    complete = _first(span.attributes, "trace.complete")
    says = complete.WhichOneof("value") if complete else None
    assert bool(columns[FLAGS] & COMPLETE) == (
        (says == "bool_value" and complete.bool_value)
        or (says == "string_value" and complete.string_value == "true")
    )
    for key in {a.key for a in span.attributes} | {"no such key"}:
        out = np.full(OUT_SIZE, -7, np.int64)
        wanted = np.frombuffer(f"<{key}".encode(), np.uint8)
        kind = find_attribute(
            batch.buf, columns[MSG_OFF], columns[MSG_LEN], SPAN_ATTRIBUTES,
            wanted, 1, len(wanted) - 1, out,
        )  # fmt: skip
        assert kind == out[TYPE]
        _check_value(batch, out, _first(span.attributes, key), strict)


def _check_surroundings(
    batch: SpanBatch, row: int, resource_spans: Any, scope_spans: Any, strict: bool
) -> None:
    scope = batch.scopes[batch.spans[row, SCOPE]]
    name = batch.text(int(scope[SCOPE_NAME_OFF]), int(scope[SCOPE_NAME_LEN]))
    assert name == scope_spans.scope.name
    resource = batch.resources[batch.spans[row, RESOURCE]]
    attributes = resource_spans.resource.attributes
    service = _first(attributes, "service.name")
    if service is not None and service.WhichOneof("value") == "string_value":
        found = batch.text(int(resource[SERVICE_OFF]), int(resource[SERVICE_LEN]))
        assert found == service.string_value
    else:
        assert resource[SERVICE_LEN] == -1
    for key in {a.key for a in attributes} | {"no such key"}:
        out = np.full(OUT_SIZE, -7, np.int64)
        wanted = np.frombuffer(f"<{key}".encode(), np.uint8)
        kind = find_resource_attribute(
            batch.buf, resource[RESOURCE_OFF], resource[RESOURCE_LEN],
            wanted, 1, len(wanted) - 1, out,
        )  # fmt: skip
        assert kind == out[TYPE]
        _check_value(batch, out, _first(attributes, key), strict)


def _first(attributes: Any, key: str) -> Any:
    """Return the value of the first attribute with that key and a value."""
    for attribute in attributes:
        if attribute.key == key and _TYPES[attribute.value.WhichOneof("value")] != MISSING:
            return attribute.value
    return None


def _bytes(batch: SpanBatch, off: int, length: int) -> bytes:
    return batch.buf[off : off + length].tobytes()


def _same(a: Message, b: Message) -> bool:
    return a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True)


def _check_value(batch: SpanBatch, out: Any, value: AnyValue | None, strict: bool) -> None:
    """Check that a finder's ``out`` agrees with ``value``."""
    kind, payload, length = (int(x) for x in out[:3])
    member = value.WhichOneof("value") if value is not None else None
    assert kind == _TYPES[member]
    if value is None or kind == MISSING:
        assert payload == length == 0
    elif kind == STRING:
        assert batch.text(payload, length) == value.string_value
    elif kind == BYTES:
        assert _bytes(batch, payload, length) == value.bytes_value
    elif kind == BOOL:
        assert payload == value.bool_value
    elif kind == INT:
        assert payload == value.int_value
    elif kind == DOUBLE:
        bits = struct.unpack("<q", struct.pack("<d", value.double_value))[0]
        # The library may quieten a signalling NaN on the way through Python.
        assert payload == bits or value.double_value != value.double_value
    elif kind == ARRAY:
        array = ArrayValue.FromString(_bytes(batch, payload, length))
        _check_tail(array.values, value.array_value.values, strict)
        _check_items(batch, payload, length, array, strict)
    else:
        assert kind == KVLIST
        pairs = KeyValueList.FromString(_bytes(batch, payload, length))
        _check_tail(pairs.values, value.kvlist_value.values, strict)


def _check_tail(found: Any, whole: Any, strict: bool) -> None:
    """Check that ``found`` is ``whole``, or its end if two occurrences merged."""
    assert len(found) == len(whole) if strict else len(found) <= len(whole)
    for a, b in zip(reversed(found), reversed(whole), strict=False):
        assert _same(a, b)


def _check_items(batch: SpanBatch, off: int, length: int, array: ArrayValue, strict: bool) -> None:
    out = np.zeros(OUT_SIZE, np.int64)
    cursor = 0
    for item in array.values:
        cursor = next_array_item(batch.buf, off, length, cursor, out)
        assert cursor > 0
        _check_value(batch, out, item, strict)
    assert next_array_item(batch.buf, off, length, cursor, out) == -1
    assert out[TYPE] == MISSING
