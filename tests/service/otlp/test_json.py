"""OTLP JSON: equal to the request in protobuf; errors name the place and the expectation."""

from __future__ import annotations

import base64
import json
import math
import random
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp import wire
from betrace.service.otlp.json import OtlpJsonError, to_protobuf
from tests.support import otlp_reference as reference
from tests.support.examples import examples
from tests.support.otlp_generator import Generator

CASES = Path(__file__).parents[3] / "../shared/cases/otlp"

_HEX = {"trace_id", "span_id", "parent_span_id"}


class Mapper:
    """Converts protobuf to OTLP JSON, using every freedom that the specification allows."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def message(self, message: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for field, value in message.ListFields():
            mapped = [self.value(field, v) for v in value] if field.is_repeated else None
            result[field.json_name] = self.value(field, value) if mapped is None else mapped
        if self.rng.random() < 0.1:
            result["unknownField"] = self.rng.choice([None, 1, "x", {"a": []}, [1]])
        if self.rng.random() < 0.1:
            missing = [f.json_name for f in message.DESCRIPTOR.fields if f.json_name not in result]
            result.update(dict.fromkeys(missing))
        items = list(result.items())
        self.rng.shuffle(items)
        return dict(items)

    def value(self, field: Any, value: Any) -> Any:
        rng = self.rng
        if field.message_type is not None:
            return self.message(value)
        if field.name in _HEX:
            return value.hex().upper() if rng.random() < 0.3 else value.hex()
        if field.type == field.TYPE_BYTES:
            encode = rng.choice([base64.b64encode, base64.urlsafe_b64encode])
            text = encode(value).decode()
            return text.rstrip("=") if rng.random() < 0.3 else text
        if field.type == field.TYPE_DOUBLE:
            if math.isnan(value):
                return "NaN"
            if math.isinf(value):
                return "Infinity" if value > 0 else "-Infinity"
            if value.is_integer() and abs(value) < 2**53 and rng.random() < 0.3:
                return int(value) if value or math.copysign(1, value) > 0 else value
            return repr(value) if rng.random() < 0.2 else value
        if field.type == field.TYPE_ENUM or isinstance(value, str | bool):
            return value
        if abs(value) < 2**53 and rng.random() < 0.1:
            return float(value)
        return str(value) if rng.random() < 0.5 else value


def quiet_nans(message: Any) -> None:
    """Replace every NaN by the one that JSON has."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                quiet_nans(item)
        elif field.type == field.TYPE_DOUBLE and math.isnan(value):
            setattr(message, field.name, math.nan)


@pytest.mark.parametrize("part", range(4))
def test_the_same_request_in_json_and_in_protobuf(part: int) -> None:
    spans = 0
    for seed in range(part * 150, part * 150 + 150):
        request = reference.parse(Generator(seed).request())
        if request is None:  # an unknown field had a known number
            continue
        request.DiscardUnknownFields()
        quiet_nans(request)
        text = orjson.dumps(Mapper(seed).message(request))
        again = ExportTraceServiceRequest.FromString(to_protobuf(text))
        assert again.SerializeToString(deterministic=True) == request.SerializeToString(
            deterministic=True
        )
        spans += sum(len(s.spans) for r in again.resource_spans for s in r.scope_spans)
    assert spans > 100


def read(name: str) -> list[bytes]:
    if not CASES.exists():
        pytest.skip("the shared test cases are missing")
    data = (CASES / name).read_bytes()
    return data.splitlines() if name.endswith(".jsonl") else [data]


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("spec-example.json", 1),
        ("nulls.jsonl", 3),
        ("deep-nesting.jsonl", 1),
        ("large-attributes.jsonl", 1),
    ],
)
def test_cases_that_follow_the_specification(name: str, spans: int) -> None:
    batch = wire.scan_bodies("t", [to_protobuf(line) for line in read(name)])
    assert not batch.bodies[:, 4].any()
    assert len(batch) == spans
    assert not batch.bodies[:, 2:4].any()


def test_the_specifications_example_in_detail() -> None:
    (body,) = read("spec-example.json")
    request = ExportTraceServiceRequest.FromString(to_protobuf(body))
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert span.trace_id.hex() == "5b8efff798038103d269b633813fc60c"
    assert span.parent_span_id.hex() == "eee19b7ec3c1b173"
    assert span.name == "I'm a server span"
    assert span.kind == 2
    assert span.start_time_unix_nano == 1544712660000000000
    assert span.attributes[0].value.string_value == "some value"
    assert request.resource_spans[0].scope_spans[0].scope.version == "1.0.0"


def test_ids_in_base64_and_enum_names_are_refused() -> None:
    for line in read("shop-base64-ids.jsonl"):
        with pytest.raises(OtlpJsonError, match=r"hex digits \(not base64\)|not its name"):
            to_protobuf(line)
    (body,) = read("invalid-kind.json")
    with pytest.raises(OtlpJsonError, match="the enum's number, not its name") as caught:
        to_protobuf(body)
    assert "resourceSpans[0].scopeSpans[0].spans[0].kind" in str(caught.value)


def span_json(**fields: Any) -> bytes:
    span = {"traceId": "ab" * 16, "spanId": "cd" * 8} | fields
    return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode()


def span_of(body: bytes) -> Any:
    request = ExportTraceServiceRequest.FromString(to_protobuf(body))
    return request.resource_spans[0].scope_spans[0].spans[0]


def value_of(value: Any) -> Any:
    return span_of(span_json(attributes=[{"key": "k", "value": value}])).attributes[0].value


@pytest.mark.parametrize("trace_id", ["", "ab" * 15, "ab" * 17, "a" * 31, "a" * 33, "a"])
def test_hex_ids_of_a_wrong_length_are_passed_to_the_scanner(trace_id: str) -> None:
    batch = wire.scan_bodies("t", [to_protobuf(span_json(traceId=trace_id))])
    assert list(batch.bodies[0]) == [0, 0, 1, 0, 0, 0]
    batch = wire.scan_bodies("t", [to_protobuf(span_json(spanId=trace_id))])
    assert list(batch.bodies[0]) == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("startTimeUnixNano", "18446744073709551615", 2**64 - 1),
        ("startTimeUnixNano", 2**64 - 1, 2**64 - 1),
        ("startTimeUnixNano", 1e9, 10**9),
        ("startTimeUnixNano", "007", 7),
        ("kind", 99, 99),
        ("kind", -1, -1),
        ("droppedLinksCount", 2**32 - 1, 2**32 - 1),
        ("flags", "257", 257),
    ],
)
def test_numbers(field: str, value: Any, read: int) -> None:
    names = {f.json_name: f.name for f in span_of(span_json()).DESCRIPTOR.fields}
    assert getattr(span_of(span_json(**{field: value})), names[field]) == read


@pytest.mark.parametrize(
    ("value", "member", "expected"),
    [
        ({"intValue": "-9223372036854775808"}, "int_value", -(2**63)),
        ({"intValue": 2**63 - 1}, "int_value", 2**63 - 1),
        ({"intValue": 5.0}, "int_value", 5),
        ({"doubleValue": 3}, "double_value", 3.0),
        ({"doubleValue": "-1.5e3"}, "double_value", -1500.0),
        ({"doubleValue": "Infinity"}, "double_value", math.inf),
        ({"doubleValue": "-Infinity"}, "double_value", -math.inf),
        ({"boolValue": False}, "bool_value", False),
        ({"bytesValue": "_-8"}, "bytes_value", b"\xff\xef"),
        ({"bytesValue": "/+8="}, "bytes_value", b"\xff\xef"),
        ({"stringValue": "x", "intValue": None}, "string_value", "x"),
        ({}, None, None),
        ({"stringValue": None}, None, None),
        ({"someNewValue": 1}, None, None),
    ],
)
def test_values(value: Any, member: str | None, expected: Any) -> None:
    result = value_of(value)
    assert result.WhichOneof("value") == member
    if member:
        assert getattr(result, member) == expected


def test_nan() -> None:
    assert math.isnan(value_of({"doubleValue": "NaN"}).double_value)


def test_empty_lists_are_values() -> None:
    assert value_of({"arrayValue": {}}).WhichOneof("value") == "array_value"
    assert value_of({"kvlistValue": {"values": None}}).WhichOneof("value") == "kvlist_value"


def test_the_same_attribute_of_a_resource_and_of_a_span() -> None:
    """Cached encodings are reused in fields with another number."""
    attributes = [{"key": "k", "value": {"stringValue": "v"}}]
    body = {
        "resourceSpans": [
            {
                "resource": {"attributes": attributes},
                "scopeSpans": [
                    {"scope": {"attributes": attributes}, "spans": [{"attributes": attributes * 2}]}
                ],
            }
        ]
    }
    (resource_spans,) = ExportTraceServiceRequest.FromString(
        to_protobuf(orjson.dumps(body))
    ).resource_spans
    assert len(resource_spans.resource.attributes) == 1
    assert len(resource_spans.scope_spans[0].scope.attributes) == 1
    assert len(resource_spans.scope_spans[0].spans[0].attributes) == 2


@pytest.mark.parametrize(
    ("body", "path", "expected"),
    [
        (b"[]", "the body", "an object"),
        (b"null", "the body", "an object"),
        (b'{"resourceSpans": {}}', "resourceSpans", "an array"),
        (b'{"resourceSpans": [null]}', "resourceSpans[0]", "an object"),
        (b'{"resourceSpans": [{}, 3]}', "resourceSpans[1]", "an object"),
        (span_json(name=3), "spans[0].name", "a string"),
        (span_json(traceId=7), "spans[0].traceId", "32 hex digits"),
        (span_json(traceId="ab " * 16), "spans[0].traceId", "32 hex digits"),
        (span_json(spanId="é" * 16), "spans[0].spanId", "16 hex digits"),
        (span_json(parentSpanId="xyz"), "spans[0].parentSpanId", "16 hex digits"),
        (span_json(kind="2"), "spans[0].kind", "the enum's number"),
        (span_json(kind=True), "spans[0].kind", "the enum's number"),
        (span_json(kind=2**31), "spans[0].kind", "the enum's number"),
        (span_json(status={"code": "STATUS_CODE_OK"}), "status.code", "the enum's number"),
        (span_json(status=[]), "spans[0].status", "an object"),
        (span_json(startTimeUnixNano=-1), "startTimeUnixNano", "from 0 to 18446744073709551615"),
        (span_json(startTimeUnixNano=2**64), "startTimeUnixNano", "an integer"),
        (span_json(startTimeUnixNano="1" * 21), "startTimeUnixNano", "an integer"),
        (span_json(startTimeUnixNano="١" * 19), "startTimeUnixNano", "an integer"),
        (span_json(startTimeUnixNano="1_000"), "startTimeUnixNano", "an integer"),
        (span_json(startTimeUnixNano=" 1"), "startTimeUnixNano", "an integer"),
        (span_json(startTimeUnixNano=1.5), "startTimeUnixNano", "an integer"),
        (span_json(startTimeUnixNano=1.5e18), "startTimeUnixNano", "an integer"),
        (span_json(startTimeUnixNano=False), "startTimeUnixNano", "an integer"),
        (span_json(droppedEventsCount=2**32), "droppedEventsCount", "from 0 to 4294967295"),
        (span_json(flags=-1), "flags", "from 0 to 4294967295"),
        (span_json(attributes={"k": "v"}), "spans[0].attributes", "an array"),
        (span_json(attributes=[{"key": "k"}, {"key": 1}]), "attributes[1].key", "a string"),
        (span_json(attributes=[{"key": "k", "value": "v"}]), "attributes[0].value", "an object"),
        (span_json(events=[{"attributes": [None]}]), "events[0].attributes[0]", "an object"),
        (span_json(links=[{"spanId": "zz"}]), "links[0].spanId", "16 hex digits"),
    ],
)
def test_errors_say_where_and_what(body: bytes, path: str, expected: str) -> None:
    with pytest.raises(OtlpJsonError) as caught:
        to_protobuf(body)
    where, what = str(caught.value).split(": expected ", 1)
    assert where.endswith(path)
    assert expected in what
    assert ", got " in what


@pytest.mark.parametrize(
    ("value", "path", "expected"),
    [
        ({"stringValue": 1}, "stringValue", "a string"),
        ({"boolValue": "true"}, "boolValue", "true or false"),
        ({"boolValue": 1}, "boolValue", "true or false"),
        ({"intValue": 2**63}, "intValue", "an integer from -9223372036854775808"),
        ({"intValue": -(2**63) - 1}, "intValue", "an integer"),
        ({"intValue": "9223372036854775808"}, "intValue", "an integer"),
        ({"intValue": "5.0"}, "intValue", "an integer"),
        ({"doubleValue": "nan"}, "doubleValue", "a number"),
        ({"doubleValue": "1e999"}, "doubleValue", "a number"),
        ({"doubleValue": True}, "doubleValue", "a number"),
        ({"bytesValue": "a"}, "bytesValue", "base64"),
        ({"bytesValue": "a$bc"}, "bytesValue", "base64"),
        ({"bytesValue": 5}, "bytesValue", "base64"),
        ({"arrayValue": []}, "arrayValue", "an object"),
        ({"arrayValue": {"values": [{"intValue": 1}, None]}}, "values[1]", "an object"),
        ({"kvlistValue": {"values": [{"key": "x", "value": {"intValue": "x"}}]}},
         "kvlistValue.values[0].value.intValue", "an integer"),
        ({"stringValue": "a", "intValue": 1}, "value", "one value, not several"),
    ],
)  # fmt: skip
def test_errors_in_values_say_where_and_what(value: Any, path: str, expected: str) -> None:
    with pytest.raises(OtlpJsonError) as caught:
        value_of(value)
    where, what = str(caught.value).split(": expected ", 1)
    assert where.startswith("resourceSpans[0].scopeSpans[0].spans[0].attributes[0].value")
    assert where.endswith(path)
    assert expected in what


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"a": "\xff"}', b"\xef\xbb\xbf{}", b"[" * 5000, b'{"a": 1e999}']
)
def test_invalid_json(body: bytes) -> None:
    with pytest.raises(OtlpJsonError, match="The body is not JSON"):
        to_protobuf(body)


def test_an_empty_request() -> None:
    for body in (b"{}", b'{"resourceSpans": []}', b'{"resourceSpans": null}', b'{"other": 1}'):
        assert to_protobuf(body) == b""


def test_long_values_are_truncated_in_messages() -> None:
    with pytest.raises(OtlpJsonError) as caught:
        to_protobuf(span_json(traceId="x" * 10_000))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["arrayValue", "kvlistValue"])
def test_nesting_is_limited_as_in_the_scanner(kind: str) -> None:
    def nested(levels: int) -> bytes:
        value: Any = {"stringValue": "x"}
        for _ in range(levels):
            item = value if kind == "arrayValue" else {"key": "k", "value": value}
            value = {kind: {"values": [item]}}
        return span_json(attributes=[{"key": "k", "value": value}])

    # Below the request: resource spans, scope spans, span, attribute, value; then 2 or 3 a level.
    most = 95 // (2 if kind == "arrayValue" else 3)
    body = to_protobuf(nested(most))
    assert reference.parse(body) is not None
    assert wire.scan_bodies("t", [body]).bodies[0, 4] == 0
    for levels in (most + 1, 150):
        with pytest.raises(OtlpJsonError, match="nested at most 100 messages deep"):
            to_protobuf(nested(levels))


NAMES = [
    "resourceSpans", "scopeSpans", "spans", "attributes", "key", "value", "values", "arrayValue",
    "kvlistValue", "stringValue", "intValue", "traceId", "spanId", "events", "links", "status",
    "code", "resource",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=30,
)


@settings(max_examples=examples(300), deadline=None)
@given(value=JSON)
def test_any_json_is_a_request_or_an_error(value: Any) -> None:
    body = json.dumps({"resourceSpans": value}).encode()
    try:
        wire_bytes = to_protobuf(body)
    except OtlpJsonError:
        return
    assert reference.check([wire_bytes]) == 1
