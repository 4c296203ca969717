"""Hypothesis strategies for relational rules and traces that often match them.

Rules are texts; spans have the format of the shared cases (:mod:`tests.support.trace_spans`).
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from betrace.service.rules.syntax import KINDS, STATUSES


def nanoseconds(milliseconds: Any) -> int:
    """A time of the cases, rounded to the nanosecond."""
    return round(Decimal(str(milliseconds)) * 1_000_000)


NAMES = ("a", "b", "c")
CMP = ("==", "!=", "<", "<=", ">", ">=")
VALUES: tuple[Any, ...] = (
    0, 1, 2, 2.0, 0.1, 0.2, 0.3, "1", "2", "2.0", "x", "true", "", True, False, -1, ".5", 0.5,
    2**53 + 1, 9007199254740992.0, ["x", 1], {"k": 1}, "unknown", 1e16,
)  # fmt: skip
LITERALS = ("0", "1", "2", "0.3", '"2"', "x", "true", '"2.0"', "-1", "9007199254740993", "unknown")


def _pick(*options: str) -> st.SearchStrategy[str]:
    return st.sampled_from(options)


@st.composite
def _refs(draw: st.DrawFn, bound: str, inside: bool) -> str:
    scopes = ["root:", *([".", ".", "parent:"] if inside else []), *([bound] if bound else [])]
    return draw(st.sampled_from(scopes)) + draw(_pick("k", "n", "n"))


@st.composite
def _numbers(draw: st.DrawFn, bound: str, inside: bool, depth: int) -> str:
    options = ["ref", "ref", "trace"] + (["sum"] if depth else [])
    options += ["counted"] if inside and depth else []
    match draw(st.sampled_from(options)):
        case "ref":
            return draw(_refs(bound, inside))
        case "trace":
            return draw(_pick("trace:spans", "trace:services", "trace:duration"))
        case "counted":
            what = draw(_pick("child", "descendant", "sibling", "event", "link"))
            if what in ("event", "link"):
                return f"count({what}({draw(_pick('', 'k == 1', 'exists(n)'))}))"
            return f"count({what}({draw(span_sets(bound, depth - 1))}))"
        case _:
            one, other = (draw(_numbers(bound, inside, depth - 1)) for _ in range(2))
            op = draw(_pick("+", "-", "*", "/"))
            return f"({one} {op} {other})"


@st.composite
def predicates(draw: st.DrawFn, bound: str, depth: int) -> str:
    """A predicate for ``where``; ``bound`` is the word of ``for each`` with a colon, or empty."""
    choices = ["attribute", "attribute", "refs", "given", "time"]
    choices += ["join"] * 2 if bound else []
    choices += ["relation"] * 3 + ["part", "number", "not", "and", "or"] if depth else []
    match draw(st.sampled_from(choices)):
        case "attribute":
            name = draw(_pick("k", "n", "span:status", "span:kind", "resource.k", "k"))
            op = draw(st.sampled_from([*CMP, "contains"]))
            return f"{name} {op} {draw(st.sampled_from(LITERALS))}"
        case "refs":
            op = draw(st.sampled_from([*CMP, "contains"]))
            return f"{draw(_pick('k', 'n'))} {op} {draw(_refs(bound, True))}"
        case "join":
            return f"{draw(_pick('k', 'n', 'span:parentId', 'span:id'))} == {bound}" + draw(
                _pick("k", "n")
            )
        case "given":
            return draw(_pick("exists(k)", "exists(parent:n)", "k", "span:root", "parent:k"))
        case "time":
            return draw(_pick("span:duration > 1ms", "span:start >= parent:end", "span:end > 0"))
        case "relation":
            kind = draw(
                _pick("parent", "child", "ancestor", "descendant", "sibling", "followed_by",
                      "preceded_by")
            )  # fmt: skip
            spans = draw(span_sets(bound, depth - 1))
            within = draw(_pick("", " within 1ms", " within 2ms")) if "_by" in kind else ""
            return f"{kind}({spans}{within})"
        case "part":
            return draw(
                _pick("event()", "link()", "event(k == 1)", "event(n > .n)", "link(k == x)",
                      "event(event:name == e and k == .k)", "event(event:sinceStart >= 1ms)",
                      "link(link:spanId == span:parentId)")
            )  # fmt: skip
        case "number":
            number = draw(_numbers(bound, True, depth - 1))
            return f"{number} {draw(st.sampled_from(CMP))} {draw(_pick('.n', '1', '2', 'root:n'))}"
        case "not":
            return f"not ({draw(predicates(bound, depth - 1))})"
        case word:
            one, other = (draw(predicates(bound, depth - 1)) for _ in range(2))
            return f"({one} {word} {other})"


@st.composite
def span_sets(draw: st.DrawFn, bound: str, depth: int) -> str:
    """Spans; the bound word among them."""
    names = [*NAMES, "*", *([bound[:-1]] * 2 if bound else [])]
    name = draw(st.sampled_from(names))
    if draw(st.booleans()):
        return name
    return f"{name}.where({draw(predicates(bound, depth))})"


@st.composite
def conditions(draw: st.DrawFn, bound: str, depth: int) -> str:
    """A condition."""
    choices = ["spans", "spans", "count", "aggregate", "before", "trace"]
    choices += ["bound"] if bound else []
    choices += ["not", "and", "or"] if depth else []
    op = draw(st.sampled_from(CMP))
    match draw(st.sampled_from(choices)):
        case "spans":
            return draw(span_sets(bound, 2))
        case "count":
            right = draw(
                st.one_of(_pick("0", "1", "2", "1.5"), span_sets(bound, 1).map("count({})".format))
            )
            return f"count({draw(span_sets(bound, 1))}) {op} {right}"
        case "aggregate":
            kind = draw(_pick("sum", "avg", "min", "max", "distinct"))
            ref = draw(_pick("n", "k", "span:duration", "parent:n"))
            right = draw(_pick("0", "1", "0.3", "2", "trace:spans", "root:n"))
            return f"{kind}({draw(span_sets(bound, 1))}, {ref}) {op} {right}"
        case "before":
            return f"{draw(span_sets(bound, 1))} before {draw(span_sets(bound, 1))}"
        case "trace":
            return draw(
                _pick("trace:spans > 3", "trace:duration > 2ms", "trace:services == 1", "root:k",
                      "root:name == a", "exists(root:n)", "root:n < 2", "root:k contains x")
            )  # fmt: skip
        case "bound":
            return f"{bound}{draw(_pick('k', 'n'))} {op} {draw(st.sampled_from(LITERALS))}"
        case "not":
            return f"not ({draw(conditions(bound, depth - 1))})"
        case word:
            one, other = (draw(conditions(bound, depth - 1)) for _ in range(2))
            return f"({one} {word} {other})"


@st.composite
def relational_rules(draw: st.DrawFn) -> str:
    """A rule, which may be one that the fold decides."""
    when = f"when {{ {draw(conditions('', 1))} }} " if draw(st.integers(0, 3)) == 0 else ""
    each = bound = ""
    if draw(st.booleans()):
        by = draw(_pick("", "", " by k, n", " by n, k, resource.k", " by n, .k, span:parentId"))
        each = f"for each {draw(span_sets('', 1))}{by} as w "
        bound = "w:"
    clauses = [f"{name} {{ {draw(conditions(bound, 2))} }}" for name in ("always", "never")]
    chosen = draw(st.sampled_from([clauses[:1], clauses[1:], clauses]))
    return when + each + " ".join(chosen)


@st.composite
def case_traces(draw: st.DrawFn, max_spans: int = 8) -> list[dict[str, Any]]:
    """The distinct spans of a trace, at least one."""
    count = draw(st.integers(1, max_spans))
    values = st.sampled_from(VALUES)
    attributes = st.dictionaries(st.sampled_from(["k", "n"]), values, max_size=2)
    parents = [*(f"{i:016x}" for i in range(1, count + 1)), f"{99:016x}", "", ""]
    spans = []
    for number in range(1, count + 1):
        part = {"attributes": draw(attributes)}
        events = [
            {**part, "name": draw(_pick("e", "f")), "offset_ms": draw(st.integers(0, 2))}
            for _ in range(draw(st.sampled_from([0, 0, 1, 2])))
        ]
        links = [
            {**part, "trace_id": f"{7:032x}", "span_id": draw(st.sampled_from(parents[:-2]))}
            for _ in range(draw(st.sampled_from([0, 0, 1])))
        ]
        spans.append(
            {
                "name": draw(st.sampled_from(NAMES)),
                "span_id": f"{number:016x}",
                "parent_id": draw(st.sampled_from(parents)),
                "start_ms": draw(st.integers(0, 4)),
                "duration_ms": draw(st.sampled_from([0, 1, 2.5])),
                "kind": draw(st.sampled_from(KINDS)),
                "status": draw(st.sampled_from(STATUSES)),
                "attributes": draw(attributes),
                "resource": draw(st.sampled_from([{}, {"k": "x"}, {"service.name": "s", "n": 2}])),
                "events": events,
                "links": links,
            }
        )
    return spans


def encode_cases(spans: Sequence[dict[str, Any]], trace_id: bytes) -> bytes:
    """An export request with spans in the format of the cases."""
    request = ExportTraceServiceRequest()
    for span in spans:
        owner = request.resource_spans.add()
        for key, value in span.get("resource", {}).items():
            _set(owner.resource.attributes.add(key=key).value, value)
        start = nanoseconds(span["start_ms"]) + 1_000_000_000
        scope = owner.scope_spans.add()
        scope.scope.name = span.get("scope", "")
        message = scope.spans.add(
            trace_id=trace_id,
            span_id=bytes.fromhex(span["span_id"]),
            parent_span_id=bytes.fromhex(span["parent_id"]),
            name=span["name"],
            kind=KINDS.index(span["kind"]),  # type: ignore[arg-type]
            start_time_unix_nano=start,
            end_time_unix_nano=start + nanoseconds(span["duration_ms"]),
        )
        message.status.code = STATUSES.index(span["status"])  # type: ignore[assignment]
        message.status.message = span.get("status_message", "")
        for key, value in span["attributes"].items():
            _set(message.attributes.add(key=key).value, value)
        for event in span["events"]:
            at = start + nanoseconds(event.get("offset_ms", 0))
            added = message.events.add(name=event["name"], time_unix_nano=at)
            for key, value in event["attributes"].items():
                _set(added.attributes.add(key=key).value, value)
        for link in span["links"]:
            _add_link(message, link)
    return request.SerializeToString()


def _add_link(message: Span, link: dict[str, Any]) -> None:
    added = message.links.add(
        trace_id=bytes.fromhex(link["trace_id"]), span_id=bytes.fromhex(link["span_id"])
    )
    for key, value in link["attributes"].items():
        _set(added.attributes.add(key=key).value, value)


def _set(target: AnyValue, value: Any) -> None:
    match value:
        case bool():
            target.bool_value = value
        case int():
            target.int_value = value
        case float():
            target.double_value = value
        case str():
            target.string_value = value
        case list():
            target.array_value.SetInParent()
            for item in value:
                _set(target.array_value.values.add(), item)
        case dict():
            target.kvlist_value.SetInParent()
            for key, item in value.items():
                _set(target.kvlist_value.values.add(key=key).value, item)
