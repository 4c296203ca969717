"""The archive's columns against the protobuf library, on random requests."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.export.columns import SCHEMA, span_table
from betrace.service.otlp.columns import ERROR
from betrace.service.otlp.wire import scan_bodies
from tests.support.otlp_generator import case
from tests.support.otlp_reference import parse

pytestmark = pytest.mark.kernel

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
STATUSES = ("unset", "ok", "error")
MOST = 2**63 - 1


def integer_times(kind: pa.DataType) -> pa.DataType:
    """A type with integers instead of times, which Python resolves only to the microsecond."""
    if pa.types.is_timestamp(kind):
        return pa.int64()
    if pa.types.is_list(kind):
        return pa.list_(integer_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, integer_times(field.type)) for field in kind])
    return kind


_INTEGER_TIMES = pa.schema([(field.name, integer_times(field.type)) for field in SCHEMA])


def plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(each) for each in value.array_value.values]
    if kind == "kvlist_value":
        return {pair.key: plain(pair.value) for pair in value.kvlist_value.values}
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    known = ("string_value", "bool_value", "int_value", "double_value")
    return getattr(value, kind) if kind in known else None


def same_value(text: str | None, value: Any) -> bool:
    expected = plain(value)
    kind = value.WhichOneof("value")
    if expected is None or text is None:
        return text is None and expected is None
    if kind == "double_value":
        return float(text) == expected or (math.isnan(float(text)) and math.isnan(expected))
    if kind in ("array_value", "kvlist_value"):
        return text == json.dumps(expected, ensure_ascii=False)
    if kind == "bool_value":
        return text == ("true" if expected else "false")
    return text == str(expected)


def check_attributes(found: list[tuple[str, str | None]], expected: Any) -> None:
    assert [key for key, _ in found] == [pair.key for pair in expected]
    for (_, text), pair in zip(found, expected, strict=True):
        assert same_value(text, pair.value), (text, pair)


def accepted(request: ExportTraceServiceRequest) -> list[tuple[Any, Any, Any]]:
    return [
        (span, scope_spans.scope, resource_spans.resource)
        for resource_spans in request.resource_spans
        for scope_spans in resource_spans.scope_spans
        for span in scope_spans.spans
        if len(span.trace_id) == 16
        and any(span.trace_id)
        and len(span.span_id) == 8
        and any(span.span_id)
    ]


def check(bodies: list[bytes]) -> int:
    """Compare the whole table with the protobuf library; return the number of spans."""
    batch = scan_bodies("t", bodies)
    received = np.arange(1, len(bodies) + 1, dtype=np.int64)
    table = span_table(batch, received)
    assert table.schema == SCHEMA
    table.validate(full=True)
    rows = iter(table.cast(_INTEGER_TIMES).to_pylist())
    count = 0
    for number, body in enumerate(bodies):
        if batch.bodies[number, ERROR]:
            continue
        for span, scope, resource in accepted(parse(body)):
            row = next(rows)
            count += 1
            start, end = (
                min(t, MOST) for t in (span.start_time_unix_nano, span.end_time_unix_nano)
            )
            parent = span.parent_span_id
            assert row["trace_id"] == span.trace_id.hex()
            assert row["span_id"] == span.span_id.hex()
            if len(parent) == 8:
                assert row["parent_span_id"] == (parent.hex() if any(parent) else None)
            assert row["trace_state"] == (span.trace_state or None)
            assert row["flags"] == span.flags
            assert row["name"] == span.name
            assert row["kind"] == (KINDS[span.kind] if 0 <= span.kind < 6 else str(span.kind))
            code = span.status.code
            assert row["status"] == (STATUSES[code] if 0 <= code < 3 else str(code))
            assert row["status_message"] == (span.status.message or None)
            assert (row["start_time"], row["end_time"]) == (start, end)
            assert row["duration_ns"] == max(0, end - start)
            assert row["scope_name"] == (scope.name or None)
            assert row["scope_version"] == (scope.version or None)
            assert row["received_at"] == number + 1
            check_attributes(row["attributes"], span.attributes)
            check_attributes(row["resource"], resource.attributes)
            assert len(row["events"]) == len(span.events)
            for found, event in zip(row["events"], span.events, strict=True):
                assert found["name"] == (event.name or None)
                assert found["time"] == min(event.time_unix_nano, MOST)
                check_attributes(found["attributes"], event.attributes)
            assert len(row["links"]) == len(span.links)
            for found, link in zip(row["links"], span.links, strict=True):
                assert found["trace_id"] == (link.trace_id.hex() or None)
                assert found["span_id"] == (link.span_id.hex() or None)
                check_attributes(found["attributes"], link.attributes)
    assert next(rows, None) is None
    return count


@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=6))
def test_every_column_agrees_with_the_protobuf_library(seeds: list[int]) -> None:
    check([case(seed) for seed in seeds])


def test_random_requests_have_spans_to_compare() -> None:
    assert sum(check([case(seed)]) for seed in range(40)) > 20


def test_times_are_kept_to_the_nanosecond() -> None:
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add(
        trace_id=b"t" * 16, span_id=b"s" * 8, start_time_unix_nano=10**18 + 1,
        end_time_unix_nano=10**18 + 3,
    )  # fmt: skip
    span.events.add(time_unix_nano=10**18 + 2)
    table = span_table(scan_bodies("t", [request.SerializeToString()]), np.array([5], np.int64))
    assert table["start_time"].cast(pa.int64()).to_pylist() == [10**18 + 1]
    times = table["events"].chunk(0).flatten().field("time").cast(pa.int64())
    assert times.to_pylist() == [10**18 + 2]


def test_no_spans_give_an_empty_table() -> None:
    assert span_table(scan_bodies("t", [b""]), np.array([1], np.int64)).num_rows == 0
