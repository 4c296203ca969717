"""Where in its text a rule was broken: the parts of the clause that its counts blame."""

from __future__ import annotations

from collections.abc import Sequence

from lark import Token

from betrace.service.rules.parse import tokens
from betrace.service.rules.syntax import And, Or, RuleSyntax
from betrace.service.rules.wording import Counts, breach_causes

_OPENING, _CLOSING = ("LBRACE", "LPAR", "LSQB"), ("RBRACE", "RPAR", "RSQB")

Place = tuple[int, int]
"""The first character of a part of a condition, and the one after its last."""


def broken_places(condition: str, rule: RuleSyntax, clause: str, counts: Counts) -> list[Place]:
    """The places in ``condition``, which was parsed to ``rule``, of the parts of its ``clause``
    (always | never) that broke it. The whole clause, if the counts do not tell its parts apart, as
    of a rule that relates spans."""
    found = _clause(tokens(condition), None if rule.bare else clause)
    if not found:
        return []
    node, joined, word = (rule.always, And, "AND") if clause == "always" else (rule.never, Or, "OR")
    if not rule.relational and isinstance(node, joined):
        parts = list(_split(found, word))
        if len(parts) == len(node.items):
            causes = breach_causes(rule, clause, counts)
            pairs = zip(parts, node.items, strict=True)
            return [_place(part) for part, item in pairs if item in causes]
    return [_place(found)]


def _clause(found: Sequence[Token], clause: str | None) -> Sequence[Token]:
    """The tokens between the braces of a clause; all tokens if ``clause`` is None."""
    if clause is None:
        return found
    depth = 0
    for k, token in enumerate(found):
        if depth == 0 and token.type == clause.upper():
            return _inside(found[k + 1 :])
        depth += (token.type in _OPENING) - (token.type in _CLOSING)
    return []


def _inside(found: Sequence[Token]) -> Sequence[Token]:
    """The tokens within the bracket that ``found`` begins with."""
    depth = 0
    for k, token in enumerate(found):
        depth += (token.type in _OPENING) - (token.type in _CLOSING)
        if depth == 0:
            return found[1:k]
    return []


def _split(found: Sequence[Token], word: str) -> list[Sequence[Token]]:
    """The operands of ``and`` or ``or``, whose needless parentheses have no meaning."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in found:
        depth += (token.type in _OPENING) - (token.type in _CLOSING)
        if depth == 0 and token.type == word:
            parts.append([])
        else:
            parts[-1].append(token)
    if len(parts) > 1:
        return [operand for part in parts for operand in _split(part, word)]
    inner = _inside(found) if found and found[0].type == "LPAR" else []
    if len(inner) == len(found) - 2 and inner:
        operands = _split(inner, word)
        if len(operands) > 1 and not (word == "AND" and _has_or(inner)):
            return operands
    return [found]


def _has_or(found: Sequence[Token]) -> bool:
    """Whether the loosest operator is ``or``."""
    depth = 0
    for token in found:
        depth += (token.type in _OPENING) - (token.type in _CLOSING)
        if depth == 0 and token.type == "OR":
            return True
    return False


def _place(part: Sequence[Token]) -> Place:
    return part[0].start_pos or 0, part[-1].end_pos or 0
