"""Parses rules: text to :class:`betrace.service.rules.syntax.RuleSyntax`.

The grammar is in ``grammar.lark``; Lark's LALR(1) parser takes time linear in the text and does not
recurse. What a grammar cannot express well (limits, scopes, wildcards, fields, patterns) is
checked in :mod:`betrace.service.rules.build`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lark import Lark, Token, UnexpectedCharacters, UnexpectedToken

from betrace.service.rules.build import Builder
from betrace.service.rules.errors import RuleSyntaxError, unexpected_character, unexpected_token
from betrace.service.rules.refs import MAX_DEPTH, NotOldRuleError
from betrace.service.rules.syntax import RuleSyntax
from betrace.service.rules.words import Words

MAX_TEXT_BYTES = 16 * 1024  # of UTF-8
MAX_BRACKETS = 128  # open at the same time, including needless parentheses

_PARSER = Lark(
    (Path(__file__).parent / "grammar.lark").read_text(encoding="utf-8"),
    parser="lalr",
    lexer="basic",  # without context: keywords are reserved everywhere
    maybe_placeholders=False,
    postlex=Words(),
)
_BRACKETS = {"RPAR": "LPAR", "RBRACE": "LBRACE", "RSQB": "LSQB"}


def parse(text: str, *, relational: bool = False) -> RuleSyntax:
    """The syntax tree of a rule's condition.

    Raises :exc:`RuleSyntaxError`, and nothing else, for text that is not a rule, and for a rule of
    more than 16 KiB, 256 distinct span checks, or 32 levels. A ``not`` is a level, and so are
    parentheses that change the meaning: ``((a))`` and ``(a and b) and c`` have no level,
    ``not (a or b)`` has one. A relation and ``for each`` are levels, too.

    With ``relational`` the tree of an old rule has the nodes of relational rules.
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
    if not relational:
        try:
            return Builder(text, related=False).rule(tree)
        except NotOldRuleError:
            pass
    return Builder(text, related=True).rule(tree)


def tokens(text: str) -> list[Token]:
    """The tokens of a condition that :func:`parse` accepts, with their positions in ``text``."""
    return list(_PARSER.lex(text))


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
