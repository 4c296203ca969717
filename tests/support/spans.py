"""Batches of spans, made by hand or, if large, by copying rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp.columns import BODY, END, SPAN_ID, START, TRACE_HI, TRACE_LO, SpanBatch
from betrace.service.otlp.wire import scan_bodies

TRACE = b"\1" * 16


@dataclass(frozen=True)
class S:
    """A span; ``x`` is an attribute."""

    id: int
    name: str = "a"
    trace: bytes = TRACE
    start: int = 10
    end: int = 20
    parent: int = 1
    service: str = ""
    error: bool = False
    complete: bool = False
    x: str | None = None


def body(*spans: S) -> bytes:
    """A request with these spans, in this order."""
    request = ExportTraceServiceRequest()
    last: S | None = None
    for span in spans:
        if last is None or last.service != span.service:
            resource_spans = request.resource_spans.add()
            if span.service:
                attribute = resource_spans.resource.attributes.add(key="service.name")
                attribute.value.string_value = span.service
            resource_spans.scope_spans.add()
        message = (
            request.resource_spans[-1]
            .scope_spans[0]
            .spans.add(
                trace_id=span.trace,
                span_id=span.id.to_bytes(8, "big"),
                parent_span_id=span.parent.to_bytes(8, "big") if span.parent else b"",
                name=span.name,
                start_time_unix_nano=span.start,
                end_time_unix_nano=span.end,
            )
        )
        if span.error:
            message.status.code = 2
        if span.complete:
            message.attributes.add(key="trace.complete").value.bool_value = True
        if span.x is not None:
            message.attributes.add(key="x").value.string_value = span.x
        last = span
    return request.SerializeToString()


def batch(*spans: S, positions: Sequence[int] = ()) -> SpanBatch:
    """A batch with one request for each span if ``positions`` are given, else one for all."""
    bodies = [body(span) for span in spans] if positions else [body(*spans)]
    scanned = scan_bodies("t", bodies)
    assert len(scanned) == len(spans)
    if positions:
        scanned.positions = np.array(positions, np.int64)
    return scanned


def many(
    count: int, first_id: int = 1, trace: tuple[int, int] | None = None, span: S | None = None
) -> SpanBatch:
    """``count`` spans like ``span``, with ids and starts from ``first_id`` upwards."""
    scanned = batch(span or S(1))
    scanned.spans = np.repeat(scanned.spans, count, axis=0)
    scanned.spans[:, SPAN_ID] = scanned.spans[:, START] = first_id + np.arange(count)
    scanned.spans[:, END] = scanned.spans[:, START] + 5
    scanned.spans[:, BODY] = 0
    if trace is not None:
        scanned.spans[:, [TRACE_HI, TRACE_LO]] = trace
    return scanned


def of_traces(hi: np.ndarray, lo: np.ndarray, first_id: int = 1) -> SpanBatch:
    """One span for each trace id."""
    scanned = many(len(lo), first_id)
    scanned.spans[:, TRACE_HI], scanned.spans[:, TRACE_LO] = hi, lo
    return scanned
