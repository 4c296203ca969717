"""OTLP JSON: equal to the request in protobuf; errors name the place and the expectation."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp import json_fields, wire
from betrace.service.otlp.json import OtlpJsonError, to_protobuf
from tests.support import json_compare
from tests.support import otlp_reference as reference
from tests.support.examples import examples
from tests.support.json_cases import Mapper, case
from tests.support.otlp_generator import Generator

CASES = Path(__file__).parents[3] / "../shared/cases/otlp"

pytestmark = pytest.mark.kernel


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


def test_json_is_read_as_the_protobuf_library_reads_it() -> None:
    """The library takes ids in base64; all else that :class:`Mapper` writes is the same to it."""
    for seed in range(100):
        request = reference.parse(Generator(seed).request())
        if request is None:
            continue
        expected = ExportTraceServiceRequest()
        values = Mapper(seed, ids="base64").message(request)
        json_format.ParseDict(values, expected, ignore_unknown_fields=True, max_recursion_depth=200)
        body = orjson.dumps(Mapper(seed).message(request))
        found = ExportTraceServiceRequest.FromString(to_protobuf(body))
        assert found.SerializeToString(deterministic=True) == expected.SerializeToString(
            deterministic=True
        )


def test_the_fields_are_those_of_the_protobuf_library() -> None:
    seen = {}

    def compare(descriptor: Any, message: int) -> None:
        seen[message] = descriptor.full_name
        known = {f.json_name: f for f in descriptor.fields}
        known.pop("oldName", None)
        assert set(json_fields.FIELDS[message]) == set(known)
        for name, (number, _kind, *child) in json_fields.FIELDS[message].items():
            assert known[name].number == number
            assert bool(child) == (known[name].message_type is not None)
            if child and child[0] not in seen:
                compare(known[name].message_type, child[0])

    compare(ExportTraceServiceRequest.DESCRIPTOR, json_fields.REQUEST)
    assert len(seen) == json_fields.MESSAGES


@pytest.mark.parametrize("part", range(4))
def test_generated_bodies_are_read_as_by_the_reference_decoder(part: int) -> None:
    accepted = sum(json_compare.check(case(seed)) for seed in range(part * 150, part * 150 + 150))
    assert 40 < accepted < 120


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
    """The field that holds them has another number in each."""
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


@settings(max_examples=300, deadline=None)
@given(value=JSON)
def test_any_json_is_read_as_by_the_reference_decoder(value: Any) -> None:
    json_compare.check(json.dumps({"resourceSpans": value}).encode())


@given(value=st.floats() | st.decimals(allow_nan=False, allow_infinity=False))
def test_any_number_is_read_as_by_the_reference_decoder(value: Any) -> None:
    attribute = b'{"attributes":[{"key":"k","value":{"doubleValue":%b}}],"startTimeUnixNano":%b}'
    text = str(value).replace("nan", "NaN").encode()
    for form in (text, b'"' + text + b'"'):
        span = attribute % (form, form)
        json_compare.check(b'{"resourceSpans":[{"scopeSpans":[{"spans":[%b]}]}]}' % span)


@given(text=st.text(max_size=300), ends=st.integers(0, 40))
def test_any_text_is_read_as_by_the_reference_decoder(text: str, ends: int) -> None:
    """Wherever it lies in the body: near its end it is read byte by byte."""
    for dumped in (json.dumps(text), json.dumps(text, ensure_ascii=False)):
        body = '{"resourceSpans":[{"schemaUrl":' + dumped + "}" + " " * ends + "]}"
        json_compare.check(body.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 127, 128, 129, 16383, 16384, 70_000])
def test_lengths_of_all_sizes(size: int) -> None:
    """What is longer than the bytes reserved for its length is moved."""
    value = {"stringValue": "x" * size}
    attribute = value_of({"arrayValue": {"values": [value, {"kvlistValue": {"values": []}}]}})
    assert attribute.array_value.values[0].string_value == "x" * size
    assert len(attribute.array_value.values) == 2
    assert value_of(value).string_value == "x" * size
    assert span_of(span_json(status={"message": "x" * size})).status.message == "x" * size
    body = span_json(attributes=[{"key": "é" * size, "value": value}])
    assert span_of(body.replace(b"xx", b"x\\u0078")).attributes[0].key == "é" * size


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ('"name":"a","kind":1,"name":"b"', {"name": "b", "kind": 1}),
        ('"name":"a","name":null', {}),
        ('"name":"a","n\\u0061me":"b"', {"name": "b"}),
        ('"name":3,"name":"b","name":"c"', {"name": "c"}),
        ('"events":[{"name":"a"}],"events":[{"name":"b"}]', {"events": [{"name": "b"}]}),
        ('"status":{"code":2,"code":1},"status":{"message":"m"}', {"status": {"message": "m"}}),
        ('"status":{"code":[{"code":1,"code":2}]}, "status" : {"code":1}', {"status": {"code": 1}}),
    ],
)
def test_of_repeated_names_the_last_counts(span: str, expected: dict[str, Any]) -> None:
    body = b'{"resourceSpans":[{"scopeSpans":[{"spans":[{%b}]}]}]}' % span.encode()
    found = span_of(body)
    assert found == json_format.ParseDict(expected, type(found)())
    assert json_compare.check(body)


def test_many_repeated_names() -> None:
    """More than the first pass makes room for."""
    spans = ",".join(f'{{"kind":1,"name":"x","kind":{i}}}' for i in range(500))
    body = b'{"resourceSpans":[{"scopeSpans":[{"spans":[%b]}]}]}' % spans.encode()
    found = ExportTraceServiceRequest.FromString(to_protobuf(body)).resource_spans[0]
    assert [span.kind for span in found.scope_spans[0].spans] == list(range(500))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"kind": 1, "startTimeUnixNano": "1\\u0030"}, 10),
        ({"startTimeUnixNano": "\\u0031\\u0032", "traceId": "\\u0061b"}, 12),
        ({"startTimeUnixNano": "1\\n"}, None),
        ({"startTimeUnixNano": "1\\u0022"}, None),
        ({"startTimeUnixNano": "1\\/"}, None),
        ({"traceId": "\\u00e9"}, None),
    ],
)
def test_numbers_and_ids_with_escapes(value: dict[str, Any], expected: int | None) -> None:
    body = span_json(**value).replace(b"\\\\", b"\\")
    assert json_compare.check(body) == (expected is not None)
    if expected is not None:
        assert span_of(body).start_time_unix_nano == expected


def test_an_error_in_a_replaced_value_does_not_count() -> None:
    good = b'{"resourceSpans":[{"schemaUrl":"a"}]}'
    assert to_protobuf(b'{"resourceSpans":[3],' + good[1:]) == to_protobuf(good)
    with pytest.raises(OtlpJsonError, match=r"^resourceSpans: expected an array, got 4\.$"):
        to_protobuf(b'{"resourceSpans":[3],"resourceSpans":4}')


@pytest.mark.parametrize("empty", [b"{}", b"[]", b"[{}]", b"[[],{}]"])
def test_bodies_of_empty_objects_are_refused(empty: bytes) -> None:
    """Millions of them compress to some kilobytes."""
    assert to_protobuf(b'{"unknown":[%b]}' % b",".join([empty] * 1300)) == b""
    for form in (b'{"unknown":[%b]}', b'{"resourceSpans":[%b]}'):
        with pytest.raises(OtlpJsonError, match="more than one JSON object or array for every 4"):
            to_protobuf(form % b",".join([empty] * 60_000))


@pytest.mark.slow
def test_a_large_body_of_empty_objects_costs_little() -> None:
    for item in (b"{}", b"{}, "):
        body = b'{"resourceSpans":[' + b",".join([item] * (20_000_000 // (len(item) + 1))) + b"]}"
        to_protobuf(b"{}")
        began = time.thread_time()
        with contextlib.suppress(OtlpJsonError):
            to_protobuf(body)
        assert time.thread_time() - began < 0.5


def test_dense_attributes_are_accepted() -> None:
    values = [{"intValue": 1}] * 20_000
    body = orjson.dumps({"resourceSpans": [{"resource": {"attributes": [
        {"key": "k", "value": {"arrayValue": {"values": values}}}]}}]})  # fmt: skip
    request = ExportTraceServiceRequest.FromString(to_protobuf(body))
    assert len(request.resource_spans[0].resource.attributes[0].value.array_value.values) == 20_000


def test_the_body_may_be_any_buffer() -> None:
    body = span_json(name="a")
    assert to_protobuf(memoryview(body)) == to_protobuf(bytearray(body)) == to_protobuf(body)


def test_strtod_is_exact_where_one_operation_is_not() -> None:
    rng = np.random.default_rng(1)
    doubles = rng.integers(0, 2**64, 2000, np.uint64).view(np.float64)
    doubles = doubles[np.isfinite(doubles)]
    values = [{"doubleValue": v} for v in doubles.tolist()]
    array = value_of({"arrayValue": {"values": values}}).array_value
    assert [v.double_value for v in array.values] == doubles.tolist()


_SMALL = (
    '{"u":[1,{"a":"é","b":[{},-1.5e-3]}],"resourceSpans":[{"schemaUrl":"\\f\\r\\u20ac","scopeSpans":'
    '[{"spans":[{"kind":2,"flags":1.0,"attributes":[{"key":"k","value":{"boolValue":false}},'
    '{"key":"k","value":{"doubleValue":1e-7}},{"value":{"intValue" : "5"},"key":"k"}]}]}]}]}'
).encode()


def test_every_truncation_of_a_body_is_read_as_by_the_reference_decoder() -> None:
    assert json_compare.check(_SMALL)
    for end in range(len(_SMALL)):
        assert not json_compare.check(_SMALL[:end])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"false", b"falsy"),
        (b"false", b"fals"),
        (b"false", b"null"),
        (b"[1,", b"[1,nul,"),
        (b'"a":', b'"a"'),
        (b'"a":', b'"a\\x":'),
        (b'"b":', b"b:"),
        (b"{},", b"{},]"),
        (b"-1.5e-3", b"-1.5e"),
        (b'"intValue" :', b'"intValue":'),
        (b'"boolValue":', b'"boolValue" :'),
        (b'"boolValue":', b'"boolValu\\u0065":'),
        (b'"doubleValue":', b'"doubleValues":'),
        (b'"doubleValue":', b'"doubleValue":  '),
        (b'{"intValue" : "5"}', b'{"intValue" : "5"},'),
        (b'"k","value":{"b', b'"k","value":{"int_value":1},"value":{"b'),
    ],
)
def test_small_changes_of_a_body_are_read_as_by_the_reference_decoder(
    old: bytes, new: bytes
) -> None:
    assert old in _SMALL
    json_compare.check(_SMALL.replace(old, new, 1))


@pytest.mark.parametrize("body", [b"5", b" 1e305", b"1e309", b"true", b'"a"', b'"', b"{}{}", b" "])
def test_bodies_that_are_no_object(body: bytes) -> None:
    assert not json_compare.check(body)
