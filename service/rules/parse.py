"""Parses rules: text to :class:`betrace.service.rules.syntax.RuleSyntax`.

The grammar is in ``grammar.lark``; Lark's LALR(1) parser takes time linear in the text and does not
recurse. What a grammar cannot express well (limits, wildcards, fields, patterns) is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import re2
from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedToken

from betrace.service.config.suggest import close_match
from betrace.service.rules.errors import RuleSyntaxError, unexpected_character, unexpected_token
from betrace.service.rules.syntax import (
    FIELDS,
    And,
    Attribute,
    Before,
    Compare,
    Condition,
    CountCompare,
    Exists,
    Literal,
    Node,
    Not,
    Number,
    Or,
    Predicate,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
)
from betrace.service.rules.values import MAX_NUMBER_CHARS, compile_pattern, number_text, read_number

MAX_TEXT_BYTES = 16 * 1024  # of UTF-8
MAX_DEPTH = 32
MAX_BRACKETS = 128  # open at the same time, including needless parentheses
MAX_CHECKS = 256
MAX_PATTERN = 20_000  # RE2 instructions of one pattern
MAX_PROGRAM = 100_000  # RE2 instructions of all patterns; they compile in about 40 ms

_PARSER = Lark(
    (Path(__file__).parent / "grammar.lark").read_text(encoding="utf-8"),
    parser="lalr",
    lexer="basic",  # without context: keywords are reserved everywhere
    maybe_placeholders=False,
)
_ESCAPE = re.compile(r'\\(["\\])')
_UNITS = {
    "ns": 1,
    "us": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_BRACKETS = {"RPAR": "LPAR", "RBRACE": "LBRACE", "RSQB": "LSQB"}
_DURATION = re.compile(r"(?P<number>[^a-zE]*(?:[eE][+-]?[0-9]+)?)(?P<unit>[a-z]+)")


def parse(text: str) -> RuleSyntax:
    """The syntax tree of a rule's condition.

    Raises :exc:`RuleSyntaxError`, and nothing else, for text that is not a rule, and for a rule of
    more than 16 KiB, 256 distinct span checks, or 32 levels. A ``not`` is a level, and so are
    parentheses that change the meaning: ``((a))`` and ``(a and b) and c`` have no level,
    ``not (a or b)`` has one.
    """
    _check_size(text)
    # Any, because Lark has no annotations for these methods.
    parser: Any = _PARSER.parse_interactive(text)
    seen = _Seen(text)
    try:
        for token in parser.iter_parse():
            seen.add(token)
        tree = parser.feed_eof(seen.tokens[-1] if seen.tokens else None)
    except UnexpectedCharacters as error:
        raise unexpected_character(text, error.pos_in_stream or 0) from None
    except UnexpectedToken as error:
        before = seen.tokens if error.token.type == "$END" else seen.tokens[:-1]
        accepts = set(parser.accepts())
        raise unexpected_token(text, error.token, before, seen.opened(before), accepts) from None
    return _Builder(text).rule(tree)


def _check_size(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RuleSyntaxError(
            "found half of a UTF-16 surrogate pair, which is not a character", text, error.start
        ) from None
    if size > MAX_TEXT_BYTES:
        raise RuleSyntaxError(
            f"the rule has {size} bytes; at most {MAX_TEXT_BYTES} are allowed",
            text,
            len(text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")),
            "split it into several rules",
        )


class _Seen:
    """The tokens so far, and the number of open brackets after them.

    Brackets are counted while tokens arrive, so that no tree is built that is too deep to walk.
    """

    def __init__(self, text: str) -> None:
        self.tokens: list[Token] = []
        self._text = text
        self._open = 0

    def add(self, token: Token) -> None:
        self.tokens.append(token)
        if token.type in _BRACKETS.values():
            self._open += 1
        elif token.type in _BRACKETS:
            self._open -= 1
        if self._open > MAX_BRACKETS:
            raise RuleSyntaxError(
                f"more than {MAX_BRACKETS} brackets are open here",
                self._text,
                token.start_pos or 0,
                f"remove needless parentheses; rules nest at most {MAX_DEPTH} levels",
            )

    @staticmethod
    def opened(tokens: Sequence[Token]) -> list[Token]:
        """The brackets that are open after ``tokens``."""
        opened: list[Token] = []
        for token in tokens:
            if token.type in _BRACKETS.values():
                opened.append(token)
            elif opened and opened[-1].type == _BRACKETS.get(token.type):
                opened.pop()
        return opened


class _Builder:
    """Builds the nodes of one rule from Lark's tree, whose depth MAX_DEPTH limits."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._checks: set[SpanSet] = set()
        self._program = 0

    def rule(self, tree: Tree[Token]) -> RuleSyntax:
        first = _tree(tree.children[0])
        if first.data not in ("when", "always", "never"):
            return RuleSyntax(None, None, self._condition(first), bare=True)
        clauses = {
            _tree(clause).data: self._condition(_tree(_tree(clause).children[0]))
            for clause in tree.children
        }
        return RuleSyntax(clauses.get("when"), clauses.get("always"), clauses.get("never"))

    def _condition(self, tree: Tree[Token]) -> Condition:
        return cast(Condition, self._node(tree))

    def _error(self, message: str, token: Token, hint: str | None = None) -> RuleSyntaxError:
        return RuleSyntaxError(message, self._text, token.start_pos or 0, hint)

    def _node(self, tree: Tree[Token], level: int = 0, parent: str = "") -> Node:
        """``level`` is the number of levels around the node, ``parent`` the grammar rule above."""
        children = tree.children
        if tree.data == "negate" or (tree.data == "any_of" and parent == "all_of"):
            level += 1
        if level > MAX_DEPTH:
            raise self._error(
                f"the rule nests deeper than {MAX_DEPTH} levels",
                _first_token(tree),
                "simplify it, or split it into several rules",
            )
        match tree.data:
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
            case "count_compare":
                return self._count_compare(tree, level)
            case "direct":
                return self._direct(tree)
            case "truthy":
                return Truthy(self._attribute(_tree(children[0])))
            case "compare":
                return self._compare(self._attribute(_tree(children[0])), _tree(children[1]))
            case other:
                raise AssertionError(other)

    def _count_compare(self, tree: Tree[Token], level: int) -> CountCompare:
        left, op, right = tree.children
        sides = [
            self._number(side) if isinstance(side, Token) else self._spans(side, level)
            for side in (left, right)
        ]
        if isinstance(left, Token) and not isinstance(sides[1], SpanSet):
            raise self._error(
                "found two numbers, expected a count on at least one side",
                left,
                f"to count the spans with a name: count(payment) {op} {right}",
            )
        return CountCompare(sides[0], str(op), sides[1])

    def _spans(self, tree: Tree[Token], level: int) -> SpanSet:
        names = [child for child in tree.children if isinstance(child, Token)]
        filters = [child for child in tree.children if isinstance(child, Tree)]
        parent = "all_of" if len(filters) > 1 else ""
        parts = [self._node(_tree(child.children[0]), level, parent) for child in filters]
        where = cast(Predicate, all_of(parts)) if parts else None
        return self._check(names[0], _name(names), where)

    def _check(self, at: Token, name: str, where: Predicate | None) -> SpanSet:
        spans = SpanSet(name, where)
        self._checks.add(spans)
        if len(self._checks) > MAX_CHECKS:
            raise self._error(
                f"the rule has more than {MAX_CHECKS} distinct span checks",
                at,
                "split it into several rules",
            )
        return spans

    def _direct(self, tree: Tree[Token]) -> Exists:
        names = [child for child in tree.children if isinstance(child, Token)]
        comparison = _tree(tree.children[-1])
        if len(names) == 1:
            raise self._one_segment(names[0], comparison)
        attribute = Attribute(Scope.ANY, self._plain(names[-1:], "an attribute"))
        predicate = self._compare(attribute, comparison)
        return Exists(self._check(names[0], _name(names[:-1]), predicate))

    def _one_segment(self, name: Token, comparison: Tree[Token]) -> RuleSyntaxError:
        op = comparison.children[0]
        source = self._text[name.end_pos : _last_token(comparison).end_pos].strip()
        if op == "in":
            hint = f"to compare an attribute: {name}.where(attribute in [ … ])"
        elif read_number(str(_last_token(comparison))) is None:
            hint = f"to compare an attribute: {name}.where(attribute {source})"
        else:
            hint = f"to compare the number of spans: count({name}) {source}"
        return self._error(f"found a comparison of the span name {name} itself", name, hint)

    def _attribute(self, tree: Tree[Token]) -> Attribute:
        tokens = [child for child in tree.children if isinstance(child, Token)]
        match tree.data:
            case "quoted_attribute":
                return Attribute(Scope.ANY, _unquote(tokens[0]))
            case "field":
                return Attribute(Scope.FIELD, self._field(tokens[-1]))
        name = self._plain(tokens, "an attribute")
        if len(tokens) > 1 and tokens[0] == "resource":
            return Attribute(Scope.RESOURCE, name.removeprefix("resource."))
        return Attribute(Scope.ANY, name)

    def _field(self, token: Token) -> str:
        if token in FIELDS:
            return str(token)
        meant = close_match(token, FIELDS)
        raise self._error(
            f"found span:{token}, expected one of " + ", ".join(f"span:{f}" for f in FIELDS),
            token,
            f"did you mean 'span:{meant}'?" if meant else "write attributes without 'span:'",
        )

    def _plain(self, tokens: Sequence[Token], what: str) -> str:
        """A dotted name without wildcards."""
        for token in tokens:
            if token.type == "SEGMENT" and "*" in token:
                raise self._error(
                    f"found '{token}', but {what} cannot have wildcards",
                    token,
                    "only span names have wildcards; put a name that contains '*' in quotes",
                )
        return _name(tokens)

    def _compare(self, attribute: Attribute, tree: Tree[Token]) -> Compare:
        op, *values = tree.children
        if op == "matches":
            literal = self._literal([values[0]])
            self._pattern(_last_token(tree), literal.text)
            return Compare(attribute, "matches", (literal,))
        literals = tuple(self._literal(_tree(value).children) for value in values)
        return Compare(attribute, str(op), literals)

    def _pattern(self, token: Token, pattern: str) -> None:
        try:
            size = compile_pattern(pattern).programsize
        except re2.error as error:
            reason = error.args[0]
            reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            raise self._error(
                f"this pattern does not compile: {reason}",
                token,
                "patterns use RE2's syntax, without look-around and back-references",
            ) from None
        if size > MAX_PATTERN:
            raise self._error(
                f"this pattern is too large: {size} RE2 instructions; at most {MAX_PATTERN}",
                token,
                r"repeat large classes such as \p{L} less often, or match only the beginning",
            )
        self._program += size
        if self._program > MAX_PROGRAM:
            raise self._error(
                "the patterns of this rule are too large",
                token,
                r"repeat large classes such as \p{L} less often, or match only the beginning",
            )

    def _literal(self, tokens: Sequence[Token | Tree[Token]]) -> Literal:
        words = [token for token in tokens if isinstance(token, Token)]
        first = words[0]
        match first.type:
            case "STRING":
                text = _unquote(first)
                return Literal(text, read_number(text))
            case "NUMBER":
                number = self._number(first)
                return Literal(number_text(number), number)
            case "DURATION":
                return Literal(str(first), self._duration(first))
        return Literal(self._plain(words, "a value"), None)

    def _number(self, token: Token, text: str = "") -> Number:
        number = read_number(text or str(token))
        if number is None:
            raise self._error(
                "this number is too large",
                token,
                f"the limit is 1.8e308 for floats and {MAX_NUMBER_CHARS} digits for integers",
            )
        return number

    def _duration(self, token: Token) -> Number:
        """A duration in nanoseconds, exact: an int unless it has a fraction of a nanosecond."""
        found = _DURATION.fullmatch(token)
        assert found is not None
        number = self._number(token, found["number"])
        unit = _UNITS[found["unit"]]
        if isinstance(number, int):
            return number * unit
        # A float's exponent is small here, unless it is so negative that the value is 0.
        exact = Fraction(found["number"]) * unit if number else Fraction(0)
        return exact.numerator if exact.denominator == 1 else float(exact)


def all_of(items: Sequence[Node]) -> Node:
    """The conjunction of one or more nodes; nested conjunctions are merged into it."""
    flat = [part for item in items for part in (item.items if isinstance(item, And) else (item,))]
    return flat[0] if len(flat) == 1 else And(tuple(flat))


def any_of(items: Sequence[Node]) -> Node:
    """The disjunction of one or more nodes; nested disjunctions are merged into it."""
    flat = [part for item in items for part in (item.items if isinstance(item, Or) else (item,))]
    return flat[0] if len(flat) == 1 else Or(tuple(flat))


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


def _unquote(token: Token) -> str:
    return _ESCAPE.sub(r"\1", token[1:-1])


def _name(tokens: Sequence[Token]) -> str:
    return ".".join(_unquote(t) if t.type == "STRING" else str(t) for t in tokens)
