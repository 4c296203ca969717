"""Spans of whole traces from scanned batches, for relational rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from betrace.service.otlp.columns import (
    END,
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
    SCOPE,
    SCOPE_NAME_LEN,
    SCOPE_NAME_OFF,
    SERVICE_LEN,
    SERVICE_OFF,
    SPAN_ID,
    START,
    STATUS,
    TRACE_HI,
    TRACE_LO,
    SpanBatch,
)
from betrace.service.otlp.columns import FLAGS as SPAN_FLAGS
from betrace.service.rules.match import plain_value
from betrace.service.rules.syntax import KINDS, STATUSES
from betrace.service.rules.trace_tree import Attributes, SpanPart, TraceSpan
from betrace.service.rules.values import AttributeValue

TraceId = tuple[int, int]
"""The halves of a trace id, as rows contain them."""

Details = tuple[Attributes, Sequence[SpanPart], Sequence[SpanPart]]

_MASK = 2**64 - 1
_RESOURCE_TAG = 1 << 3 | 2


def trace_spans(
    batch: SpanBatch, wanted: Collection[TraceId]
) -> Iterator[tuple[TraceId, TraceSpan]]:
    """The spans of the wanted traces in a batch, in order of arrival. They hold copies of their
    bytes, not of the batch's."""
    if not len(batch):
        return
    ids = batch.spans[:, [TRACE_HI, TRACE_LO]]
    rows = np.flatnonzero(np.isin(ids[:, 1], [lo for _, lo in wanted])).tolist()
    resources: dict[int, Attributes] = {}
    for row in rows:
        values = batch.spans[row].tolist()
        trace = (values[TRACE_HI], values[TRACE_LO])
        if trace in wanted:
            number = values[RESOURCE]
            if number not in resources:
                resources[number] = _resource(batch, number)
            yield trace, _span(batch, values, resources[number])


def _span(batch: SpanBatch, values: list[int], resource: Attributes) -> TraceSpan:
    message = batch.buf[values[MSG_OFF] : values[MSG_OFF] + values[MSG_LEN]].tobytes()
    scope = batch.scopes[values[SCOPE]].tolist()
    owner = batch.resources[values[RESOURCE]].tolist()
    has_service = owner[SERVICE_LEN] >= 0
    parent = ""
    if values[SPAN_FLAGS] & HAS_PARENT:
        parent = f"{values[PARENT_ID] & _MASK:016x}"
        if not values[PARENT_ID]:  # an id of another length
            parent = Span.FromString(message).parent_span_id.hex()
    return TraceSpan(
        id=f"{values[SPAN_ID] & _MASK:016x}",
        parent_id=parent,
        name=batch.text(values[NAME_OFF], values[NAME_LEN]),
        start=values[START],
        end=values[END],
        kind=_named(KINDS, values[KIND]),
        status=_named(STATUSES, values[STATUS]),
        status_message=batch.text(values[MESSAGE_OFF], values[MESSAGE_LEN]),
        service=batch.text(owner[SERVICE_OFF], owner[SERVICE_LEN]) if has_service else None,
        scope=batch.text(scope[SCOPE_NAME_OFF], scope[SCOPE_NAME_LEN]),
        resource=resource,
        details=_reader(message, values[START]),
    )


def _named(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else names[0]


def _reader(message: bytes, start: int) -> Callable[[], Details]:
    def read() -> Details:
        span = Span.FromString(message)
        events = [
            SpanPart(_attributes(e.attributes), e.name, int(e.time_unix_nano) - start)
            for e in span.events
        ]
        links = [
            SpanPart(
                _attributes(link.attributes),
                trace_id=link.trace_id.hex(),
                span_id=link.span_id.hex(),
            )
            for link in span.links
        ]
        return _attributes(span.attributes), events, links

    return read


def _attributes(pairs: Sequence[KeyValue]) -> Attributes:
    """The first value of each key, as the fold sees it."""
    found: dict[str, AttributeValue] = {}
    for pair in pairs:
        if pair.key not in found:
            value = plain_value(pair.value)
            if value is not None:
                found[pair.key] = value
    return found


def _resource(batch: SpanBatch, number: int) -> Attributes:
    """The attributes of a ResourceSpans message, whose spans are not read."""
    row = batch.resources[number].tolist()
    data = batch.buf[row[RESOURCE_OFF] : row[RESOURCE_OFF] + row[RESOURCE_LEN]].tobytes()
    merged = b""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 2:
            length, at = _varint(data, at)
            if tag == _RESOURCE_TAG:
                merged += data[at : at + length]
            at += length
        elif wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:  # groups, which the scanner accepts as unknown fields: read it all
            from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

            return _attributes(ResourceSpans.FromString(data).resource.attributes)
    return _attributes(Resource.FromString(merged).attributes)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
