"""Invalid requests to the running service get the responses that OTLP specifies."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field

import httpx
import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.process import Running

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
DEEPEST = 47  # arrays, two messages each, below five others: 100 messages are allowed


def a_trace(
    name: str = "checkout", trace_id: bytes = b"t" * 16, span_id: bytes = b"s" * 8
) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    spans.add(name=name, trace_id=trace_id, span_id=span_id, start_time_unix_nano=1)
    return request


def with_attributes(count: int) -> bytes:
    request = a_trace()
    span = request.resource_spans[0].scope_spans[0].spans[0]
    for number in range(count):
        span.attributes.add(key=f"key.{number}").value.int_value = number
    return request.SerializeToString()


def with_depth(depth: int) -> bytes:
    """Return a trace with an attribute of ``depth`` nested arrays. It is encoded by hand, because
    the library does not write messages that are too deep to read."""
    value = b"\x18\x01"  # AnyValue.int_value = 1
    for _ in range(depth):
        value = embed(5, embed(1, value))  # AnyValue.array_value, ArrayValue.values
    span = embed(1, b"t" * 16) + embed(2, b"s" * 8) + embed(5, b"checkout")
    span += embed(9, embed(1, b"deep") + embed(2, value))
    return embed(1, embed(2, embed(2, span)))


def embed(number: int, content: bytes) -> bytes:
    """Encode a length-delimited protobuf field."""
    return encode_varint(number << 3 | 2) + encode_varint(len(content)) + content


def encode_varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def as_json(depth: int) -> bytes:
    value = '{"arrayValue":{"values":[' * depth + '{"intValue":"1"}' + "]}}" * depth
    ids = f'"traceId":"{"74" * 16}","spanId":"{"73" * 8}"'
    span = f'{{{ids},"name":"checkout","attributes":[{{"key":"deep","value":{value}}}]}}'
    return f'{{"resourceSpans":[{{"scopeSpans":[{{"spans":[{span}]}}]}}]}}'.encode()


def not_utf8() -> bytes:
    return a_trace("checkoXX").SerializeToString().replace(b"checkoXX", b"checko\xff\xfe")


@dataclass(frozen=True)
class Case:
    body: bytes
    status: int
    kind: str = PROTOBUF
    headers: dict[str, str] = field(default_factory=dict)
    says: str = ""  # in the message


GOOD = a_trace().SerializeToString()
GZIP = {"content-encoding": "gzip"}

CASES = {
    "empty": Case(b"", 200),
    "empty, in JSON": Case(b"{}", 200, JSON),
    "a good trace": Case(GOOD, 200),
    "a good trace, gzip": Case(gzip.compress(GOOD), 200, headers=GZIP),
    "a good trace, in JSON": Case(as_json(0), 200, JSON),
    "garbage": Case(b"\xde\xad\xbe\xef" * 10, 400),
    "garbage, in JSON": Case(b"[1, 2", 400, JSON),
    "not an object, in JSON": Case(b"[]", 400, JSON),
    "truncated": Case(GOOD[:-3], 400),
    "truncated, in JSON": Case(as_json(0)[:-3], 400, JSON),
    "truncated, gzip": Case(gzip.compress(GOOD)[:-4], 400, headers=GZIP, says="gzip"),
    "not gzip, despite its header": Case(GOOD, 400, headers=GZIP, says="gzip"),
    "an unknown encoding": Case(GOOD, 415, headers={"content-encoding": "br"}),
    "a bomb": Case(gzip.compress(bytes(64 * MIB)), 413, headers=GZIP, says="larger"),
    "20 MiB": Case(bytes(20 * MIB), 400),  # small enough, but not a trace
    "20 MiB and a byte": Case(bytes(20 * MIB + 1), 413, says="larger"),
    "20 MiB and a byte, in JSON": Case(b" " * (20 * MIB) + b"{", 413, JSON, says="larger"),
    "10 000 attributes": Case(with_attributes(10_000), 200),
    "values of the maximum depth": Case(with_depth(DEEPEST), 200),
    "values that are too deep": Case(with_depth(DEEPEST + 10), 400),
    "values far too deep": Case(with_depth(400), 400),
    "values that are too deep, in JSON": Case(as_json(DEEPEST + 10), 400, JSON),
    "values far too deep, in JSON": Case(as_json(5000), 400, JSON),
    "text that is not UTF-8": Case(not_utf8(), 400, says="UTF-8"),
    "text that is not UTF-8, in JSON": Case(b'{"resourceSpans": "\xff"}', 400, JSON),
    "an invalid tenant name": Case(GOOD, 400, headers={"x-scope-orgid": "../etc"}, says="tenant"),
    "a tenant in upper case": Case(GOOD, 400, headers={"x-scope-orgid": "Acme"}, says="tenant"),
    "a tenant name that is too long": Case(GOOD, 400, JSON, headers={"x-scope-orgid": "a" * 64}),
    "a new tenant": Case(GOOD, 200, headers={"x-scope-orgid": "never-seen"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_responses_follow_otlp(service: Running, case: Case) -> None:
    answer = service.send(case.body, {"content-type": case.kind} | case.headers)
    assert answer.status_code == case.status
    assert answer.headers["content-type"] == case.kind
    if case.status == 200:
        if case.kind == JSON:
            assert answer.json() == {}
        else:
            assert ExportTraceServiceResponse.FromString(answer.content).ByteSize() == 0
        return
    if case.kind == JSON:
        code, message = answer.json()["code"], answer.json()["message"]
    else:
        status = Status.FromString(answer.content)
        code, message = status.code, status.message
    assert code == 3
    assert case.says.lower() in message.lower()
    assert message
    assert "Traceback" not in message


@pytest.mark.parametrize("kind", ["text/plain", "", "application/grpc"])
def test_an_unknown_content_type(service: Running, kind: str) -> None:
    answer = service.send(GOOD, {"content-type": kind})
    assert answer.status_code == 415
    assert "application/x-protobuf" in answer.json()["message"]


@pytest.mark.parametrize(
    ("trace_id", "span_id"),
    [(b"short", b"s" * 8), (b"t" * 17, b"s" * 8), (bytes(16), b"s" * 8), (b"t" * 16, b"s" * 7)],
)
def test_only_spans_with_invalid_ids_are_rejected(
    service: Running, trace_id: bytes, span_id: bytes
) -> None:
    request = a_trace(trace_id=trace_id, span_id=span_id)
    request.MergeFrom(a_trace())
    answer = service.send(request.SerializeToString())
    assert answer.status_code == 200
    partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
    assert partial.rejected_spans == 1
    assert partial.error_message


def test_other_methods_and_paths(service: Running) -> None:
    url = f"{service.ingest}/v1/traces"
    answer = httpx.get(url, trust_env=False)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert httpx.post(f"{service.ingest}/v1/logs", trust_env=False).status_code == 404


def test_the_service_is_still_ready(service: Running) -> None:
    assert service.get("/readyz").status_code == 200
    refused = service.samples(service.api)
    assert refused['betrace_requests_refused_total{reason="undecodable"}'] > 0
    assert refused['betrace_requests_refused_total{reason="too_large"}'] > 0
