"""How a breach is described to people: what was forbidden, missing or required, and what was found.

The text is for reading. Programs use a signal's ``clause``, ``counts`` and ``evidence``.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from betrace.service.rules.format import format_check, format_condition
from betrace.service.rules.logic import MIRRORED, OPERATORS
from betrace.service.rules.syntax import (
    And,
    Before,
    CountCompare,
    Exists,
    Node,
    Not,
    Number,
    Or,
    RuleSyntax,
    SpanSet,
    span_sets,
)
from betrace.service.rules.values import exact_text

_AMOUNTS = {
    "==": "exactly",
    "!=": "other than",
    "<": "fewer than",
    "<=": "at most",
    ">": "more than",
    ">=": "at least",
}
MET, FORBIDDEN, MISSING, REQUIRED = "condition met", "forbidden", "missing", "required"

Counts = Mapping[str, int]


def breach_text(
    rule: RuleSyntax, clause: str, counts: Counts, groups: Mapping[str, Any] | None = None
) -> str:
    """Why a trace breaks ``rule``, such as ``missing: payment.fraud_check``.

    ``clause`` is the broken one (always | never); ``counts`` maps each check to the number of
    matching spans; ``groups`` are those of a signal of a rule with ``for each``. Of a clause with
    alternatives, only those are named that the counts do not rule out as the cause.
    """
    if rule.relational:
        return _relational_text(rule, clause, groups)
    causes = breach_causes(rule, clause, counts)
    if clause == "always":
        parts = [_required(part, counts) for part in causes]
    else:
        parts = [
            (MET, _phrase(part, counts)) if rule.bare else _forbidden(part, counts)
            for part in causes
        ]
    phrases: dict[str, list[str]] = {}
    for word, phrase in parts:
        phrases.setdefault(word, []).append(phrase)
    return "; ".join(
        f"{word}: {(', ' if word == MISSING else '; ').join(found)}"
        for word, found in phrases.items()
    )


def breach_causes(rule: RuleSyntax, clause: str, counts: Counts) -> list[Node]:
    """The parts of the broken clause that the counts do not rule out as the cause."""
    if clause == "always":
        return _causes(rule.always, And, holds=True, counts=counts)
    return _causes(rule.never, Or, holds=False, counts=counts)


def _relational_text(rule: RuleSyntax, clause: str, groups: Mapping[str, Any] | None) -> str:
    """Such as ``forbidden: count(q) > 3, broken by 2 of 7: order_id 17; order_id 23``."""
    condition = rule.always if clause == "always" else rule.never
    word = REQUIRED if clause == "always" else MET if rule.bare else FORBIDDEN
    text = word if condition is None else f"{word}: {format_condition(condition)}"
    if groups is None:
        return text
    keys = [
        ", ".join(f"{name} {value}" for name, value in example["key"].items())
        for example in groups["examples"]
    ]
    shown = "; ".join(key for key in keys if key)
    return f"{text}, broken by {groups['broken']} of {groups['of']}" + f": {shown}" * bool(shown)


def counts_text(counts: Counts) -> str:
    """The counts on one line, such as ``payment: 1, payment.fraud_check: 0``."""
    return ", ".join(f"{check}: {count}" for check, count in counts.items())


def _causes(
    node: Node | None, joined: type[And] | type[Or], *, holds: bool, counts: Counts
) -> list[Node]:
    """The parts of a clause, except those known to be ``holds``, which did not break it."""
    if node is None:
        return []
    parts: tuple[Node, ...] = node.items if isinstance(node, joined) else (node,)
    causes = [part for part in parts if _truth(part, counts) is not holds]
    return causes or list(parts)


def _forbidden(node: Node, counts: Counts) -> tuple[str, str]:
    match node:
        case Not(Exists(spans)):
            return MISSING, format_check(spans)
        case CountCompare(left, "!=", right):
            return REQUIRED, _phrase(CountCompare(left, "==", right), counts)
        case _:
            return FORBIDDEN, _phrase(node, counts)


def _required(node: Node, counts: Counts) -> tuple[str, str]:
    match node:
        case Exists(spans):
            return MISSING, format_check(spans)
        case Not(item):
            return FORBIDDEN, _phrase(item, counts)
        case CountCompare(left, "!=", right):
            return FORBIDDEN, _phrase(CountCompare(left, "==", right), counts)
        case _:
            return REQUIRED, _phrase(node, counts)


def _phrase(node: Node, counts: Counts) -> str:
    """A condition, and what was found."""
    match node:
        case Exists(spans):
            return f"{format_check(spans)}, found {_count(spans, counts)}"
        case CountCompare(SpanSet() as spans, op, int() | Fraction() as number):
            return _amount(spans, op, number, counts)
        case CountCompare(int() | Fraction() as number, op, SpanSet() as spans):
            return _amount(spans, MIRRORED.get(op, op), number, counts)
        case _:
            found = {format_check(spans): _count(spans, counts) for spans in span_sets(node)}
            return f"{format_condition(node)} ({counts_text(found)})"


def _amount(spans: SpanSet, op: str, number: Number, counts: Counts) -> str:
    amount = f"{_AMOUNTS[op]} {exact_text(number)}"
    return f"{amount} {format_check(spans)}, found {_count(spans, counts)}"


def _count(spans: SpanSet, counts: Counts) -> int:
    return counts.get(format_check(spans), 0)


def _side(side: SpanSet | Number, counts: Counts) -> Number:
    return _count(side, counts) if isinstance(side, SpanSet) else side


def _truth(node: Node, counts: Counts) -> bool | None:
    """The value of a condition as far as the counts tell."""
    match node:
        case Exists(spans):
            return _count(spans, counts) > 0
        case CountCompare(left, op, right):
            return bool(OPERATORS[op](_side(left, counts), _side(right, counts)))
        case Before(first, second):
            return None if _count(first, counts) and _count(second, counts) else False
        case Not(item):
            value = _truth(item, counts)
            return None if value is None else not value
        case And(items):
            values = [_truth(item, counts) for item in items]
            return False if False in values else None if None in values else True
        case Or(items):
            values = [_truth(item, counts) for item in items]
            return True if True in values else None if None in values else False
        case _:
            return None
