"""Reads the literals and names of a rule: numbers, durations, texts and patterns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

import re2
from lark import Token, Tree

from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.syntax import Constant, Literal, Number
from betrace.service.rules.values import (
    MAX_NUMBER_CHARS,
    compile_pattern,
    exact_text,
    simple,
)

MAX_PATTERN = 20_000  # RE2 instructions of one pattern
MAX_PROGRAM = 100_000  # RE2 instructions of all patterns; they compile in about 40 ms

_ESCAPE = re.compile(r'\\(["\\])')
_UNITS = {
    "ns": 1,
    "us": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_DURATION = re.compile(r"(?P<number>[^a-zE]*(?:[eE][+-]?[0-9]+)?)(?P<unit>[a-z]+)")


class Literals:
    """Reads the literals of one rule, whose patterns share a limit."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._program = 0

    def error(self, message: str, token: Token, hint: str | None = None) -> RuleSyntaxError:
        """An error at a token."""
        return RuleSyntaxError(message, self._text, token.start_pos or 0, hint)

    def plain(self, tokens: Sequence[Token], what: str) -> str:
        """A dotted name without wildcards."""
        for token in tokens:
            if token.type == "SEGMENT" and "*" in token:
                raise self.error(
                    f"found '{token}', but {what} cannot have wildcards",
                    token,
                    "only span names have wildcards; put a name that contains '*' in quotes",
                )
        return joined(tokens)

    def pattern(self, token: Token, pattern: str) -> None:
        """Check a pattern. Raises :exc:`RuleSyntaxError`."""
        try:
            size = compile_pattern(pattern).programsize
        except re2.error as error:
            reason = error.args[0]
            reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            raise self.error(
                f"this pattern does not compile: {reason}",
                token,
                "patterns use RE2's syntax, without look-around and back-references",
            ) from None
        if size > MAX_PATTERN:
            raise self.error(
                f"this pattern is too large: {size} RE2 instructions; at most {MAX_PATTERN}",
                token,
                r"repeat large classes such as \p{L} less often, or match only the beginning",
            )
        self._program += size
        if self._program > MAX_PROGRAM:
            raise self.error(
                "the patterns of this rule are too large",
                token,
                r"repeat large classes such as \p{L} less often, or match only the beginning",
            )

    # Values

    def value(self, tokens: Sequence[Token]) -> Constant:
        """A literal of a relational rule."""
        first = tokens[0]
        if first.type in ("NUMBER", "DURATION"):
            return self.constant(first)
        text = unquoted(first) if first.type == "STRING" else self.plain(tokens, "a value")
        return Constant(text, text)

    def constant(self, token: Token) -> Constant:
        """A number or duration of a relational rule."""
        number = self.number(token)
        text = str(token) if token.type == "DURATION" else exact_text(number)
        return Constant(number, text)

    def literal(self, tokens: Sequence[Token | Tree[Token]]) -> Literal:
        """A literal of an old rule."""
        words = [token for token in tokens if isinstance(token, Token)]
        first = words[0]
        match first.type:
            case "STRING":
                return Literal(unquoted(first), None)
            case "NUMBER" | "DURATION":
                constant = self.constant(first)
                assert not isinstance(constant.value, str)
                return Literal(constant.text, constant.value)
        return Literal(self.plain(words, "a value"), None)

    def number(self, token: Token) -> Number:
        """The exact value of a number, or of a duration in nanoseconds."""
        unit = 1
        text = str(token)
        if token.type == "DURATION":
            found = _DURATION.fullmatch(token)
            assert found is not None
            text, unit = found["number"], _UNITS[found["unit"]]
        whole = text.removeprefix("-").isdigit()
        if len(text) > MAX_NUMBER_CHARS or (not whole and math.isinf(float(text))):
            raise self.error(
                "this number is too large",
                token,
                f"the limit is 1.8e308 for decimals and {MAX_NUMBER_CHARS} digits for integers",
            )
        if not whole and not float(text):  # perhaps with an exponent that takes long to compute
            return 0
        return simple(Fraction(text) * unit)


def unquoted(token: Token) -> str:
    """The text of a string."""
    return _ESCAPE.sub(r"\1", token[1:-1])


def joined(tokens: Sequence[Token]) -> str:
    """The name that consists of these parts."""
    return ".".join(unquoted(t) if t.type == "STRING" else str(t) for t in tokens)
