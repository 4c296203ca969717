"""Builds the syntax tree of a rule from Lark's tree, and checks what a grammar cannot express well:
limits, scopes, wildcards, fields and patterns.

A rule is first built with the nodes that rules had before they could relate spans. If it needs
others, :exc:`NotOldRuleError` is raised, and it is built again as a relational rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lark import Token, Tree

from betrace.service.config.suggest import close_match
from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.literals import Literals, joined, unquoted
from betrace.service.rules.syntax import (
    EVENT_FIELDS,
    FIELDS,
    LINK_FIELDS,
    SPAN_FIELDS,
    TRACE_FIELDS,
    Aggregate,
    And,
    Arithmetic,
    Attribute,
    Before,
    Compare,
    Comparison,
    Condition,
    Constant,
    CountCompare,
    Counted,
    Exists,
    Expression,
    ForEach,
    Given,
    Node,
    Not,
    Number,
    Or,
    Part,
    Predicate,
    Ref,
    Relative,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
)
from betrace.service.rules.values import (
    read_number,
)

MAX_DEPTH = 32
MAX_CHECKS = 256

SCOPES = ("parent", "root", "trace", "event", "link")
_RESERVED = (*SCOPES, "span", "resource")  # cannot be bound

_REFS = ("own", "quoted_own", "scoped", "quoted_scoped", "field")
_ATTRIBUTES = ("attribute", "quoted_attribute")
_NUMBERS = ("number", "arithmetic", "aggregate", "counted")
_FIELDS_OF = {"trace": TRACE_FIELDS, "event": EVENT_FIELDS, "link": LINK_FIELDS}


class NotOldRuleError(Exception):
    """The rule relates spans to each other."""


class Builder:
    """Builds the nodes of one rule from Lark's tree, whose depth the limit of open brackets keeps
    small."""

    def __init__(self, text: str, *, related: bool) -> None:
        self._text = text
        self._related = related
        self._checks: set[SpanSet] = set()
        self._literals = Literals(text)
        self._error = self._literals.error
        self._word: str | None = None  # after "as"
        self._by: tuple[Ref, ...] = ()
        self._clause = ""  # being built: when, for_each, always or never
        self._where = 0  # depth inside where
        self._part = ""  # event or link, inside event(…) or link(…)

    def rule(self, tree: Tree[Token]) -> RuleSyntax:
        """The syntax tree of a rule."""
        first = _tree(tree.children[0])
        if first.data not in ("when", "always", "never", "for_each"):
            never = self._condition(first)
            return RuleSyntax(None, None, never, bare=True, relational=self._related)
        clauses = {str(_tree(clause).data): _tree(clause) for clause in tree.children}
        level = 0
        for_each = None
        if "for_each" in clauses:
            self._need()
            for_each = self._for_each(clauses["for_each"])
        found: dict[str, Condition] = {}
        for name in ("when", *(key for key in clauses if key in ("always", "never"))):
            if name in clauses:
                self._clause = name
                level = 1 if for_each is not None and name != "when" else 0
                found[name] = self._condition(_tree(clauses[name].children[0]), level)
        return RuleSyntax(
            found.get("when"),
            found.get("always"),
            found.get("never"),
            for_each=for_each,
            relational=self._related,
        )

    def _for_each(self, tree: Tree[Token]) -> ForEach:
        self._clause = "for_each"
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
        self._where = 1  # the spans' own attributes are known
        by = tuple(self._ref(each) for each in parts[1:])
        self._where = 0
        self._word, self._by = str(word), by
        return ForEach(spans, by, str(word))

    def _need(self) -> None:
        if not self._related:
            raise NotOldRuleError

    def _condition(self, tree: Tree[Token], level: int = 0) -> Condition:
        return cast(Condition, self._node(tree, level))

    def _level(self, level: int, at: Tree[Token]) -> int:
        if level > MAX_DEPTH:
            raise self._error(
                f"the rule nests deeper than {MAX_DEPTH} levels",
                _first_token(at),
                "simplify it, or split it into several rules",
            )
        return level

    def _node(self, tree: Tree[Token], level: int = 0, parent: str = "") -> Node:
        """``level`` is the number of levels around the node, ``parent`` the grammar rule above."""
        children = tree.children
        if tree.data == "negate" or (tree.data == "any_of" and parent == "all_of"):
            level += 1
        self._level(level, tree)
        match str(tree.data):
            case "any_of":
                return any_of([self._node(_tree(child), level, "any_of") for child in children])
            case "all_of":
                return all_of([self._node(_tree(child), level, "all_of") for child in children])
            case "negate":
                return Not(self._node(_tree(children[0]), level, "negate"))
            case "exists":
                return Exists(self._spans(_tree(children[0]), level))
            case "before":
                first, second = (self._spans(_tree(child), level) for child in children)
                return Before(first, second)
            case "direct":
                return self._direct(tree, level)
            case "truthy":
                attribute = self._attribute(_tree(children[0]))
                if not self._related:
                    return Truthy(attribute)
                return Given(self._bare(attribute), truthy=True)
            case "compare":
                left, comparison = (_tree(child) for child in children)
                return self._compare(left, comparison, level)
            case "given":
                self._need()
                return Given(self._ref(_tree(children[1])))
            case "relation":
                return self._relation(tree, level)
            case other if other in _REFS:
                return self._truthy_ref(tree)
            case _:
                raise self._no_comparison(tree)

    def _truthy_ref(self, tree: Tree[Token]) -> Node:
        if tree.data == "field" and not self._related:
            token = cast(Token, tree.children[-1])
            if token in FIELDS:
                return Truthy(Attribute(Scope.FIELD, str(token)))
        ref = self._ref(tree)
        self._need()
        return Given(ref, truthy=True)

    def _no_comparison(self, tree: Tree[Token]) -> RuleSyntaxError:
        token = _first_token(tree)
        end = _last_token(tree)
        start = token.start_pos or 0
        start -= self._text[start - 1 : start] == "."  # the dot of an attribute is no child
        source = self._text[start : end.end_pos]
        source += ")" * (tree.data in ("aggregate", "counted"))
        shown = source if len(source) <= 40 else source[:39] + "…"
        return self._error(
            f"found the number {shown}, expected a condition", token, f"compare it: {shown} > 3"
        )

    # Spans

    def _spans(self, tree: Tree[Token], level: int) -> SpanSet:
        names = [child for child in tree.children if isinstance(child, Token)]
        filters = [child for child in tree.children if isinstance(child, Tree)]
        parent = "all_of" if len(filters) > 1 else ""
        bound = self._is_bound(names)
        part, self._part = self._part, ""
        self._where += 1
        parts = [self._node(_tree(child.children[0]), level, parent) for child in filters]
        self._where -= 1
        self._part = part
        where = cast(Predicate, all_of(parts)) if parts else None
        return self._check(names[0], joined(names), where, bound)

    def _is_bound(self, names: Sequence[Token]) -> bool:
        """Whether a span name is the word after ``as``."""
        first = names[0]
        if len(names) != 1 or first.type != "SEGMENT" or first != self._word:
            return False
        if self._clause == "when":
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
        comparison = _tree(tree.children[-1])
        if len(names) == 1:
            raise self._one_segment(names[0], comparison)
        attribute = Attribute(Scope.ANY, self._literals.plain(names[-1:], "an attribute"))
        bound = self._is_bound(names[:-1])
        self._where += 1
        predicate = self._compare_attribute(attribute, comparison, level)
        self._where -= 1
        return Exists(self._check(names[0], joined(names[:-1]), predicate, bound))

    def _one_segment(self, name: Token, comparison: Tree[Token]) -> RuleSyntaxError:
        op = comparison.children[0]
        last = _last_token(comparison)
        source = self._text[name.end_pos : last.end_pos].strip()
        if op == "in":
            hint = f"to compare an attribute: {name}.where(attribute in [ … ])"
        elif read_number(str(last)) is None:
            hint = f"to compare an attribute: {name}.where(attribute {source})"
        else:
            hint = f"to compare the number of spans: count({name}) {source}"
        return self._error(f"found a comparison of the span name {name} itself", name, hint)

    # Relations

    def _relation(self, tree: Tree[Token], level: int) -> Relative | Part:
        self._need()
        kind = cast(Token, tree.children[0])
        self._level(level + 1, tree)
        rest = [child for child in tree.children[1:] if child is not None]
        if kind.type == "PART":
            outer, self._part = self._part, str(kind)
            where = self._node(_tree(rest[0]), level + 1) if rest else None
            self._part = outer
            return Part(str(kind), cast("Predicate | None", where))
        spans = self._spans(_tree(rest[0]), level + 1)
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
        relation = _tree(tree.children[1])
        kind = cast(Token, relation.children[0])
        if kind.type != "PART" and kind not in ("child", "descendant", "sibling"):
            raise self._error(
                f"{kind}(…) cannot be counted",
                kind,
                "count(…) in where takes child, descendant, sibling, event or link",
            )
        return Counted(self._relation(relation, level))

    # Comparisons and expressions

    def _compare(self, left: Tree[Token], comparison: Tree[Token], level: int) -> Node:
        if left.data in _ATTRIBUTES:
            return self._compare_attribute(self._attribute(left), comparison, level)
        if left.data == "field" and not self._related and left.children[-1] in FIELDS:
            attribute = Attribute(Scope.FIELD, str(left.children[-1]))
            return self._compare_attribute(attribute, comparison, level)
        op, *right = comparison.children
        if op not in ("in", "matches", "contains") and not self._related:
            found = self._count_compare(left, str(op), right[0], level)
            if found is not None:
                return found
        return self._comparison(left, self._expression(left, level), comparison, level)

    def _count_compare(
        self, left: Tree[Token], op: str, right: Tree[Token] | Token, level: int
    ) -> CountCompare | None:
        """A comparison of counts and numbers as old rules had it; None if it is another one."""
        if isinstance(right, Token) or right.data == "text" or self._where:
            return None
        sides: list[SpanSet | Number] = []
        for side in (left, right):
            token = cast(Token, side.children[0])
            if side.data == "number" and token.type == "NUMBER":
                sides.append(self._literals.number(token))
            elif side.data == "aggregate" and token.type == "COUNT":
                sides.append(self._spans(_tree(side.children[1]), level))
            else:
                return None
        if not any(isinstance(side, SpanSet) for side in sides):
            return None
        return CountCompare(sides[0], op, sides[1])

    def _compare_attribute(
        self, attribute: Attribute, comparison: Tree[Token], level: int
    ) -> Predicate:
        op, *right = comparison.children
        if self._related:
            left = self._bare(attribute)
            return cast(Predicate, self._comparison(None, left, comparison, level))
        if op == "matches":
            token = cast(Token, right[0])
            literal = self._literals.literal([token])
            self._literals.pattern(token, literal.text)
            return Compare(attribute, "matches", (literal,))
        values = [_tree(value) for value in right]
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
            self._need()
            return Comparison(left, operator, (Constant(pattern, pattern),))
        operands: list[Expression] = []
        for each in right:
            operand = _tree(each)
            if operand.data in ("text", "value"):
                words = [token for token in operand.children if isinstance(token, Token)]
                if words[0].type in ("SEGMENT", "TRUE", "FALSE") and not is_ref:
                    raise self._word_for_number(words, tree)
                operands.append(self._literals.value(words))
            else:
                operands.append(self._expression(operand, level))
        if tree is not None and not _refers(left) and not any(map(_refers, operands)):
            raise self._two_numbers(tree, operator, comparison)
        first = _tree(right[0]).children[0]
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
                _first_token(_tree(right[0])),
            )
        self._need()
        return Comparison(left, operator, tuple(operands))

    def _word_for_number(self, words: list[Token], left: Tree[Token] | None) -> RuleSyntaxError:
        word = joined(words)
        if self._where:
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
        token = _first_token(left)
        last = _last_token(comparison)
        shown = self._text[cast(Token, comparison.children[0]).end_pos : last.end_pos].strip()
        if self._where:
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

    def _expression(self, tree: Tree[Token], level: int, depth: int = 0) -> Expression:
        """A number or a ref."""
        self._level(level, tree)
        match str(tree.data):
            case "number":
                return self._literals.constant(cast(Token, tree.children[0]))
            case "arithmetic":
                first, *rest = tree.children
                pairs = []
                inner = level + 1 if depth else level
                for op, operand in zip(rest[::2], rest[1::2], strict=True):
                    pairs.append((str(op), self._expression(_tree(operand), inner, 1)))
                return Arithmetic(self._expression(_tree(first), inner, 1), tuple(pairs))
            case "aggregate":
                return self._aggregate(tree, level)
            case "counted":
                self._need()
                return self._counted(tree, level)
            case other if other in _REFS:
                return self._ref(tree)
            case other if other in ("truthy", "exists"):
                return self._bare_name(tree)
            case _:
                raise self._error(
                    "found a condition, expected a number or an attribute", _first_token(tree)
                )

    def _bare_name(self, tree: Tree[Token]) -> Expression:
        """The error for a name without a dot where a number is expected."""
        token = _first_token(tree)
        hint = f"for the attribute, write .{token}" if self._where else f"count({token})"
        raise self._error(f"found '{token}', expected a number or an attribute", token, hint)

    def _aggregate(self, tree: Tree[Token], level: int) -> Aggregate:
        kind = cast(Token, tree.children[0])
        if kind.type != "COUNT":
            self._need()
        elif not self._related:
            raise NotOldRuleError
        spans = self._spans(_tree(tree.children[1]), level)
        if kind.type == "COUNT":
            return Aggregate("count", spans)
        self._where += 1
        part, self._part = self._part, ""
        ref = self._ref(_tree(tree.children[2]))
        self._part = part
        self._where -= 1
        return Aggregate(str(kind), spans, ref)

    # Attributes and refs

    def _bare(self, attribute: Attribute) -> Ref:
        """A name without a scope: of the event or link inside one, else of the span."""
        if not self._part or attribute.scope is Scope.FIELD:
            return Ref("", attribute)
        if attribute.scope is Scope.RESOURCE:
            return Ref(self._part, Attribute(Scope.ANY, f"resource.{attribute.name}"))
        return Ref(self._part, attribute)

    def _ref(self, tree: Tree[Token]) -> Ref:
        tokens = [child for child in tree.children if isinstance(child, Token)]
        first = tokens[0]
        match str(tree.data):
            case "attribute" | "quoted_attribute":
                self._own(first)
                return self._bare(self._attribute(tree))
            case "own" | "quoted_own":
                self._own(first)
                return Ref("", self._thing(tokens))
            case "field":
                self._own(first)
                return Ref("", Attribute(Scope.FIELD, self._field(tokens[-1])))
        scope = str(first)[:-1]
        self._check_scope(first, scope)
        attribute = self._scoped(first, scope, tokens[1:])
        if self._by and scope == self._word and Ref("", attribute) not in self._by:
            known = ", ".join(_own_text(ref) for ref in self._by if ref.scope == "") or "no value"
            raise self._error(
                f"{scope}: has only what stands after 'by': {known}",
                first,
                "add it after 'by', or leave 'by' out to judge each span by itself",
            )
        return Ref(scope, attribute)

    def _own(self, at: Token) -> None:
        if not self._where:
            raise self._error(
                "found an attribute, but a condition is of the trace and has no span of its own",
                at,
                "name the spans: payment.where(amount > 3), or use root: or trace:",
            )

    def _check_scope(self, at: Token, scope: str) -> None:
        if scope == self._word and self._clause != "when":
            return
        known = [s for s in SCOPES if s not in ("event", "link") or s == self._part]
        if scope == self._word:
            raise self._error(
                f"'{scope}:' is a span of 'for each', which 'when' does not know",
                at,
                "move this condition to always or never",
            )
        if scope in ("event", "link") and scope != self._part:
            raise self._error(
                f"'{scope}:' is known only inside {scope}(…)", at, f"write {scope}({scope}:… == …)"
            )
        if scope == "parent" and not self._where:
            raise self._error(
                "a condition is of the trace, which has no parent",
                at,
                "use it in where: payment.where(parent:tenant == acme)",
            )
        if scope in SCOPES:
            return
        words = [*known, *([self._word] if self._word else []), "span"]
        meant = close_match(scope, words)
        if scope == "resource":
            hint = "write resource.x for a resource attribute and span:x for a field of the span"
        elif meant:
            hint = f"did you mean '{meant}:'?"
        elif self._clause == "for_each":
            hint = "the word after 'as' is known only in always and never"
        else:
            hint = "bind it: for each payment as " + scope
        raise self._error(
            f"found '{scope}:', expected one of " + ", ".join(f"{word}:" for word in words),
            at,
            hint,
        )

    def _scoped(self, first: Token, scope: str, tokens: Sequence[Token]) -> Attribute:
        quoted = tokens[0].type == "STRING"
        fields = _FIELDS_OF.get(scope, SPAN_FIELDS)
        if not quoted and len(tokens) == 1 and tokens[0] in fields:
            return Attribute(Scope.FIELD, str(tokens[0]))
        if scope == "trace":
            meant = close_match(str(tokens[0]), fields)
            raise self._error(
                f"found trace:{joined(tokens)}, expected one of "
                + ", ".join(f"trace:{each}" for each in fields),
                tokens[0],
                f"did you mean 'trace:{meant}'?"
                if meant
                else "a trace has no attributes; use root: for those of its root span",
            )
        if scope in ("event", "link"):
            return Attribute(Scope.ANY, self._literals.plain(tokens, "an attribute"))
        return self._thing(tokens)

    def _thing(self, tokens: Sequence[Token]) -> Attribute:
        """A name after a dot or colon."""
        if tokens[0].type == "STRING":
            return Attribute(Scope.ANY, unquoted(tokens[0]))
        name = self._literals.plain(tokens, "an attribute")
        if len(tokens) > 1 and tokens[0] == "resource":
            return Attribute(Scope.RESOURCE, name.removeprefix("resource."))
        return Attribute(Scope.ANY, name)

    def _attribute(self, tree: Tree[Token]) -> Attribute:
        tokens = [child for child in tree.children if isinstance(child, Token)]
        return self._thing(tokens)

    def _field(self, token: Token) -> str:
        if token in SPAN_FIELDS:
            if token not in FIELDS:
                self._need()
            return str(token)
        meant = close_match(token, SPAN_FIELDS)
        raise self._error(
            f"found span:{token}, expected one of " + ", ".join(f"span:{f}" for f in SPAN_FIELDS),
            token,
            f"did you mean 'span:{meant}'?" if meant else "write attributes without 'span:'",
        )


def all_of(items: Sequence[Node]) -> Node:
    """The conjunction of one or more nodes; nested conjunctions are merged into it."""
    flat = [part for item in items for part in (item.items if isinstance(item, And) else (item,))]
    return flat[0] if len(flat) == 1 else And(tuple(flat))


def any_of(items: Sequence[Node]) -> Node:
    """The disjunction of one or more nodes; nested disjunctions are merged into it."""
    flat = [part for item in items for part in (item.items if isinstance(item, Or) else (item,))]
    return flat[0] if len(flat) == 1 else Or(tuple(flat))


def _refers(expression: Expression) -> bool:
    """Whether an expression depends on the trace."""
    if isinstance(expression, Arithmetic):
        return _refers(expression.first) or any(_refers(right) for _, right in expression.rest)
    return not isinstance(expression, Constant)


def _own_text(ref: Ref) -> str:
    prefix = {Scope.FIELD: "span:", Scope.RESOURCE: "resource."}.get(ref.attribute.scope, "")
    return prefix + ref.attribute.name


def _tree(child: Token | Tree[Token]) -> Tree[Token]:
    assert isinstance(child, Tree)
    return child


def _first_token(tree: Tree[Token]) -> Token:
    node: Token | Tree[Token] = tree
    while isinstance(node, Tree):  # a loop, because a rejected tree may be deep
        node = node.children[0]
    return node


def _last_token(tree: Tree[Token]) -> Token:
    node: Token | Tree[Token] = tree
    while isinstance(node, Tree):
        node = node.children[-1]
    return node
