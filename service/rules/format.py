"""Canonical text of syntax trees: ``parse(format_rule(rule)) == rule``.

It is also the name of a check in signals. Strings are quoted, names only if necessary, and
parentheses are written only where precedence requires them.
"""

from __future__ import annotations

import re

from betrace.service.rules.errors import KEYWORDS
from betrace.service.rules.syntax import (
    EVENT_FIELDS,
    LINK_FIELDS,
    SPAN_FIELDS,
    Aggregate,
    And,
    Arithmetic,
    Attribute,
    Before,
    Compare,
    Comparison,
    Constant,
    CountCompare,
    Counted,
    Exists,
    Expression,
    ForEach,
    Given,
    Literal,
    Node,
    Not,
    Number,
    Or,
    Part,
    Ref,
    Relative,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
)
from betrace.service.rules.values import exact_text

_SPAN_NAME = re.compile(r"[A-Za-z_*][A-Za-z0-9_*-]*(\.[A-Za-z_*][A-Za-z0-9_*-]*)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_-]*)*")


def format_rule(rule: RuleSyntax) -> str:
    """The rule on one line; ``when`` first, then ``always``, then ``never``."""
    if rule.bare and rule.never is not None:
        return format_condition(rule.never)
    word = rule.for_each.word if rule.for_each else None
    parts = [f"when {{ {format_condition(rule.when, word)} }}"] if rule.when is not None else []
    if rule.for_each is not None:
        parts.append(_for_each(rule.for_each))
    for name, node in (("always", rule.always), ("never", rule.never)):
        if node is not None:
            parts.append(f"{name} {{ {format_condition(node, word)} }}")
    return " ".join(parts)


def _for_each(each: ForEach) -> str:
    by = f" by {', '.join(map(format_ref, each.by))}" if each.by else ""
    return f"for each {format_check(each.spans)}{by} as {each.word}"


def format_check(spans: SpanSet, word: str | None = None) -> str:
    """A span set, such as ``payment.where(amount > 1000)``; ``word`` is the bound word of the
    rule, if any."""
    bare = _SPAN_NAME.fullmatch(spans.name) and not _has_keyword(spans.name)
    bare = spans.bound or (bare and spans.name != word)
    name = spans.name if bare else _quote(spans.name)
    return name if spans.where is None else f"{name}.where({format_condition(spans.where, word)})"


def format_condition(node: Node, word: str | None = None) -> str:
    """A condition or a predicate."""
    match node:
        case Or(items):
            return " or ".join(format_condition(item, word) for item in items)
        case And(items):
            return " and ".join(_operand(item, Or, word) for item in items)
        case Not(item):
            return f"not {_operand(item, And | Or, word)}"
        case Exists(spans):
            return format_check(spans, word)
        case CountCompare(left, op, right):
            return f"{_count(left)} {op} {_count(right)}"
        case Before(first, second):
            return f"{format_check(first, word)} before {format_check(second, word)}"
        case Comparison(left, op, right):
            return _comparison(left, op, right, word)
        case Given(ref, truthy):
            return format_ref(ref) if truthy else f"exists({format_ref(ref)})"
        case Relative() | Part():
            return _relation(node, word)
        case Truthy(attribute):
            return _attribute(attribute)
        case Compare(attribute, "in", literals):
            return f"{_attribute(attribute)} in [{', '.join(map(_literal, literals))}]"
        case Compare(attribute, "matches", literals):
            return f"{_attribute(attribute)} matches {_quote(literals[0].text)}"
        case Compare(attribute, op, literals):
            return f"{_attribute(attribute)} {op} {_literal(literals[0])}"


def format_ref(ref: Ref) -> str:
    """An attribute or field with its scope, such as ``.amount``, ``span:name`` or ``root:user``."""
    attribute = ref.attribute
    name = attribute.name
    if attribute.scope is Scope.FIELD:
        return f"{ref.scope or 'span'}:{name}"
    prefix = f"{ref.scope}:" if ref.scope else "."
    if attribute.scope is Scope.RESOURCE:
        return f"{prefix}resource.{name}"
    fields = {"event": EVENT_FIELDS, "link": LINK_FIELDS}.get(ref.scope, SPAN_FIELDS)
    bare = _NAME.fullmatch(name) and not _has_keyword(name)
    bare = bare and not (ref.scope and name in fields)
    bare = bare and (not name.startswith("resource.") or ref.scope in ("event", "link"))
    return prefix + (name if bare else _quote(name))


def format_expression(node: Expression, word: str | None = None) -> str:
    """A number or a ref."""
    match node:
        case Constant(value, text):
            return _quote(text) if isinstance(value, str) else text
        case Ref():
            return format_ref(node)
        case Aggregate(kind, spans, ref):
            of = f", {format_ref(ref)}" if ref is not None else ""
            return f"{kind}({format_check(spans, word)}{of})"
        case Counted(what):
            return f"count({_relation(what, word)})"
        case Arithmetic(first, rest):
            product = rest[0][0] in "*/"
            text = _part(first, product, word)
            for op, right in rest:
                text += f" {op} {_part(right, product, word)}"
            return text


def _part(node: Expression, product: bool, word: str | None) -> str:
    """An operand, in parentheses if it is a calculation that binds no tighter."""
    text = format_expression(node, word)
    inner = isinstance(node, Arithmetic) and (product or node.rest[0][0] in "+-")
    return f"({text})" if inner else text


def _relation(node: Relative | Part, word: str | None) -> str:
    if isinstance(node, Part):
        return f"{node.kind}({format_condition(node.where, word) if node.where else ''})"
    within = f" within {node.within.text}" if node.within is not None else ""
    return f"{node.kind}({format_check(node.spans, word)}{within})"


def _comparison(left: Expression, op: str, right: tuple[Expression, ...], word: str | None) -> str:
    values = [format_expression(each, word) for each in right]
    shown = f"[{', '.join(values)}]" if op == "in" else values[0]
    return f"{format_expression(left, word)} {op} {shown}"


def _operand(node: Node, looser: type[Node] | object, word: str | None) -> str:
    text = format_condition(node, word)
    return f"({text})" if isinstance(node, looser) else text  # type: ignore[arg-type]


def _count(side: SpanSet | Number) -> str:
    return f"count({format_check(side)})" if isinstance(side, SpanSet) else exact_text(side)


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
    bare = literal.number is not None or literal.text in ("true", "false")
    return literal.text if bare else _quote(literal.text)


def _quote(text: str) -> str:
    # A backslash is literal except before a backslash, a quote, or the end of the string.
    return '"' + re.sub(r'\\(?=[\\"]|\Z)', r"\\\\", text).replace('"', '\\"') + '"'


def _has_keyword(name: str) -> bool:
    return any(part in KEYWORDS for part in name.split("."))
