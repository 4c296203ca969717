"""The syntax tree of a rule, which :mod:`betrace.service.rules.parse` builds. Nodes are immutable
and hashable, so that rules can share equal checks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

Number = int | float


class Scope(StrEnum):
    """Where an attribute is looked up."""

    ANY = "any"  # on the span, then on its resource
    RESOURCE = "resource"  # resource.x: on the resource alone; name is "x"
    FIELD = "field"  # span:x: a field of the span itself; name is "x"


# span:<field>
FIELDS = ("name", "kind", "status", "statusMessage", "duration", "service", "scope")
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
    ``0.5``), a duration or word as written. ``number`` is its value if it reads as a number, else
    None: an int if it has no fraction or exponent, else a float; a duration in nanoseconds. A
    quoted ``"1500"`` reads as a number, too.
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
    """The spans with a name (a pattern if it contains ``*``) that satisfy a predicate."""

    name: str
    where: Predicate | None = None


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


Predicate = Compare | Truthy | And | Or | Not
Condition = Exists | CountCompare | Before | And | Or | Not
Node = Predicate | Condition


@dataclass(frozen=True, slots=True)
class RuleSyntax:
    """A parsed rule. A bare condition C is ``never {C}`` with ``bare`` true."""

    when: Condition | None
    always: Condition | None
    never: Condition | None
    bare: bool = False


def span_sets(node: Node | None) -> list[SpanSet]:
    """The distinct span sets below ``node``, in order of first appearance."""
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
            case And(items) | Or(items):
                for item in items:
                    visit(item)
            case Not(item):
                visit(item)
            case _:
                pass

    visit(node)
    return list(found)
