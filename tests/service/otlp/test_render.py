"""A trace rendered as OTLP JSON: only its spans, each once, and readable again."""

from __future__ import annotations

import orjson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp.json import to_protobuf
from betrace.service.otlp.render import trace_as_json

TRACE, OTHER = b"\xab" * 16, b"\xcd" * 16


def request(service: str, *spans: tuple[bytes, int]) -> ExportTraceServiceRequest:
    result = ExportTraceServiceRequest()
    resource_spans = result.resource_spans.add(schema_url="https://example.org/1")
    resource_spans.resource.attributes.add(key="service.name").value.string_value = service
    scope_spans = resource_spans.scope_spans.add()
    scope_spans.scope.name = "library"
    for trace_id, number in spans:
        span = scope_spans.spans.add(
            trace_id=trace_id,
            span_id=number.to_bytes(8, "big"),
            parent_span_id=b"\x0a" * 8,
            name=f"span {number}",
            kind=2,
            start_time_unix_nano=1_700_000_000_000_000_000 + number,
        )
        span.status.code = 2
        span.attributes.add(key="n").value.int_value = number
        span.attributes.add(key="raw").value.bytes_value = b"\xff\xfe"
        span.links.add(trace_id=OTHER, span_id=b"\x0b" * 8, flags=1)
    return result


def test_the_mapping_is_otlps() -> None:
    rendered = trace_as_json([request("shop", (TRACE, 1)).SerializeToString()], TRACE)
    assert rendered == {
        "resourceSpans": [
            {
                "resource": {
                    "attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]
                },
                "schemaUrl": "https://example.org/1",
                "scopeSpans": [
                    {
                        "scope": {"name": "library"},
                        "spans": [
                            {
                                "traceId": "ab" * 16,
                                "spanId": "0000000000000001",
                                "parentSpanId": "0a" * 8,
                                "name": "span 1",
                                "kind": 2,
                                "startTimeUnixNano": "1700000000000000001",
                                "attributes": [
                                    {"key": "n", "value": {"intValue": "1"}},
                                    {"key": "raw", "value": {"bytesValue": "//4="}},
                                ],
                                "links": [{"traceId": "cd" * 16, "spanId": "0b" * 8, "flags": 1}],
                                "status": {"code": 2},
                            }
                        ],
                    }
                ],
            }
        ]
    }


def test_renders_each_span_of_the_trace_once_grouped_by_resource_and_scope() -> None:
    bodies = [
        request("shop", (OTHER, 1), (TRACE, 2), (TRACE, 3)),
        request("bank", (TRACE, 4), (OTHER, 5)),
        request("shop", (TRACE, 3), (TRACE, 6)),  # a retry, and one more
        request("shop", (TRACE, 2)),
        request("none of this trace", (OTHER, 7)),
    ]
    rendered = trace_as_json([body.SerializeToString() for body in bodies], TRACE)
    names = [
        [span["name"] for scope in resource["scopeSpans"] for span in scope["spans"]]
        for resource in rendered["resourceSpans"]
    ]
    assert names == [["span 2", "span 3", "span 6"], ["span 4"]]
    assert [len(resource["scopeSpans"]) for resource in rendered["resourceSpans"]] == [1, 1]


def test_rendered_traces_can_be_sent_again() -> None:
    original = request("shop", (TRACE, 1), (TRACE, 2))
    rendered = orjson.dumps(trace_as_json([original.SerializeToString()], TRACE))
    assert ExportTraceServiceRequest.FromString(to_protobuf(rendered)) == original


def test_no_such_trace() -> None:
    body = request("shop", (OTHER, 1)).SerializeToString()
    assert trace_as_json([body], TRACE) == {"resourceSpans": []}
    assert trace_as_json([], TRACE) == {"resourceSpans": []}
