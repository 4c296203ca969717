"""Hypothesis strategies for rules and traces that often match each other.

Names, attribute keys and values come from small sets, so that generated rules often match generated
spans. Values include difficult ones: integers beyond 2**53, numbers in strings, NaN, arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from betrace.service.rules.syntax import (
    FIELDS,
    KINDS,
    STATUSES,
    Attribute,
    Before,
    Compare,
    CountCompare,
    Exists,
    Literal,
    Node,
    Not,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
    all_of,
    any_of,
)
from betrace.service.rules.values import exact_float, exact_text
from tests.support.oracle import OracleSpan

SPAN_NAMES = ("a", "b", "db.get", "db.put", "GET /cart", "when", "日本", "")
NAME_PATTERNS = ("*", "db.*", "*.get", "d*t", "*a*", "GET *")
KEYS = ("x", "y.z", "user id", "service.name", "count", "naïve")
TEXTS = ("", "a", "abc", "true", "false", "USD", "日本💰", "\uffff", "a\0b", 'q"\\d', "NaN")
NUMBER_TEXTS = ("1500", "0.5", "-3", "+7", "1e3", "1500.0", "007", "9007199254740993", "-0")
NEAR_NUMBERS = ("1e999", " 1", "1_000", "0x10", "١", "1.", ".5", "inf", "nan", "1e", "--1")
INTEGERS = (0, 1, -3, 7, 1000, 1500, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 0.5, 1.0, 1000.0, 1500.0, 2.0**53, -3.0, 1e-7, 1e300, 9.2233720368547758e18)
ODD_FLOATS = (float("nan"), float("inf"), float("-inf"), 5e-324)
PATTERNS = ("a", "^a", "b$", "^$", r"\d+", "(?i)usd", "本", "[^a]", ".", r"^-?0\.5$", r"\x00")
DURATIONS = {"5ns": 5, "1us": 1000, "1.5ms": 1_500_000, "2s": 2 * 10**9, "1m": 60 * 10**9}
DURATIONS["0.5ns"] = Fraction(1, 2)  # type: ignore[assignment]
CMP = ("==", "!=", "<", "<=", ">", ">=")


def texts() -> st.SearchStrategy[str]:
    """Strings for attributes: words, numbers, almost numbers, and sometimes arbitrary text."""
    return st.one_of(
        st.sampled_from(TEXTS + NUMBER_TEXTS + NEAR_NUMBERS),
        st.integers(-(2**70), 2**70).map(str),
        st.floats(allow_nan=False, allow_infinity=False).map(repr),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    )


def scalars() -> st.SearchStrategy[str | bool | int | float]:
    """Attribute values that read as text or numbers."""
    return st.one_of(
        texts(),
        st.booleans(),
        st.sampled_from(INTEGERS),
        st.integers(-(2**63), 2**63 - 1),
        st.sampled_from(FLOATS + ODD_FLOATS),
        st.floats(),
    )


def values() -> st.SearchStrategy[Any]:
    """Attribute values, including bytes, arrays, key-value lists, and None."""
    members = st.one_of(scalars(), st.none(), st.binary(max_size=2))
    composite = st.one_of(
        st.none(),
        st.binary(max_size=3),
        st.lists(members, max_size=3),
        st.lists(st.lists(members, max_size=1), max_size=2),
        st.dictionaries(st.sampled_from(KEYS), members, max_size=2),
    )
    return st.one_of(scalars(), scalars(), scalars(), composite)


# Rules


def literal_of_text(text: str) -> Literal:
    """The literal for ``text`` in quotes."""
    return Literal(text, None)


def literal_of_number(number: float) -> Literal:
    """The literal for a number."""
    exact = exact_float(number) if isinstance(number, float) else number
    assert exact is not None
    return Literal(exact_text(exact), exact)


def literals() -> st.SearchStrategy[Literal]:
    """Values as in rules."""
    numbers = st.one_of(
        st.sampled_from(INTEGERS + FLOATS),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
    )
    return st.one_of(
        texts().map(literal_of_text),
        numbers.map(literal_of_number),
        st.sampled_from(sorted(DURATIONS.items())).map(lambda item: Literal(*item)),
    )


def attributes() -> st.SearchStrategy[Attribute]:
    """Attributes of all scopes."""
    plain = [key for key in KEYS if key.isascii() and key not in ("user id", "count")]
    return st.one_of(
        st.sampled_from(KEYS).map(lambda key: Attribute(Scope.ANY, key)),
        st.sampled_from(plain).map(lambda key: Attribute(Scope.RESOURCE, key)),
        st.sampled_from(FIELDS).map(lambda name: Attribute(Scope.FIELD, name)),
    )


@st.composite
def comparisons(draw: st.DrawFn) -> Compare:
    """Comparisons; the literal is often a possible value of the field."""
    attribute = draw(attributes())
    op = draw(st.sampled_from([*CMP, "in", "matches", "contains"]))
    if op == "matches":
        return Compare(attribute, op, (literal_of_text(draw(st.sampled_from(PATTERNS))),))
    choices = literals()
    if attribute.scope is Scope.FIELD:
        words = {"name": SPAN_NAMES, "kind": KINDS, "status": STATUSES}.get(attribute.name)
        if words is not None:
            choices |= st.sampled_from(words).map(literal_of_text)
    count = draw(st.integers(1, 3)) if op == "in" else 1
    return Compare(attribute, op, tuple(draw(choices) for _ in range(count)))


def _combine(leaves: st.SearchStrategy[Any], depth: int) -> st.SearchStrategy[Any]:
    """Trees of ``and``, ``or`` and ``not``, as the parser builds them."""
    nodes = leaves
    for _ in range(depth):
        several = st.lists(nodes, min_size=2, max_size=3)
        nodes = st.one_of(leaves, several.map(all_of), several.map(any_of), nodes.map(Not))
    return nodes


def predicates(depth: int = 2) -> st.SearchStrategy[Any]:
    """Predicates for ``where``."""
    return _combine(st.one_of(comparisons(), comparisons(), attributes().map(Truthy)), depth)


def span_sets() -> st.SearchStrategy[SpanSet]:
    """Span names and patterns, with or without a predicate."""
    names = st.sampled_from(SPAN_NAMES + NAME_PATTERNS)
    return st.builds(SpanSet, names, st.one_of(st.none(), predicates()))


@st.composite
def _counts(draw: st.DrawFn) -> CountCompare:
    number = st.one_of(
        st.integers(-1, 4), st.sampled_from([Fraction(1, 2), 2, Fraction(-3, 2), 10**30])
    )
    left: Any = draw(span_sets())
    right: Any = draw(st.one_of(number, number, span_sets()))
    if draw(st.booleans()):
        left, right = right, left
    return CountCompare(left, draw(st.sampled_from(CMP)), right)


def conditions(depth: int = 2) -> st.SearchStrategy[Node]:
    """Conditions of all kinds."""
    before = st.builds(Before, span_sets(), span_sets())
    return _combine(st.one_of(span_sets().map(Exists), _counts(), before), depth)


def rules(depth: int = 2) -> st.SearchStrategy[RuleSyntax]:
    """Rules of all kinds, as the parser builds them."""
    part = conditions(depth)
    when = st.one_of(st.none(), part)
    return st.one_of(
        st.builds(RuleSyntax, when, part, part),
        st.builds(RuleSyntax, when, part, st.none()),
        st.builds(RuleSyntax, when, st.none(), part),
        st.builds(RuleSyntax, st.none(), st.none(), part, st.just(True)),
    )


# Traces


@st.composite
def traces(draw: st.DrawFn, max_spans: int = 12, trace_id: bytes = b"\7" * 16) -> list[OracleSpan]:
    """The spans of one trace; some are repeated, some have the same start."""
    attribute_sets = st.dictionaries(st.sampled_from(KEYS), values(), max_size=3)
    resources = draw(st.lists(attribute_sets, min_size=1, max_size=2))
    base = 1_700_000_000_000_000_000
    spans = []
    for number in range(draw(st.integers(0, max_spans))):
        start = base + draw(st.integers(0, 5)) * 1_000_000
        duration = draw(st.sampled_from([0, 5, 1000, 1_500_000, 2 * 10**9, -10]))
        spans.append(
            OracleSpan(
                name=draw(st.sampled_from(SPAN_NAMES)),
                trace_id=trace_id,
                span_id=(number + 1).to_bytes(8, "big"),
                start=start,
                end=start + duration,
                kind=draw(st.sampled_from(KINDS)),
                status=draw(st.sampled_from(STATUSES)),
                status_message=draw(st.sampled_from(("", "a", "1500", "日本"))),
                attributes=draw(attribute_sets),
                resource=draw(st.sampled_from(resources)),
                scope=draw(st.sampled_from(("", "lib", "1500"))),
            )
        )
    if spans:
        spans += draw(st.lists(st.sampled_from(spans), max_size=3))
    return draw(st.permutations(spans))


@st.composite
def splits(draw: st.DrawFn, spans: Sequence[OracleSpan]) -> list[list[OracleSpan]]:
    """``spans``, in this order, as the contents of one or more requests."""
    cuts = sorted(draw(st.lists(st.integers(0, len(spans)), max_size=4)))
    bounds = [0, *cuts, len(spans)]
    return [list(spans[a:b]) for a, b in itertools.pairwise(bounds)]


def encode(spans: Sequence[OracleSpan]) -> bytes:
    """An ExportTraceServiceRequest of ``spans`` in this order, as protobuf.

    Consecutive spans with the same resource or scope share a message.
    """
    request = ExportTraceServiceRequest()
    last: OracleSpan | None = None
    for span in spans:
        # By repr, because 1 == 1.0 == True, and NaN differs from itself.
        same_resource = last is not None and repr(last.resource) == repr(span.resource)
        if not same_resource:
            resource = request.resource_spans.add().resource
            _put_attributes(resource.attributes.add, span.resource)
        resource_spans = request.resource_spans[-1]
        if not same_resource or last is None or last.scope != span.scope:
            resource_spans.scope_spans.add().scope.name = span.scope
        _put_span(resource_spans.scope_spans[-1].spans.add(), span)
        last = span
    return request.SerializeToString()


def requests(spans: Sequence[OracleSpan]) -> st.SearchStrategy[list[bytes]]:
    """``spans`` as the bodies of one or more requests."""
    return splits(spans).map(lambda parts: [encode(part) for part in parts])


def _put_span(message: Span, span: OracleSpan) -> None:
    message.trace_id = span.trace_id
    message.span_id = span.span_id
    message.name = span.name
    message.start_time_unix_nano = span.start
    message.end_time_unix_nano = span.end
    message.kind = Span.SpanKind.ValueType(KINDS.index(span.kind))
    if span.status != "unset" or span.status_message:
        message.status.code = Status.StatusCode.ValueType(STATUSES.index(span.status))
        message.status.message = span.status_message
    _put_attributes(message.attributes.add, span.attributes)


def _put_attributes(add: Callable[[], KeyValue], attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        item = add()
        item.key = key
        item.value.SetInParent()
        _put_value(item.value, value)


def _put_value(message: AnyValue, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            message.bool_value = value
        case str():
            message.string_value = value
        case int():
            message.int_value = value
        case float():
            message.double_value = value
        case bytes():
            message.bytes_value = value
        case list():
            message.array_value.SetInParent()
            for item in value:
                _put_value(message.array_value.values.add(), item)
        case dict():
            message.kvlist_value.SetInParent()
            _put_attributes(message.kvlist_value.values.add, value)
        case _:
            raise TypeError(f"not an attribute value: {value!r}")
