"""The syntax tree of a rule, which :mod:`betrace.service.rules.parse` builds. Nodes are immutable
and hashable, so that rules can share equal checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

Number = int | Fraction
"""An exact number."""


class Scope(StrEnum):
    """Where an attribute is looked up."""

    ANY = "any"  # on the span, then on its resource
    RESOURCE = "resource"  # resource.x: on the resource alone; name is "x"
    FIELD = "field"  # span:x: a field of the span itself; name is "x"


# span:<field>
FIELDS = ("name", "kind", "status", "statusMessage", "duration", "service", "scope")
SPAN_FIELDS = (*FIELDS, "id", "parentId", "start", "end", "root")  # the last five: in relations
TRACE_FIELDS = ("duration", "spans", "services")
EVENT_FIELDS = ("name", "sinceStart")
LINK_FIELDS = ("traceId", "spanId")
KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")  # by SpanKind
STATUSES = ("unset", "ok", "error")  # by StatusCode


@dataclass(frozen=True, slots=True)
class Attribute:
    scope: Scope
    name: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A value in a rule.

    ``text`` is its text: the characters of a string, a number without trailing zeros (``1000``,
    ``0.5``), a duration or word as written. ``number`` is the exact value of a number or duration
    (in nanoseconds), None for text, such as a quoted ``"1500"``.
    """

    text: str
    number: Number | None


@dataclass(frozen=True, slots=True)
class Compare:
    """``attribute op literal``; ``op`` is one of ``== != < <= > >= in matches contains``.
    Only ``in`` may have several literals."""

    attribute: Attribute
    op: str
    literals: tuple[Literal, ...]


@dataclass(frozen=True, slots=True)
class Truthy:
    """A bare attribute."""

    attribute: Attribute


@dataclass(frozen=True, slots=True)
class SpanSet:
    """The spans with a name (a pattern if it contains ``*``) that satisfy a predicate. If it is
    ``bound``, the name is the word after ``as`` and stands for the spans of the group."""

    name: str
    where: Predicate | None = None
    bound: bool = False


@dataclass(frozen=True, slots=True)
class Exists:
    spans: SpanSet


@dataclass(frozen=True, slots=True)
class CountCompare:
    """``left op right``, each side a count or a number, at least one a count;
    ``op`` is one of ``== != < <= > >=``."""

    left: SpanSet | Number
    op: str
    right: SpanSet | Number


@dataclass(frozen=True, slots=True)
class Before:
    first: SpanSet
    second: SpanSet


@dataclass(frozen=True, slots=True)
class And:
    items: tuple[Node, ...]  # two or more


@dataclass(frozen=True, slots=True)
class Or:
    items: tuple[Node, ...]  # two or more


@dataclass(frozen=True, slots=True)
class Not:
    item: Node


# The nodes below relate spans to each other. A rule that has one of them is *relational*: its tree
# has no Compare, Truthy or CountCompare, but a Comparison or Given in their place.


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal with its exact value: a number (a duration in nanoseconds), or text. ``text`` is
    the text of the value, or, for a duration, what the rule says."""

    value: int | Fraction | str
    text: str


@dataclass(frozen=True, slots=True)
class Ref:
    """An attribute or field of a span, an event, a link or the trace.

    ``scope`` is empty for the span being judged, else ``parent root trace event link`` or the bound
    word. ``attribute.scope`` is ``FIELD`` for a field.
    """

    scope: str
    attribute: Attribute


@dataclass(frozen=True, slots=True)
class Aggregate:
    """``count sum avg min max distinct`` of spans; ``ref`` is None for ``count``."""

    kind: str
    spans: SpanSet
    ref: Ref | None = None


@dataclass(frozen=True, slots=True)
class Relative:
    """``parent child ancestor descendant sibling``: such a relative is one of ``spans``; or
    ``followed_by preceded_by``, within so many nanoseconds if given (with the text as written)."""

    kind: str
    spans: SpanSet
    within: Constant | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The span has an ``event`` or ``link`` that satisfies ``where``."""

    kind: str
    where: Predicate | None = None


@dataclass(frozen=True, slots=True)
class Counted:
    """The number of relatives, events or links."""

    what: Relative | Part


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``first`` and then operators (``+ -`` or ``* /``) with their right operands, from left to
    right."""

    first: Expression
    rest: tuple[tuple[str, Expression], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """``left op right``; ``op`` is one of ``== != < <= > >= in matches contains``. Only ``in`` may
    have several operands on the right."""

    left: Expression
    op: str
    right: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """``exists(ref)``, or with ``truthy`` a bare ref."""

    ref: Ref
    truthy: bool = False


@dataclass(frozen=True, slots=True)
class ForEach:
    """``for each spans by refs as word``; ``by`` is empty if each span is judged by itself."""

    spans: SpanSet
    by: tuple[Ref, ...]
    word: str


Expression = Constant | Ref | Aggregate | Counted | Arithmetic
Predicate = Compare | Truthy | Comparison | Given | Relative | Part | And | Or | Not
Condition = Exists | CountCompare | Before | Comparison | Given | And | Or | Not
Node = Predicate | Condition


@dataclass(frozen=True, slots=True)
class RuleSyntax:
    """A parsed rule. A bare condition C is ``never {C}`` with ``bare`` true. ``relational`` tells
    whether it relates spans to each other."""

    when: Condition | None
    always: Condition | None
    never: Condition | None
    bare: bool = False
    for_each: ForEach | None = None
    relational: bool = False


def all_of(items: Sequence[Node]) -> Node:
    """The conjunction of one or more nodes; nested conjunctions are merged into it."""
    flat = [part for item in items for part in (item.items if isinstance(item, And) else (item,))]
    return flat[0] if len(flat) == 1 else And(tuple(flat))


def any_of(items: Sequence[Node]) -> Node:
    """The disjunction of one or more nodes; nested disjunctions are merged into it."""
    flat = [part for item in items for part in (item.items if isinstance(item, Or) else (item,))]
    return flat[0] if len(flat) == 1 else Or(tuple(flat))


def span_sets(node: Node | None) -> list[SpanSet]:
    """The distinct span sets that a condition names itself (not those inside ``where``), in order
    of first appearance."""
    found: dict[SpanSet, None] = {}

    def visit(n: Node | None) -> None:
        match n:
            case Exists(spans):
                found.setdefault(spans)
            case CountCompare(left, _, right):
                for side in (left, right):
                    if isinstance(side, SpanSet):
                        found.setdefault(side)
            case Before(first, second):
                found.setdefault(first)
                found.setdefault(second)
            case Comparison(left, _, rights):
                for each in (left, *rights):
                    operand(each)
            case And(items) | Or(items):
                for item in items:
                    visit(item)
            case Not(item):
                visit(item)
            case _:
                pass

    def operand(part: Expression) -> None:
        match part:
            case Aggregate(_, spans):
                found.setdefault(spans)
            case Arithmetic(first, rest):
                for each in (first, *(right for _, right in rest)):
                    operand(each)
            case _:
                pass

    visit(node)
    return list(found)
