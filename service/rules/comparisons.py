"""Builds comparisons and the expressions that they compare from Lark's tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from lark import Token, Tree

from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.literals import Literals, joined, unquoted
from betrace.service.rules.refs import NotOldRuleError, Place, Refs
from betrace.service.rules.syntax import (
    FIELDS,
    Aggregate,
    Arithmetic,
    Attribute,
    Compare,
    Comparison,
    Constant,
    CountCompare,
    Counted,
    Expression,
    Node,
    Number,
    Predicate,
    Ref,
    Scope,
    SpanSet,
)
from betrace.service.rules.tree_tokens import as_tree, first_token, last_token

REFS = ("own", "quoted_own", "scoped", "quoted_scoped", "field")
_ATTRIBUTES = ("attribute", "quoted_attribute")


class Comparisons:
    """Builds the comparisons of one rule. ``spans`` and ``counted`` build span sets and counts of
    relatives; like all functions here they are given the number of levels around the node."""

    def __init__(
        self,
        place: Place,
        literals: Literals,
        refs: Refs,
        spans: Callable[[Tree[Token], int], SpanSet],
        counted: Callable[[Tree[Token], int], Counted],
    ) -> None:
        self._place = place
        self._literals = literals
        self._refs = refs
        self._spans = spans
        self._counted = counted
        self._error = literals.error

    def compare(self, left: Tree[Token], comparison: Tree[Token], level: int) -> Node:
        if left.data in _ATTRIBUTES:
            return self.compare_attribute(self._refs.attribute(left), comparison, level)
        if left.data == "field" and not self._place.related and left.children[-1] in FIELDS:
            attribute = Attribute(Scope.FIELD, str(left.children[-1]))
            return self.compare_attribute(attribute, comparison, level)
        op, *right = comparison.children
        if op not in ("in", "matches", "contains") and not self._place.related:
            found = self._count_compare(left, str(op), right[0], level)
            if found is not None:
                return found
        return self._comparison(left, self.expression(left, level), comparison, level)

    def _count_compare(
        self, left: Tree[Token], op: str, right: Tree[Token] | Token, level: int
    ) -> CountCompare | None:
        """A comparison of counts and numbers as old rules had it; None if it is another one."""
        if isinstance(right, Token) or right.data == "text" or self._place.where:
            return None
        sides: list[SpanSet | Number] = []
        for side in (left, right):
            token = cast(Token, side.children[0])
            if side.data == "number" and token.type == "NUMBER":
                sides.append(self._literals.number(token))
            elif side.data == "aggregate" and token.type == "COUNT":
                sides.append(self._spans(as_tree(side.children[1]), level))
            else:
                return None
        if not any(isinstance(side, SpanSet) for side in sides):
            return None
        return CountCompare(sides[0], op, sides[1])

    def compare_attribute(
        self, attribute: Attribute, comparison: Tree[Token], level: int
    ) -> Predicate:
        op, *right = comparison.children
        if self._place.related:
            left = self._refs.bare(attribute)
            return cast(Predicate, self._comparison(None, left, comparison, level))
        if op == "matches":
            token = cast(Token, right[0])
            literal = self._literals.literal([token])
            self._literals.pattern(token, literal.text)
            return Compare(attribute, "matches", (literal,))
        values = [as_tree(value) for value in right]
        if any(value.data not in ("text", "value", "number") for value in values):
            raise NotOldRuleError
        return Compare(
            attribute, str(op), tuple(self._literals.literal(v.children) for v in values)
        )

    def _comparison(
        self, tree: Tree[Token] | None, left: Expression, comparison: Tree[Token], level: int
    ) -> Comparison:
        op, *right = comparison.children
        operator = str(op)
        is_ref = isinstance(left, Ref)
        if operator in ("in", "matches", "contains") and not is_ref:
            raise self._error(
                f"found '{operator}' after a number, expected == != < <= > or >=",
                cast(Token, op),
                f"'{operator}' compares attributes and fields",
            )
        if operator == "matches":
            token = cast(Token, right[0])
            pattern = unquoted(token)
            self._literals.pattern(token, pattern)
            self._place.need()
            return Comparison(left, operator, (Constant(pattern, pattern),))
        operands: list[Expression] = []
        for each in right:
            operand = as_tree(each)
            if operand.data in ("text", "value"):
                words = [token for token in operand.children if isinstance(token, Token)]
                if words[0].type in ("SEGMENT", "TRUE", "FALSE") and not is_ref:
                    raise self._word_for_number(words, tree)
                operands.append(self._literals.value(words))
            else:
                operands.append(self.expression(operand, level))
        if tree is not None and not _refers(left) and not any(map(_refers, operands)):
            raise self._two_numbers(tree, operator, comparison)
        first = as_tree(right[0]).children[0]
        counts = isinstance(left, Counted) or (isinstance(left, Aggregate) and left.kind == "count")
        if counts and isinstance(first, Token) and first.type == "DURATION":
            raise self._error(
                f"found '{first}', expected a number",
                first,
                "compare counts with numbers without a unit",
            )
        if operator == "contains" and not isinstance(operands[0], Constant | Ref):
            raise self._error(
                "found a calculation, expected a value or an attribute",
                first_token(as_tree(right[0])),
            )
        self._place.need()
        return Comparison(left, operator, tuple(operands))

    def _word_for_number(self, words: list[Token], left: Tree[Token] | None) -> RuleSyntaxError:
        word = joined(words)
        if self._place.where:
            return self._error(
                f"found '{word}', which is text here, expected a number",
                words[0],
                f"for the attribute, write .{word}",
            )
        return self._error(
            f"found '{word}', expected count(…) or a number",
            words[0],
            f"to count the spans with this name: count({word})",
        )

    def _two_numbers(self, left: Tree[Token], op: str, comparison: Tree[Token]) -> RuleSyntaxError:
        token = first_token(left)
        last = last_token(comparison)
        shown = self._place.text[cast(Token, comparison.children[0]).end_pos : last.end_pos].strip()
        if self._place.where:
            return self._error(
                "found two numbers, expected an attribute on at least one side",
                token,
                f"to compare an attribute: .amount {op} {shown}",
            )
        return self._error(
            "found two numbers, expected a count on at least one side",
            token,
            f"to count the spans with a name: count(payment) {op} {shown}",
        )

    def expression(self, tree: Tree[Token], level: int, depth: int = 0) -> Expression:
        """A number or a ref."""
        self._place.level(level, tree)
        match str(tree.data):
            case "number":
                return self._literals.constant(cast(Token, tree.children[0]))
            case "arithmetic":
                first, *rest = tree.children
                pairs = []
                inner = level + 1 if depth else level
                for op, operand in zip(rest[::2], rest[1::2], strict=True):
                    pairs.append((str(op), self.expression(as_tree(operand), inner, 1)))
                return Arithmetic(self.expression(as_tree(first), inner, 1), tuple(pairs))
            case "aggregate":
                return self._aggregate(tree, level)
            case "counted":
                self._place.need()
                return self._counted(tree, level)
            case other if other in REFS:
                return self._refs.ref(tree)
            case other if other in ("truthy", "exists"):
                return self._bare_name(tree)
            case _:
                raise self._error(
                    "found a condition, expected a number or an attribute", first_token(tree)
                )

    def _bare_name(self, tree: Tree[Token]) -> Expression:
        """The error for a name without a dot where a number is expected."""
        token = first_token(tree)
        hint = f"for the attribute, write .{token}" if self._place.where else f"count({token})"
        raise self._error(f"found '{token}', expected a number or an attribute", token, hint)

    def _aggregate(self, tree: Tree[Token], level: int) -> Aggregate:
        kind = cast(Token, tree.children[0])
        if kind.type != "COUNT":
            self._place.need()
        elif not self._place.related:
            raise NotOldRuleError
        spans = self._spans(as_tree(tree.children[1]), level)
        if kind.type == "COUNT":
            return Aggregate("count", spans)
        self._place.where += 1
        part, self._place.part = self._place.part, ""
        ref = self._refs.ref(as_tree(tree.children[2]))
        self._place.part = part
        self._place.where -= 1
        return Aggregate(str(kind), spans, ref)


def _refers(expression: Expression) -> bool:
    """Whether an expression depends on the trace."""
    if isinstance(expression, Arithmetic):
        return _refers(expression.first) or any(_refers(right) for _, right in expression.rest)
    return not isinstance(expression, Constant)
