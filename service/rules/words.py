"""Tells the newer keywords from names by their neighbours.

``for each by as within sum parent event …`` were names in rules before they were keywords. Each is
a keyword only where no rule could have a name: two names never stand side by side, and a name was
never followed by a parenthesis.
"""

from __future__ import annotations

from collections.abc import Iterator

from lark import Token

FUNCTIONS = {
    **dict.fromkeys(("parent", "child", "ancestor", "descendant", "sibling"), "RELATION"),
    **dict.fromkeys(("followed_by", "preceded_by"), "TIMED"),
    **dict.fromkeys(("event", "link"), "PART"),
    **dict.fromkeys(("sum", "avg", "min", "max", "distinct"), "AGGREGATE"),
    "exists": "EXISTS",
}
_KEYWORDS = frozenset(
    {"WHEN", "ALWAYS", "NEVER", "AND", "OR", "NOT", "COUNT", "BEFORE"}
    | {"IN", "MATCHES", "CONTAINS", "TRUE", "FALSE"}
)
_ENDS_NAME = frozenset({"SEGMENT", "STRING", "RPAR"})
_ENDS_OPERAND = _ENDS_NAME | {"NUMBER", "DURATION"}


class Words:
    """A filter of tokens for Lark's ``postlex``; without state between rules."""

    always_accept = ("WHITESPACE", "COMMENT")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The same tokens, with the types of keywords."""
        previous: Token | None = None
        header = depth = 0  # in "for each …": 1 after "for", 2 after "each"
        token = next(stream, None)
        while token is not None:
            failed: Exception | None = None
            try:
                following = next(stream, None)
            except Exception as error:  # an unknown character: the token before it comes first
                following, failed = None, error
            before = previous.type if previous is not None else ""
            after = following.type if following is not None else ""
            kind = token.type
            if before == "DOT" and kind in _KEYWORDS:
                kind = "SEGMENT"
            elif kind == "SEGMENT" and before != "DOT":
                kind = self._kind(token, before, following, after, header, depth)
            if kind == "FOR":
                header, depth = 1, 0
            elif kind == "EACH":
                header = 2
            elif kind in ("LBRACE", "ALWAYS", "NEVER"):
                header = 0
            depth += (kind == "LPAR") - (kind == "RPAR")
            if kind != token.type:
                token = Token.new_borrow_pos(kind, str(token), token)
            yield token
            if failed is not None:
                raise failed
            previous, token = token, following

    @staticmethod
    def _kind(
        token: Token, before: str, following: Token | None, after: str, header: int, depth: int
    ) -> str:
        word = str(token)
        if after == "LPAR" and word in FUNCTIONS:
            return FUNCTIONS[word]
        if word == "for" and after == "SEGMENT" and following == "each":
            return "FOR"
        if word == "each" and header == 1:
            return "EACH"
        if word in ("by", "as") and header == 2 and depth == 0 and before in _ENDS_NAME:
            return word.upper()
        if word == "within" and before in _ENDS_NAME:
            return "WITHIN"
        if word == "*" and before in _ENDS_OPERAND and following is not None:
            spaced = (token.start_pos or 0), (token.end_pos or 0), (following.start_pos or 0)
            if spaced[1] < spaced[2]:
                return "MULTIPLY"
        return "SEGMENT"
