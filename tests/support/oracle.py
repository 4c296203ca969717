"""A naive evaluator of rules, written from the specification alone.

It sees the whole trace at once and compares with its own code (exact fractions, code points). It
shares only the syntax tree with the product. Product and oracle test each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import re2

from betrace.service.rules.format import format_check
from betrace.service.rules.syntax import (
    And,
    Attribute,
    Before,
    Compare,
    CountCompare,
    Exists,
    Literal,
    Not,
    Or,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
    span_sets,
)
from tests.support.comparison_oracle import as_number, as_text, exact, relates


@dataclass(frozen=True)
class OracleSpan:
    """A span. Attribute values are str, bool, int, float, bytes, list, dict, or None for an
    attribute without a value, which counts as missing."""

    name: str
    trace_id: bytes = b"\1" * 16
    span_id: bytes = b"\1" * 8
    start: int = 0  # nanoseconds
    end: int = 1_000_000
    kind: str = "internal"
    status: str = "unset"
    status_message: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    resource: dict[str, Any] = field(default_factory=dict)
    scope: str = ""


@dataclass(frozen=True)
class Verdict:
    """``matched`` has the ids of all spans of each check, in order of their start."""

    clause: str
    counts: dict[str, int]
    matched: dict[str, list[bytes]]


def breach(rule: RuleSyntax, spans: Sequence[OracleSpan]) -> Verdict | None:
    """The breach of ``rule`` by the trace with these spans; None if it does not break it."""
    distinct = {(span.trace_id, span.span_id): span for span in reversed(spans)}
    trace = list(distinct.values())
    if rule.when is not None and not holds(rule.when, trace):
        return None
    if rule.always is not None and not holds(rule.always, trace):
        clause = "always"
    elif rule.never is not None and holds(rule.never, trace):
        clause = "never"
    else:
        return None
    counts, matched = {}, {}
    for part in (rule.when, rule.always, rule.never):
        for check in span_sets(part):
            found = sorted(matching(check, trace), key=lambda span: (span.start, span.span_id))
            counts[format_check(check)] = len(found)
            matched[format_check(check)] = [span.span_id for span in found]
    return Verdict(clause, counts, matched)


def holds(condition: Any, trace: list[OracleSpan]) -> bool:
    """Whether a condition holds for a whole trace."""
    match condition:
        case Or(items):
            return any(holds(item, trace) for item in items)
        case And(items):
            return all(holds(item, trace) for item in items)
        case Not(item):
            return not holds(item, trace)
        case Exists(check):
            return len(matching(check, trace)) > 0
        case CountCompare(left, op, right):
            sides = [
                Fraction(len(matching(side, trace)) if isinstance(side, SpanSet) else side)
                for side in (left, right)
            ]
            return ORDER[op](sides[0], sides[1])
        case Before(first, second):
            starts = [[span.start for span in matching(c, trace)] for c in (first, second)]
            return bool(starts[0] and starts[1]) and min(starts[0]) < min(starts[1])
    raise AssertionError(condition)


def matching(check: SpanSet, trace: list[OracleSpan]) -> list[OracleSpan]:
    """The spans with the check's name that satisfy its predicate."""
    return [
        span
        for span in trace
        if name_matches(check.name, span.name)
        and (check.where is None or satisfies(check.where, span))
    ]


def name_matches(pattern: str, name: str) -> bool:
    """Whether a name matches a pattern; ``*`` stands for any text, including none."""
    reachable = {0}  # numbers of characters of the name that the pattern so far can match
    for char in pattern:
        if char == "*":
            reachable = set(range(min(reachable), len(name) + 1)) if reachable else set()
        else:
            reachable = {i + 1 for i in reachable if name[i : i + 1] == char}
    return len(name) in reachable


def satisfies(predicate: Any, span: OracleSpan) -> bool:
    """Whether a span satisfies a predicate."""
    match predicate:
        case Or(items):
            return any(satisfies(item, span) for item in items)
        case And(items):
            return all(satisfies(item, span) for item in items)
        case Not(item):
            return not satisfies(item, span)
        case Truthy(attribute):
            return is_true(look_up(attribute, span))
        case Compare(attribute, op, literals):
            return compares(look_up(attribute, span), op, literals)
    raise AssertionError(predicate)


def look_up(attribute: Attribute, span: OracleSpan) -> Any:
    """The attribute's value; None if it is missing."""
    if attribute.scope is Scope.FIELD:
        service = span.resource.get("service.name")
        return {
            "name": span.name,
            "kind": span.kind,
            "status": span.status,
            "statusMessage": span.status_message,
            "duration": span.end - span.start if span.end > span.start else 0,
            "service": service if isinstance(service, str) else None,
            "scope": span.scope,
        }[attribute.name]
    if attribute.scope is Scope.ANY and span.attributes.get(attribute.name) is not None:
        return span.attributes[attribute.name]
    return span.resource.get(attribute.name)


def is_true(value: Any) -> bool:
    """Whether a bare attribute with this value holds."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value == "true"
    return isinstance(value, int | float) and value == value and value != 0


def compares(value: Any, op: str, literals: Sequence[Literal]) -> bool:
    """Whether ``value op literal``."""
    left, literal = exact(value), literals[0]
    if op == "in":
        return any(compares(value, "==", [member]) for member in literals)
    if op == "matches":
        text = as_text(left)
        return text is not None and re2.search(literal.text, text) is not None
    if op == "contains" and not isinstance(left, list):
        text = as_text(left)
        return text is not None and text.find(literal.text) >= 0
    right = literal.text if literal.number is None else literal.number
    if op in ("==", "!=") and isinstance(left, str) and as_number(left) is None:
        right = literal.text  # of a duration
    return relates(left, op, right)


ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a < b or a == b,
    ">": lambda a, b: b < a,
    ">=": lambda a, b: b < a or a == b,
}
