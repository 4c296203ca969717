"""A second, naive reading of relational rules, for the tests of the product's evaluator.

It shares only the syntax tree with the product. It looks at every span for every question, and
compares with code of its own. Spans have the format of the shared cases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from betrace.service.rules.syntax import (
    Aggregate,
    And,
    Arithmetic,
    Before,
    Comparison,
    Constant,
    Counted,
    Exists,
    Given,
    Not,
    Or,
    Part,
    Ref,
    Relative,
    RuleSyntax,
    Scope,
    SpanSet,
)
from tests.support.comparison_oracle import alike, as_number, as_text, exact, is_number, relates
from tests.support.oracle import name_matches

Span = dict[str, Any]


@dataclass(frozen=True)
class Here:
    """Where something is evaluated: the whole trace, the group (its spans and values), and the
    span, event or link being judged."""

    trace: list[Span]
    word: str = ""
    group: tuple[Span, ...] = ()
    values: tuple[tuple[Ref, Any], ...] = ()
    span: Span | None = None
    part: Span | None = None


def breaks(rule: RuleSyntax, spans: list[Span]) -> bool:
    """Whether the trace with these distinct spans breaks the rule."""
    here = Here(spans)
    if rule.when is not None and not true(rule.when, here):
        return False
    if rule.for_each is None:
        return clause_broken(rule, here)
    here = replace(here, word=rule.for_each.word)
    chosen = [span for span in spans if belongs(rule.for_each.spans, span, here)]
    if not rule.for_each.by:
        return any(clause_broken(rule, replace(here, group=(span,))) for span in chosen)
    by = rule.for_each.by
    for first in chosen:
        mine = [value(ref, replace(here, span=first)) for ref in by]
        same = []
        for span in chosen:
            theirs = [value(ref, replace(here, span=span)) for ref in by]
            if all(alike(a, b) for a, b in zip(mine, theirs, strict=True)):
                same.append((span, theirs))
        if not same:
            continue
        of_group = []
        for number, ref in enumerate(by):
            found = [theirs[number] for _, theirs in same]
            numbers = [v for v in found if is_number(v)]
            of_group.append((ref, numbers[0] if numbers else found[0]))
        group = tuple(span for span, _ in same)
        if clause_broken(rule, replace(here, group=group, values=tuple(of_group))):
            return True
    return False


def clause_broken(rule: RuleSyntax, here: Here) -> bool:
    if rule.always is not None and not true(rule.always, here):
        return True
    return rule.never is not None and true(rule.never, here)


def true(node: Any, here: Here) -> bool:
    """Whether a condition or predicate holds."""
    match node:
        case And(items):
            return all(true(item, here) for item in items)
        case Or(items):
            return any(true(item, here) for item in items)
        case Not(item):
            return not true(item, here)
        case Exists(spans):
            return bool(members(spans, here))
        case Before(first, second):
            one, other = ([s["start_ms"] for s in members(x, here)] for x in (first, second))
            return bool(one) and bool(other) and min(one) < min(other)
        case Given(ref, truthy):
            found = value(ref, here)
            if not truthy:
                return found is not None
            if isinstance(found, str):
                return found == "true"
            return found is True or (is_number(found) and found != 0)
        case Comparison(left, "in", right):
            return any(relates(value(left, here), "==", value(each, here)) for each in right)
        case Comparison(left, op, (right,)):
            return relates(value(left, here), op, value(right, here))
        case Relative(kind, spans, within):
            nanoseconds = within.value if within is not None else None
            return any(
                is_relative(kind, other, here.span, here.trace, nanoseconds)
                for other in members(spans, here)
            )
        case Part():
            return parts(node, here) > 0
    raise AssertionError(node)


def members(spans: SpanSet, here: Here) -> list[Span]:
    return [span for span in here.trace if belongs(spans, span, here)]


def belongs(spans: SpanSet, span: Span, here: Here) -> bool:
    if spans.bound:
        named = any(span is each for each in here.group)
    else:
        named = name_matches(spans.name, span["name"])
    if not named or spans.where is None:
        return named
    return true(spans.where, replace(here, span=span, part=None))


def parts(node: Part, here: Here) -> int:
    assert here.span is not None
    return sum(
        node.where is None or true(node.where, replace(here, part=each))
        for each in here.span[f"{node.kind}s"]
    )


def parent_of(span: Span, trace: list[Span]) -> Span | None:
    return next((s for s in trace if s["span_id"] == span["parent_id"] and s is not span), None)


def ancestors_of(span: Span, trace: list[Span]) -> list[Span]:
    found: list[Span] = []
    at = parent_of(span, trace)
    while at is not None and at is not span and not any(at is each for each in found):
        found.append(at)
        at = parent_of(at, trace)
    return found


def is_relative(kind: str, other: Span, span: Span | None, trace: list[Span], within: Any) -> bool:
    """Whether ``other`` is a relative of ``span`` of this kind."""
    assert span is not None
    if other is span:
        return False
    later = Fraction(Decimal(str(other["start_ms"]))) - Fraction(Decimal(str(span["start_ms"])))
    later *= 1_000_000
    match kind:
        case "parent":
            return parent_of(span, trace) is other
        case "child":
            return parent_of(other, trace) is span
        case "ancestor":
            return any(other is each for each in ancestors_of(span, trace))
        case "descendant":
            return any(span is each for each in ancestors_of(other, trace))
        case "sibling":
            return span["parent_id"] != "" and other["parent_id"] == span["parent_id"]
        case "followed_by":
            return later > 0 and (within is None or later <= within)
    return later < 0 and (within is None or -later <= within)


# Values


def value(node: Any, here: Here) -> Any:
    """The value of an expression; None if it is missing."""
    match node:
        case Constant(found):
            return found
        case Ref():
            return of_ref(node, here)
        case Counted(Part() as part):
            return parts(part, here)
        case Counted(Relative(kind, spans)):
            return sum(
                is_relative(kind, other, here.span, here.trace, None)
                for other in members(spans, here)
            )
        case Arithmetic(first, rest):
            total = value(first, here)
            for op, right in rest:
                one, other = as_number(total), as_number(value(right, here))
                if one is None or other is None or (op == "/" and other == 0):
                    total = None
                else:
                    total = {
                        "+": lambda a, b: a + b,
                        "-": lambda a, b: a - b,
                        "*": lambda a, b: a * b,
                        "/": lambda a, b: a / b,
                    }[op](one, other)
            return total
        case Aggregate("count", spans):
            return len(members(spans, here))
        case Aggregate(kind, spans, ref):
            found = [value(ref, replace(here, span=s, part=None)) for s in members(spans, here)]
            if kind == "distinct":
                return len({as_text(each) for each in found} - {None})
            numbers = [n for each in found if (n := as_number(each)) is not None]
            if kind == "sum":
                return sum(numbers)
            if not numbers:
                return None
            if kind == "avg":
                return sum(numbers) / len(numbers)
            return min(numbers) if kind == "min" else max(numbers)
    raise AssertionError(node)


def of_ref(ref: Ref, here: Here) -> Any:
    name, is_field = ref.attribute.name, ref.attribute.scope is Scope.FIELD
    if ref.scope in ("event", "link"):
        assert here.part is not None
        if not is_field:
            return exact(here.part["attributes"].get(name))
        if name == "sinceStart":
            return Fraction(Decimal(str(here.part["offset_ms"]))) * 1_000_000
        return here.part[{"traceId": "trace_id", "spanId": "span_id"}.get(name, name)]
    if ref.scope == "trace":
        if name == "spans":
            return len(here.trace)
        if name == "services":
            services = {span["resource"].get("service.name") for span in here.trace}
            return len(services - {None})
        return max(map(end, here.trace)) - min(map(start, here.trace))
    span: Span | None
    match ref.scope:
        case "":
            span = here.span
        case "parent":
            span = parent_of(here.span, here.trace) if here.span is not None else None
        case "root":
            roots = [s for s in here.trace if not s["parent_id"]]
            span = min(roots, key=lambda s: (s["start_ms"], s["span_id"]), default=None)
        case _:
            assert ref.scope == here.word
            if here.values:
                return dict(here.values)[Ref("", ref.attribute)]
            (span,) = here.group
    if span is None:
        return None
    if is_field:
        return field(span, name)
    attributes, resource = span["attributes"], span["resource"]
    if ref.attribute.scope is Scope.ANY and attributes.get(name) is not None:
        return exact(attributes[name])
    return exact(resource.get(name))


def start(span: Span) -> Fraction:
    return Fraction(Decimal(str(span["start_ms"]))) * 1_000_000 + 1_000_000_000


def end(span: Span) -> Fraction:
    return start(span) + Fraction(Decimal(str(span["duration_ms"]))) * 1_000_000


def field(span: Span, name: str) -> Any:
    match name:
        case "duration":
            return max(0, end(span) - start(span))
        case "start":
            return start(span)
        case "end":
            return end(span)
        case "id":
            return span["span_id"]
        case "parentId":
            return span["parent_id"] or None
        case "root":
            return span["parent_id"] == ""
        case "name" | "kind" | "status":
            return span[name]
    raise AssertionError(name)
