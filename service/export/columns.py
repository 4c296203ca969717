"""Converts spans to an Arrow table, with all fields of a span message except its dropped counts.

Attributes are maps from text to text: text is unchanged, numbers and booleans are written as in
JSON, bytes as base64, lists and maps as JSON. No Python object is created for a span: fields are
read column by column (:mod:`betrace.service.otlp.messages`) into Arrow's buffers.
"""

from __future__ import annotations

import base64
import json
from typing import Any, Final

import numpy as np
import pyarrow as pa
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from betrace.service.otlp.attributes import ARRAY, BOOL, BYTES, DOUBLE, INT, KVLIST, STRING
from betrace.service.otlp.columns import (
    BODY,
    END,
    FLAGS,
    HAS_PARENT,
    KIND,
    MESSAGE_LEN,
    MESSAGE_OFF,
    MSG_LEN,
    MSG_OFF,
    NAME_LEN,
    NAME_OFF,
    PARENT_ID,
    RESOURCE,
    RESOURCE_LEN,
    RESOURCE_OFF,
    SERVICE_LEN,
    SERVICE_OFF,
    SPAN_ID,
    START,
    STATUS,
    TRACE_HI,
    TRACE_LO,
    Bytes,
    Rows,
    SpanBatch,
)
from betrace.service.otlp.messages import (
    KEY_OFFSET,
    OFFSET,
    PARENT,
    SIZE,
    VALUE,
    VALUE_SIZE,
    VALUE_TYPE,
    fixed_numbers,
    gather,
    key_values,
    last_of_each,
    submessages,
)

_NS = pa.timestamp("ns", "UTC")
_ATTRIBUTES = pa.map_(pa.string(), pa.string())

SCHEMA: Final = pa.schema(
    [
        ("trace_id", pa.string()),
        ("span_id", pa.string()),
        ("parent_span_id", pa.string()),
        ("trace_state", pa.string()),
        ("flags", pa.uint32()),
        ("name", pa.string()),
        ("kind", pa.string()),
        ("start_time", _NS),
        ("end_time", _NS),
        ("duration_ns", pa.int64()),
        ("status", pa.string()),
        ("status_message", pa.string()),
        ("service", pa.string()),
        ("scope_name", pa.string()),
        ("scope_version", pa.string()),
        ("attributes", _ATTRIBUTES),
        ("resource", _ATTRIBUTES),
        (
            "events",
            pa.list_(
                pa.struct([("time", _NS), ("name", pa.string()), ("attributes", _ATTRIBUTES)])
            ),
        ),
        (
            "links",
            pa.list_(
                pa.struct(
                    [
                        ("trace_id", pa.string()),
                        ("span_id", pa.string()),
                        ("attributes", _ATTRIBUTES),
                    ]
                )
            ),
        ),
        ("received_at", _NS),
    ]
)
"""Columns of the archive. Absent text is null, and so is the parent of a root span."""

_KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
_STATUSES = ("unset", "ok", "error")
_SCALARS = ("string_value", "bool_value", "int_value", "double_value")
_INT64_MAX = 2**63 - 1

# Field numbers of opentelemetry-proto, trace.proto and common.proto.
_SCOPE_SPANS, _SPANS = 2, 2
_RESOURCE, _SCOPE = 1, 1
_RESOURCE_ATTRIBUTES = 1
_SCOPE_NAME, _SCOPE_VERSION = 1, 2
_TRACE_STATE, _SPAN_ATTRIBUTES, _EVENTS, _LINKS, _SPAN_FLAGS = 3, 9, 11, 13, 16
_EVENT_TIME, _EVENT_NAME, _EVENT_ATTRIBUTES = 1, 2, 3
_LINK_TRACE_ID, _LINK_SPAN_ID, _LINK_ATTRIBUTES = 1, 2, 4


def span_table(batch: SpanBatch, received_ns: Rows) -> pa.Table:
    """Return the batch's spans, in order. ``received_ns`` is when each body was received, by row
    of ``batch.bodies``."""
    buf, spans = batch.buf, batch.spans
    messages = spans[:, [MSG_OFF, MSG_LEN]]
    scope, scope_names, scope_versions = _scopes(batch)
    flags = fixed_numbers(buf, messages, _SPAN_FLAGS, 4)
    columns: dict[str, Any] = {
        "trace_id": _hex(spans[:, [TRACE_HI, TRACE_LO]]),
        "span_id": _hex(spans[:, [SPAN_ID]]),
        "parent_span_id": _hex(spans[:, [PARENT_ID]], spans[:, FLAGS] & HAS_PARENT == 0),
        "trace_state": _text_field(buf, messages, _TRACE_STATE),
        "flags": pa.array(flags).cast(pa.uint32()),
        "name": _text(buf, spans[:, [NAME_OFF, NAME_LEN]]),
        "kind": _named(spans[:, KIND], _KINDS),
        "start_time": pa.array(spans[:, START]).cast(_NS),
        "end_time": pa.array(spans[:, END]).cast(_NS),
        # A span may end before it starts, because clocks of machines differ.
        "duration_ns": pa.array(np.maximum(0, spans[:, END] - spans[:, START])),
        "status": _named(spans[:, STATUS], _STATUSES),
        "status_message": _text(buf, spans[:, [MESSAGE_OFF, MESSAGE_LEN]], empty_is_null=True),
        "service": _text(buf, batch.resources[:, [SERVICE_OFF, SERVICE_LEN]]).take(
            pa.array(spans[:, RESOURCE])
        ),
        "scope_name": scope_names.take(pa.array(scope)),
        "scope_version": scope_versions.take(pa.array(scope)),
        "attributes": _attributes(buf, messages, _SPAN_ATTRIBUTES),
        "resource": _resources(batch).take(pa.array(spans[:, RESOURCE])),
        "events": _events(buf, messages),
        "links": _links(buf, messages),
        "received_at": pa.array(received_ns[spans[:, BODY]]).cast(_NS),
    }
    return pa.table(columns, SCHEMA)


def _scopes(batch: SpanBatch) -> tuple[Rows, pa.Array, pa.Array]:
    """Return each span's scope as a row number, and the names and versions of the scopes."""
    buf = batch.buf
    around = submessages(buf, batch.resources[:, [RESOURCE_OFF, RESOURCE_LEN]], _SCOPE_SPANS)
    scopes = submessages(buf, around, _SCOPE)
    spans = submessages(buf, around, _SPANS)
    order = np.argsort(spans[:, OFFSET])
    rows = order[np.searchsorted(spans[order, OFFSET], batch.spans[:, MSG_OFF])]
    names, versions = (
        _text(buf, last_of_each(_inner(buf, scopes, field), len(around)), empty_is_null=True)
        for field in (_SCOPE_NAME, _SCOPE_VERSION)
    )
    return spans[rows, PARENT], names, versions


def _resources(batch: SpanBatch) -> pa.MapArray:
    """Return the attributes of each resource."""
    around = batch.resources[:, [RESOURCE_OFF, RESOURCE_LEN]]
    resources = submessages(batch.buf, around, _RESOURCE)
    return _map(batch.buf, _inner(batch.buf, resources, _RESOURCE_ATTRIBUTES), len(around))


def _inner(buf: Bytes, parts: Rows, field: int) -> Rows:
    """Find a field in ``parts``, and count it for the message around its part: protobuf merges
    repeated occurrences of a message."""
    found = submessages(buf, parts, field)
    found[:, PARENT] = parts[found[:, PARENT], PARENT]
    return found


def _events(buf: Bytes, messages: Rows) -> pa.ListArray:
    found = submessages(buf, messages, _EVENTS)
    times = fixed_numbers(buf, found, _EVENT_TIME, 8)
    events = pa.StructArray.from_arrays(
        [
            pa.array(np.where(times < 0, _INT64_MAX, times)).cast(_NS),
            _text_field(buf, found, _EVENT_NAME),
            _attributes(buf, found, _EVENT_ATTRIBUTES),
        ],
        fields=list(SCHEMA.field("events").type.value_type),
    )
    return pa.ListArray.from_arrays(_starts(found, len(messages)), events)


def _links(buf: Bytes, messages: Rows) -> pa.ListArray:
    found = submessages(buf, messages, _LINKS)
    links = pa.StructArray.from_arrays(
        [
            _hex_field(buf, found, _LINK_TRACE_ID),
            _hex_field(buf, found, _LINK_SPAN_ID),
            _attributes(buf, found, _LINK_ATTRIBUTES),
        ],
        fields=list(SCHEMA.field("links").type.value_type),
    )
    return pa.ListArray.from_arrays(_starts(found, len(messages)), links)


def _starts(found: Rows, messages: int) -> pa.Array:
    """Return the offset of each message's first item in ``found``, and the total at the end."""
    counts = np.bincount(found[:, PARENT], minlength=messages)
    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def _attributes(buf: Bytes, messages: Rows, field: int) -> pa.MapArray:
    return _map(buf, submessages(buf, messages, field), len(messages))


def _map(buf: Bytes, found: Rows, messages: int) -> pa.MapArray:
    pairs = key_values(buf, found)
    keys = _text(buf, pairs[:, KEY_OFFSET : KEY_OFFSET + 2])
    return pa.MapArray.from_arrays(_starts(found, messages), keys, _values(buf, found, pairs))


def _values(buf: Bytes, found: Rows, pairs: Rows) -> pa.Array:
    """Return attribute values as text, null if absent. ``found`` are attributes, ``pairs`` their
    decoded keys and values."""
    kinds = pairs[:, VALUE_TYPE]
    parts, rows = [pa.nulls(0, pa.string())], []
    for kind in np.unique(kinds).tolist():
        where = np.flatnonzero(kinds == kind)
        of = pairs[where]
        if kind == STRING:
            texts = _text(buf, of[:, [VALUE, VALUE_SIZE]])
        elif kind == INT:
            texts = pa.array(of[:, VALUE])
        elif kind == DOUBLE:
            texts = pa.array(np.ascontiguousarray(of[:, VALUE]).view(np.float64))
        elif kind == BOOL:
            texts = pa.array(of[:, VALUE] != 0)
        elif kind in (ARRAY, KVLIST, BYTES):
            texts = _rare(buf, found[where])
        else:
            texts = pa.nulls(len(of))
        parts.append(texts.cast(pa.string()))
        rows.append(where)
    order = np.empty(len(pairs), np.int64)
    if rows:
        order[np.concatenate(rows)] = np.arange(len(pairs))
    return pa.concat_arrays(parts).take(pa.array(order))


def _rare(buf: Bytes, found: Rows) -> pa.Array:
    """Return values that are lists, maps or bytes as text; equal attributes are decoded once."""
    known: dict[bytes, str] = {}
    texts = []
    for offset, size in found[:, :PARENT].tolist():
        raw = buf[offset : offset + size].tobytes()
        text = known.get(raw)
        if text is None:
            value = _plain(KeyValue.FromString(raw).value)
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            known[raw] = text
        texts.append(text)
    return pa.array(texts, pa.string())


def _plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(each) for each in value.array_value.values]
    if kind == "kvlist_value":
        return {pair.key: _plain(pair.value) for pair in value.kvlist_value.values}
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    return getattr(value, kind) if kind in _SCALARS else None


def _text_field(buf: Bytes, messages: Rows, field: int) -> pa.Array:
    """Return a text field of each message, null if absent or empty."""
    found = last_of_each(submessages(buf, messages, field), len(messages))
    return _text(buf, found, empty_is_null=True)


def _text(buf: Bytes, ranges: Rows, *, empty_is_null: bool = False) -> pa.Array:
    """Return text by offset and size, null if the size is negative."""
    data, starts = gather(buf, ranges)
    texts = pa.LargeStringArray.from_buffers(
        len(ranges), pa.py_buffer(starts), pa.py_buffer(data)
    ).cast(pa.string())
    absent = ranges[:, SIZE] <= 0 if empty_is_null else ranges[:, SIZE] < 0
    return _null_where(texts, absent)


def _hex_field(buf: Bytes, messages: Rows, field: int) -> pa.Array:
    found = last_of_each(submessages(buf, messages, field), len(messages))
    data, starts = gather(buf, found)
    digits = data.tobytes().hex().encode()
    texts = pa.LargeStringArray.from_buffers(
        len(found), pa.py_buffer(starts * 2), pa.py_buffer(digits)
    )
    return _null_where(texts.cast(pa.string()), found[:, SIZE] <= 0)


def _hex(words: Rows, absent: Any = None) -> pa.Array:
    """Return ids of one or two words as hex digits."""
    digits = words.astype(">i8").tobytes().hex().encode()
    starts = np.arange(len(words) + 1, dtype=np.int32) * (16 * words.shape[1])
    texts = pa.StringArray.from_buffers(len(words), pa.py_buffer(starts), pa.py_buffer(digits))
    return texts if absent is None else _null_where(texts, absent)


def _null_where(texts: pa.Array, absent: Any) -> pa.Array:
    if not absent.any():
        return texts
    rows = np.arange(len(texts))
    return texts.take(pa.array(rows, mask=absent))


def _named(numbers_of: Rows, names: tuple[str, ...]) -> pa.Array:
    """Return the names of an enum's numbers; unknown numbers become digits."""
    known = (numbers_of >= 0) & (numbers_of < len(names))
    if known.all():
        return pa.array(names).take(pa.array(numbers_of))
    return pa.array(
        [names[n] if 0 <= n < len(names) else str(n) for n in numbers_of.tolist()], pa.string()
    )
