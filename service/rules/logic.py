"""Comparison operators, and conditions joined with constants.

A condition that is rewritten may turn out to be always or never true. It is then a bool instead of
a node, and joining it with others simplifies them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from betrace.service.rules.syntax import Node, Not, all_of, any_of

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
"""The operator that says the same with its sides exchanged."""
OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
"""The operator that holds when this one does not, if both sides have a value and an order."""


def negation(condition: Node | bool) -> Node | bool:
    """``not condition``."""
    return not condition if isinstance(condition, bool) else Not(condition)


def conjunction(conditions: Iterable[Node | bool]) -> Node | bool:
    """Whether all conditions hold; True for none."""
    parts: list[Node] = []
    for condition in conditions:
        if condition is False:
            return False
        if condition is not True:
            parts.append(condition)
    return all_of(parts) if parts else True


def disjunction(conditions: Iterable[Node | bool]) -> Node | bool:
    """Whether any condition holds; False for none."""
    parts: list[Node] = []
    for condition in conditions:
        if condition is True:
            return True
        if condition is not False:
            parts.append(condition)
    return any_of(parts) if parts else False
