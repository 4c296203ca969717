"""The match kernel compared with Python, and both compared with the oracle."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp.attributes import OUT_SIZE
from betrace.service.otlp.columns import RESOURCE, SCOPE, SpanBatch
from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.exact import compare_literals, matches
from betrace.service.rules.match import (
    ASK,
    NO,
    YES,
    SpanValues,
    evaluate,
    read_attribute,
    satisfies,
)
from betrace.service.rules.program import ProgramBuilder
from betrace.service.rules.syntax import And, Attribute, Compare, Literal, Not, Or, Scope, Truthy
from tests.support import oracle
from tests.support.oracle import OracleSpan
from tests.support.strategies import (
    CMP,
    KEYS,
    encode,
    literal_of_number,
    literal_of_text,
    literals,
    predicates,
    traces,
    values,
)

pytestmark = pytest.mark.kernel

X = Attribute(Scope.ANY, "x")
OPS = [*CMP, "in", "contains"]


def run(predicate: Any, batch: SpanBatch, row: int = 0) -> int:
    """The result of the kernel: YES, NO or ASK."""
    builder = ProgramBuilder()
    start = builder.add(predicate)
    span = batch.spans[row]
    with np.errstate(over="ignore"):
        return int(
            satisfies(
                start,
                *builder.arrays(),
                batch.buf,
                span,
                batch.resources[span[RESOURCE]],
                batch.scopes[span[SCOPE]],
                np.zeros(OUT_SIZE, np.int64),
            )
        )


def agree(predicate: Any, batch: SpanBatch, row: int = 0) -> bool:
    """Whether the span satisfies the predicate; kernel and Python must agree."""
    plain = evaluate(predicate, SpanValues(batch), row)
    assert plain is not None
    said = run(predicate, batch, row)
    assert said in (ASK, YES if plain else NO), (predicate, said, plain)
    return plain


def batch_of(*spans: OracleSpan) -> SpanBatch:
    batch = scan_bodies("t", [encode(spans)])
    assert len(batch) == len(spans)
    return batch


def with_x(value: Any, **more: Any) -> SpanBatch:
    return batch_of(OracleSpan("a", attributes={"x": value}, **more))


def literal(value: Any) -> Literal:
    return literal_of_text(value) if isinstance(value, str) else literal_of_number(value)


def compare(value: Any, op: str, literals: tuple[Literal, ...]) -> bool:
    if op == "matches":
        return matches(value, literals[0].text)
    return compare_literals(value, op, literals)


NUMBERS_AS_TEXT = [
    "007",
    ".5",
    "-.5",
    "5.",
    ".",
    "+5",
    "-0",
    "+0",
    "1e3",
    "1E3",
    "1.50",
    "1.5e",
    "1..5",
    "1-2",
    "+",
    "-",
    "",
    "123456789012345678",
    "-123456789012345678",
    "1234567890123456789",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "-9223372036854775809",
    "000000000000000000001",
    "9" * 400,
    "9" * 4001,
    "1e400",
    " 5",
    "5 ",
    "5\0",
    "٥",
]


@pytest.mark.parametrize("text", NUMBERS_AS_TEXT, ids=lambda text: ascii(text[:30]))
def test_numbers_in_strings(text):
    batch = with_x(text)
    for number in (0, 5, 7, 1, 1.5, 1000, 123456789012345678, 2**63 - 1, 2**63, -(2**63), 0.5):
        for op in OPS:
            predicate = Compare(X, op, (literal(number),))
            assert agree(predicate, batch) is compare(text, op, (literal(number),))
    for other in NUMBERS_AS_TEXT:
        for op in OPS:
            predicate = Compare(X, op, (literal(other),))
            assert agree(predicate, batch) is compare(text, op, (literal(other),))


ODD = [
    *(0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -5e-324, 2.0**53, 2.0**63, -(2.0**63)),
    *(1e300, 1.7976931348623157e308, 0.5, 1000.0),
    *(0, 1, -1, 1000, 2**53 + 1, 2**63 - 1, -(2**63)),
    *(True, False, "", "true", "false", "NaN", "Infinity", "-Infinity", "1000", "0.5"),
    *(b"", b"1000", {}, {"a": 1}, [], [1000], ["1000", True], [[1000]], [math.nan], [{}], None),
]
AGAINST = [
    *(0, 1000, 0.5, 2**53, 2**53 + 1, 2.0**63, -(2**63), 10**400, -(10**400), 5e-324, 1e308),
    *("", "a", "true", "false", "NaN", "Infinity", "-Infinity", "1000", "1000.0", "\uffff", "💰"),
]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_values(value):
    batch = with_x(value)
    for other in AGAINST:
        for op in OPS:
            predicate = Compare(X, op, (literal(other),))
            expected = compare(value, op, (literal(other),))
            assert agree(predicate, batch) is expected, (value, op, other)
            assert agree(Not(predicate), batch) is not expected
    assert agree(Truthy(X), batch) is oracle.is_true(value)


@given(values(), st.sampled_from(OPS), literals())
@example(math.nan, "!=", Literal("a", None))
@example(-0.0, "==", Literal("0", 0))
@example(float(2**53), "<", Literal(str(2**53 + 1), 2**53 + 1))
@example("5e-324", ">", Literal("0", 0))
def test_any_value_with_any_literal(value, op, other):
    predicate = Compare(X, op, (other,))
    span = OracleSpan("a", attributes={"x": value})
    assert agree(predicate, batch_of(span)) is oracle.satisfies(predicate, span)


@given(predicates(3), traces(max_spans=4))
def test_any_predicate_of_any_span(predicate, trace):
    batch = batch_of(*trace)
    for row, span in enumerate(trace):
        assert agree(predicate, batch, row) is oracle.satisfies(predicate, span)


@given(st.text(max_size=4), st.text(max_size=4), st.sampled_from(OPS))
@example("\uffff", "\U00010000", "<")
@example("a", "ab", "<")
@example("", "", "contains")
def test_text_is_ordered_by_code_point(value, other, op):
    other_literal = Literal(other, None)
    predicate = Compare(X, op, (other_literal,))
    try:
        batch = with_x(value)
    except UnicodeEncodeError:  # requests cannot contain lone surrogates
        return
    expected = compare(value, op, (other_literal,))
    assert agree(predicate, batch) is expected
    if op == "<":
        assert expected is ([ord(c) for c in value] < [ord(c) for c in other])


@pytest.mark.parametrize("length", [4095, 4096, 4097, 100_000])
def test_long_text(length):
    batch = with_x("a" * (length - 1) + "b")
    ends = Compare(X, "contains", (literal("ab"),))
    assert agree(ends, batch)
    assert (run(ends, batch) == ASK) is (length > 4096)
    assert not agree(Compare(X, "contains", (literal("ba"),)), batch)
    assert agree(Compare(X, "<", (literal("b"),)), batch)
    search = Compare(X, "matches", (literal("^a+b$"),))
    assert evaluate(search, SpanValues(batch), 0) is (True if length < 65536 else None)
    assert not agree(Compare(X, "==", (literal("a" * length),)), batch)


def test_a_span_attribute_hides_the_resource_attribute():
    span = OracleSpan("a", attributes={"x": "own"}, resource={"x": "shared", "y": 7})
    batch = batch_of(span)
    assert agree(Compare(X, "==", (literal("own"),)), batch)
    assert agree(
        Compare(Attribute(Scope.RESOURCE, "x"), "==", (literal("shared"),)),
        batch,
    )
    assert agree(Compare(Attribute(Scope.ANY, "y"), "==", (literal(7),)), batch)
    assert not agree(
        Compare(Attribute(Scope.RESOURCE, "z"), "==", (literal(7),)),
        batch,
    )


def test_an_attribute_without_a_value_does_not_hide_the_resource():
    batch = batch_of(OracleSpan("a", attributes={"x": None}, resource={"x": 1}))
    assert agree(Compare(X, "==", (literal(1),)), batch)


# Cases that the oracle's spans cannot express


def raw(**fields: Any) -> tuple[ExportTraceServiceRequest, Any]:
    request = ExportTraceServiceRequest()
    span = (
        request.resource_spans.add()
        .scope_spans.add()
        .spans.add(trace_id=b"\1" * 16, span_id=b"\1" * 8, name="a", **fields)
    )
    return request, span


def scanned(request: ExportTraceServiceRequest) -> SpanBatch:
    return scan_bodies("t", [request.SerializeToString()])


@pytest.mark.parametrize("kind", [-1, 6, 77, 2**31 - 1, -(2**31)])
def test_unknown_kinds_and_statuses_count_as_unspecified(kind):
    request, span = raw(kind=kind)
    span.status.code = kind
    batch = scanned(request)
    kind_is = Attribute(Scope.FIELD, "kind")
    status_is = Attribute(Scope.FIELD, "status")
    assert agree(Compare(kind_is, "==", (literal("unspecified"),)), batch)
    assert not agree(Compare(kind_is, "in", (literal("client"), literal("server"))), batch)
    assert agree(Compare(status_is, "==", (literal("unset"),)), batch)
    assert agree(Compare(status_is, "contains", (literal("set"),)), batch)
    assert agree(Compare(status_is, "<", (literal("z"),)), batch)
    assert not agree(Truthy(kind_is), batch)


def test_kernel_and_python_use_the_same_of_two_equal_keys():
    request, span = raw()
    for value in ("first", "second"):
        span.attributes.add(key="x").value.string_value = value
    batch = scanned(request)
    taken = read_attribute(X, batch, 0)
    assert taken in ("first", "second")
    assert agree(Compare(X, "==", (literal(str(taken)),)), batch)


def test_times_beyond_int64_are_clamped():
    request, _ = raw(start_time_unix_nano=1, end_time_unix_nano=2**64 - 1)
    duration = Attribute(Scope.FIELD, "duration")
    batch = scanned(request)
    assert agree(Compare(duration, "==", (literal(2**63 - 2),)), batch)
    request, _ = raw(start_time_unix_nano=2**64 - 1, end_time_unix_nano=5)
    assert agree(Compare(duration, "==", (literal(0),)), scanned(request))


FIELDS = {
    "name": "a",
    "statusMessage": "",
    "scope": "",
    "service": None,
    "duration": 0,
    "kind": "unspecified",
    "status": "unset",
}


@pytest.mark.parametrize(("name", "value"), FIELDS.items())
def test_fields_of_an_empty_span(name, value):
    request, _ = raw()
    batch = scanned(request)
    attribute = Attribute(Scope.FIELD, name)
    assert read_attribute(attribute, batch, 0) == value
    for op in (*OPS, "matches"):
        for other in ("a", "", "0", "unset"):
            predicate = Compare(attribute, op, (literal(other),))
            assert agree(predicate, batch) is compare(value, op, (literal(other),))


def test_a_service_name_that_is_not_a_string_is_missing():
    batch = batch_of(OracleSpan("a", resource={"service.name": 7}))
    service = Attribute(Scope.FIELD, "service")
    assert agree(Compare(service, "!=", (literal(7),)), batch)
    assert not agree(Compare(service, "==", (literal(7),)), batch)


@pytest.mark.parametrize("bits", [0x7FF8000000000000, -0x8000000000000, 0x7FF0000000000001])
def test_no_nan_is_equal_to_anything(bits):
    nan = struct.unpack("<d", struct.pack("<q", bits))[0]
    batch = with_x(nan)
    assert agree(Compare(X, "!=", (literal(0),)), batch)
    for op in ("==", "<", "<=", ">", ">="):
        assert not agree(Compare(X, op, (literal(0),)), batch)
        assert not agree(Compare(X, op, (literal("NaN"),)), batch)


@pytest.mark.parametrize("key", [*KEYS, "", "k" * 5000], ids=lambda key: ascii(key[:20]))
def test_keys_of_any_length(key):
    attribute = Attribute(Scope.ANY, key)
    batch = batch_of(OracleSpan("a", attributes={key: 1, key + "x": 2}))
    assert agree(Compare(attribute, "==", (literal(1),)), batch)


def test_and_and_or_short_circuit():
    batch = with_x(1)
    asks = Compare(X, "matches", (literal("1"),))
    yes, no = Compare(X, "==", (literal(1),)), Compare(X, "==", (literal(2),))
    assert run(asks, batch) == ASK
    assert run(Or((yes, asks)), batch) == YES
    assert run(And((no, asks)), batch) == NO
    assert run(And((yes, asks)), batch) == ASK
    assert run(Not(And((no, asks))), batch) == YES
    assert run(And((Or((no, yes)), Not(no))), batch) == YES
    assert agree(And((yes, Not(asks))), batch) is False


def test_other_nodes_are_rejected():
    with pytest.raises(TypeError, match="not a predicate"):
        evaluate("x", SpanValues(with_x(1)), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown field"):
        read_attribute(Attribute(Scope.FIELD, "colour"), with_x(1), 0)
