"""Builds the syntax tree of a rule from Lark's tree, and checks what a grammar cannot express well:
limits, scopes, wildcards, fields and patterns.

A rule is first built with the nodes that rules had before they could relate spans. If it needs
others, :exc:`NotOldRuleError` is raised, and it is built again as a relational rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lark import Token, Tree

from betrace.service.rules.comparisons import REFS, Comparisons
from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.literals import Literals, joined
from betrace.service.rules.refs import SCOPES, Place, Refs
from betrace.service.rules.syntax import (
    FIELDS,
    Attribute,
    Before,
    Condition,
    Counted,
    Exists,
    ForEach,
    Given,
    Node,
    Not,
    Part,
    Predicate,
    Relative,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
    all_of,
    any_of,
)
from betrace.service.rules.tree_tokens import as_tree, first_token, last_token
from betrace.service.rules.values import exact_number

MAX_CHECKS = 256

_RESERVED = (*SCOPES, "span", "resource")  # cannot be bound


class Builder:
    """Builds the nodes of one rule from Lark's tree, whose depth the limit of open brackets keeps
    small."""

    def __init__(self, text: str, *, related: bool) -> None:
        self._place = Place(text, related)
        self._checks: set[SpanSet] = set()
        self._literals = Literals(text)
        self._error = self._literals.error
        self._refs = Refs(self._place, self._literals)
        self._comparisons = Comparisons(
            self._place, self._literals, self._refs, self._spans, self._counted
        )

    def rule(self, tree: Tree[Token]) -> RuleSyntax:
        """The syntax tree of a rule."""
        first = as_tree(tree.children[0])
        if first.data not in ("when", "always", "never", "for_each"):
            never = self._condition(first)
            return RuleSyntax(None, None, never, bare=True, relational=self._place.related)
        clauses = {str(as_tree(clause).data): as_tree(clause) for clause in tree.children}
        level = 0
        for_each = None
        if "for_each" in clauses:
            self._place.need()
            for_each = self._for_each(clauses["for_each"])
        found: dict[str, Condition] = {}
        for name in ("when", *(key for key in clauses if key in ("always", "never"))):
            if name in clauses:
                self._place.clause = name
                level = 1 if for_each is not None and name != "when" else 0
                found[name] = self._condition(as_tree(clauses[name].children[0]), level)
        return RuleSyntax(
            found.get("when"),
            found.get("always"),
            found.get("never"),
            for_each=for_each,
            relational=self._place.related,
        )

    def _for_each(self, tree: Tree[Token]) -> ForEach:
        self._place.clause = "for_each"
        word = cast(Token, tree.children[-1])
        if "*" in word:
            raise self._error(
                f"found '{word}', but the word after 'as' cannot have wildcards", word
            )
        if word in _RESERVED:
            raise self._error(
                f"'{word}' cannot be bound, because '{word}:' has a meaning of its own",
                word,
                f"use another word: as {word}1",
            )
        parts = [each for each in tree.children if isinstance(each, Tree)]
        spans = self._spans(parts[0], 1)
        self._place.where = 1  # the spans' own attributes are known
        by = tuple(self._refs.ref(each) for each in parts[1:])
        self._place.where = 0
        self._place.word, self._place.by = str(word), by
        return ForEach(spans, by, str(word))

    def _condition(self, tree: Tree[Token], level: int = 0) -> Condition:
        return cast(Condition, self._node(tree, level))

    def _node(self, tree: Tree[Token], level: int = 0, parent: str = "") -> Node:
        """``level`` is the number of levels around the node, ``parent`` the grammar rule above."""
        children = tree.children
        if tree.data == "negate" or (tree.data == "any_of" and parent == "all_of"):
            level += 1
        self._place.level(level, tree)
        match str(tree.data):
            case "any_of":
                return any_of([self._node(as_tree(child), level, "any_of") for child in children])
            case "all_of":
                return all_of([self._node(as_tree(child), level, "all_of") for child in children])
            case "negate":
                return Not(self._node(as_tree(children[0]), level, "negate"))
            case "exists":
                return Exists(self._spans(as_tree(children[0]), level))
            case "before":
                first, second = (self._spans(as_tree(child), level) for child in children)
                return Before(first, second)
            case "direct":
                return self._direct(tree, level)
            case "truthy":
                attribute = self._refs.attribute(as_tree(children[0]))
                if not self._place.related:
                    return Truthy(attribute)
                return Given(self._refs.bare(attribute), truthy=True)
            case "compare":
                left, comparison = (as_tree(child) for child in children)
                return self._comparisons.compare(left, comparison, level)
            case "given":
                self._place.need()
                return Given(self._refs.ref(as_tree(children[1])))
            case "relation":
                return self._relation(tree, level)
            case other if other in REFS:
                return self._truthy_ref(tree)
            case _:
                raise self._no_comparison(tree)

    def _truthy_ref(self, tree: Tree[Token]) -> Node:
        if tree.data == "field" and not self._place.related:
            token = cast(Token, tree.children[-1])
            if token in FIELDS:
                return Truthy(Attribute(Scope.FIELD, str(token)))
        ref = self._refs.ref(tree)
        self._place.need()
        return Given(ref, truthy=True)

    def _no_comparison(self, tree: Tree[Token]) -> RuleSyntaxError:
        token = first_token(tree)
        end = last_token(tree)
        start = token.start_pos or 0
        start -= self._place.text[start - 1 : start] == "."  # the dot of an attribute is no child
        source = self._place.text[start : end.end_pos]
        source += ")" * (tree.data in ("aggregate", "counted"))
        shown = source if len(source) <= 40 else source[:39] + "…"
        return self._error(
            f"found the number {shown}, expected a condition", token, f"compare it: {shown} > 3"
        )

    def _spans(self, tree: Tree[Token], level: int) -> SpanSet:
        names = [child for child in tree.children if isinstance(child, Token)]
        filters = [child for child in tree.children if isinstance(child, Tree)]
        parent = "all_of" if len(filters) > 1 else ""
        bound = self._is_bound(names)
        part, self._place.part = self._place.part, ""
        self._place.where += 1
        parts = [self._node(as_tree(child.children[0]), level, parent) for child in filters]
        self._place.where -= 1
        self._place.part = part
        where = cast(Predicate, all_of(parts)) if parts else None
        return self._check(names[0], joined(names), where, bound)

    def _is_bound(self, names: Sequence[Token]) -> bool:
        """Whether a span name is the word after ``as``."""
        first = names[0]
        if len(names) != 1 or first.type != "SEGMENT" or first != self._place.word:
            return False
        if self._place.clause == "when":
            raise self._error(
                f"'{first}' stands for a span of 'for each', which 'when' does not know",
                first,
                f'for the spans with this name, write "{first}"',
            )
        return True

    def _check(self, at: Token, name: str, where: Predicate | None, bound: bool = False) -> SpanSet:
        spans = SpanSet(name, where, bound)
        self._checks.add(spans)
        if len(self._checks) > MAX_CHECKS:
            raise self._error(
                f"the rule has more than {MAX_CHECKS} distinct span checks",
                at,
                "split it into several rules",
            )
        return spans

    def _direct(self, tree: Tree[Token], level: int) -> Exists:
        names = [child for child in tree.children if isinstance(child, Token)]
        comparison = as_tree(tree.children[-1])
        if len(names) == 1:
            raise self._one_segment(names[0], comparison)
        attribute = Attribute(Scope.ANY, self._literals.plain(names[-1:], "an attribute"))
        bound = self._is_bound(names[:-1])
        self._place.where += 1
        predicate = self._comparisons.compare_attribute(attribute, comparison, level)
        self._place.where -= 1
        return Exists(self._check(names[0], joined(names[:-1]), predicate, bound))

    def _one_segment(self, name: Token, comparison: Tree[Token]) -> RuleSyntaxError:
        op = comparison.children[0]
        last = last_token(comparison)
        source = self._place.text[name.end_pos : last.end_pos].strip()
        if op == "in":
            hint = f"to compare an attribute: {name}.where(attribute in [ … ])"
        elif exact_number(str(last)) is None:
            hint = f"to compare an attribute: {name}.where(attribute {source})"
        else:
            hint = f"to compare the number of spans: count({name}) {source}"
        return self._error(f"found a comparison of the span name {name} itself", name, hint)

    def _relation(self, tree: Tree[Token], level: int) -> Relative | Part:
        self._place.need()
        kind = cast(Token, tree.children[0])
        self._place.level(level + 1, tree)
        rest = [child for child in tree.children[1:] if child is not None]
        if kind.type == "PART":
            outer, self._place.part = self._place.part, str(kind)
            where = self._node(as_tree(rest[0]), level + 1) if rest else None
            self._place.part = outer
            return Part(str(kind), cast("Predicate | None", where))
        spans = self._spans(as_tree(rest[0]), level + 1)
        within = None
        if len(rest) > 1:
            token = cast(Token, rest[-1])
            within = self._literals.constant(token)
            if isinstance(within.value, str) or within.value <= 0:
                raise self._error(
                    f"found {token}, but no span is found within 0 or less",
                    token,
                    f"give a positive duration: {kind}({spans.name} within 5s)",
                )
        return Relative(str(kind), spans, within)

    def _counted(self, tree: Tree[Token], level: int) -> Counted:
        relation = as_tree(tree.children[1])
        kind = cast(Token, relation.children[0])
        if kind.type != "PART" and kind not in ("child", "descendant", "sibling"):
            raise self._error(
                f"{kind}(…) cannot be counted",
                kind,
                "count(…) in where takes child, descendant, sibling, event or link",
            )
        return Counted(self._relation(relation, level))
