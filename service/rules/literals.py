"""Reads the literals and names of a rule: numbers, durations, texts and patterns."""

from __future__ import annotations

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
    exact_number,
    exact_text,
    number_text,
    read_number,
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
        if token.type == "DURATION":
            self._duration(token)  # checks its size
            found = _DURATION.fullmatch(token)
            assert found is not None
            exact = exact_number(found["number"])
            value = Fraction(0) if exact is None else Fraction(exact) * _UNITS[found["unit"]]
            return Constant(value.numerator if value.denominator == 1 else value, str(token))
        self.number(token)
        number = exact_number(str(token))
        number = 0 if number is None else number
        return Constant(number, exact_text(number))

    def literal(self, tokens: Sequence[Token | Tree[Token]]) -> Literal:
        """A literal of an old rule."""
        words = [token for token in tokens if isinstance(token, Token)]
        first = words[0]
        match first.type:
            case "STRING":
                text = unquoted(first)
                return Literal(text, read_number(text))
            case "NUMBER":
                number = self.number(first)
                return Literal(number_text(number), number)
            case "DURATION":
                return Literal(str(first), self._duration(first))
        return Literal(self.plain(words, "a value"), None)

    def number(self, token: Token, text: str = "") -> Number:
        """A number, in the precision of old rules."""
        number = read_number(text or str(token))
        if number is None:
            raise self.error(
                "this number is too large",
                token,
                f"the limit is 1.8e308 for floats and {MAX_NUMBER_CHARS} digits for integers",
            )
        return number

    def _duration(self, token: Token) -> Number:
        """A duration in nanoseconds, exact: an int unless it has a fraction of a nanosecond."""
        found = _DURATION.fullmatch(token)
        assert found is not None
        number = self.number(token, found["number"])
        unit = _UNITS[found["unit"]]
        if isinstance(number, int):
            return number * unit
        # A float's exponent is small here, unless it is so negative that the value is 0.
        exact = Fraction(found["number"]) * unit if number else Fraction(0)
        return exact.numerator if exact.denominator == 1 else float(exact)


def unquoted(token: Token) -> str:
    """The text of a string."""
    return _ESCAPE.sub(r"\1", token[1:-1])


def joined(tokens: Sequence[Token]) -> str:
    """The name that consists of these parts."""
    return ".".join(unquoted(t) if t.type == "STRING" else str(t) for t in tokens)
