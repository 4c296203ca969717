"""Canonical text of syntax trees: ``parse(format_rule(rule)) == rule``.

It is also the name of a check in signals. Strings are quoted, names only if necessary, and
parentheses are written only where precedence requires them.
"""

from __future__ import annotations

import re

from betrace.service.rules.errors import KEYWORDS
from betrace.service.rules.syntax import (
    And,
    Attribute,
    Before,
    Compare,
    CountCompare,
    Exists,
    Literal,
    Node,
    Not,
    Number,
    Or,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
)
from betrace.service.rules.values import number_text, read_number

_SPAN_NAME = re.compile(r"[A-Za-z_*][A-Za-z0-9_*-]*(\.[A-Za-z_*][A-Za-z0-9_*-]*)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_-]*)*")


def format_rule(rule: RuleSyntax) -> str:
    """The rule on one line; ``when`` first, then ``always``, then ``never``."""
    if rule.bare and rule.never is not None:
        return format_condition(rule.never)
    clauses = (("when", rule.when), ("always", rule.always), ("never", rule.never))
    return " ".join(
        f"{word} {{ {format_condition(node)} }}" for word, node in clauses if node is not None
    )


def format_check(spans: SpanSet) -> str:
    """A span set, such as ``payment.where(amount > 1000)``."""
    bare = _SPAN_NAME.fullmatch(spans.name) and not _has_keyword(spans.name)
    name = spans.name if bare else _quote(spans.name)
    return name if spans.where is None else f"{name}.where({format_condition(spans.where)})"


def format_condition(node: Node) -> str:
    """A condition or a predicate."""
    match node:
        case Or(items):
            return " or ".join(format_condition(item) for item in items)
        case And(items):
            return " and ".join(_operand(item, Or) for item in items)
        case Not(item):
            return f"not {_operand(item, And | Or)}"
        case Exists(spans):
            return format_check(spans)
        case CountCompare(left, op, right):
            return f"{_count(left)} {op} {_count(right)}"
        case Before(first, second):
            return f"{format_check(first)} before {format_check(second)}"
        case Truthy(attribute):
            return _attribute(attribute)
        case Compare(attribute, "in", literals):
            return f"{_attribute(attribute)} in [{', '.join(map(_literal, literals))}]"
        case Compare(attribute, "matches", literals):
            return f"{_attribute(attribute)} matches {_quote(literals[0].text)}"
        case Compare(attribute, op, literals):
            return f"{_attribute(attribute)} {op} {_literal(literals[0])}"


def _operand(node: Node, looser: type[Node] | object) -> str:
    text = format_condition(node)
    return f"({text})" if isinstance(node, looser) else text  # type: ignore[arg-type]


def _count(side: SpanSet | Number) -> str:
    return f"count({format_check(side)})" if isinstance(side, SpanSet) else number_text(side)


def _attribute(attribute: Attribute) -> str:
    match attribute.scope:
        case Scope.FIELD:
            return f"span:{attribute.name}"
        case Scope.RESOURCE:
            return f"resource.{attribute.name}"
        case Scope.ANY:
            name = attribute.name
            bare = _NAME.fullmatch(name) and not _has_keyword(name)
            return name if bare and not name.startswith("resource.") else _quote(name)


def _literal(literal: Literal) -> str:
    if literal.number is None:
        return literal.text if literal.text in ("true", "false") else _quote(literal.text)
    number = read_number(literal.text)
    if number is None:  # a duration
        return literal.text
    return literal.text if number_text(literal.number) == literal.text else _quote(literal.text)


def _quote(text: str) -> str:
    # A backslash is literal except before a backslash, a quote, or the end of the string.
    return '"' + re.sub(r'\\(?=[\\"]|\Z)', r"\\\\", text).replace('"', '\\"') + '"'


def _has_keyword(name: str) -> bool:
    return any(part in KEYWORDS for part in name.split("."))
