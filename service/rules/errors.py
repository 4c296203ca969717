"""Errors in rules: where, what was found, what was expected, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from lark import Token

_EXCERPT = 100  # characters of the source line shown around the fault

KEYWORDS = frozenset(
    {"when", "always", "never", "and", "or", "not", "count", "where", "in"}
    | {"matches", "contains", "before", "true", "false"}
)
_CLAUSES = frozenset({"WHEN", "ALWAYS", "NEVER"})
_OPERATOR = re.compile(r"[&|=!<>~+*/^%-]{1,3}")
_PAIRS = {")": "(", "]": "[", "}": "{"}
_SPELLED = {
    "LBRACE": "'{'",
    "RBRACE": "'}'",
    "LPAR": "'('",
    "RPAR": "')'",
    "LSQB": "'['",
    "RSQB": "']'",
    "COMMA": "','",
    "DOT": "'.'",
    "CMP": "a comparison (== != < <= > >=)",
    "SPAN_COLON": "'span:'",
    "SEGMENT": "a name",
    "STRING": "a string in double quotes",
    "NUMBER": "a number",
    "DURATION": "a duration",
    "$END": "the end of the rule",
}
# Groups of terminals that mean one thing to the reader, the larger first.
_GROUPS = (
    (frozenset({"COUNT", "NOT", "LPAR", "SEGMENT", "STRING", "NUMBER"}), "a condition"),
    (frozenset({"SPAN_COLON", "NOT", "LPAR", "SEGMENT", "STRING"}), "a predicate"),
    (frozenset({"SEGMENT", "STRING", "NUMBER", "DURATION", "TRUE", "FALSE"}), "a value"),
    (frozenset({"COUNT", "NUMBER"}), "count(…) or a number"),
    (frozenset({"SEGMENT", "STRING"}), "a name"),
    (frozenset({"CMP", "IN", "MATCHES", "CONTAINS"}), "a comparison (== != < <= > >= in …)"),
)
# Words of other languages, by what they are called here.
_SYNONYMS = {
    "is": "==",
    "eq": "==",
    "equals": "==",
    "ne": "!=",
    "like": "matches",
    "regex": "matches",
    "has": "contains",
    "includes": "contains",
    "if": "when",
}
_CHARACTER_HINTS = (
    ("&", "use 'and'"),
    ("|", "use 'or'"),
    ("=~", "use 'matches'"),
    ("=>", "use '>='"),
    ("=<", "use '<='"),
    ("=", "use '=='"),
    ("!~", "use 'not' with 'matches'"),
    ("!", "use 'not'"),
    ("'", "strings are in double quotes"),
    ("`", "strings are in double quotes"),
    ("“", 'use the plain double quote "'),
    ("”", 'use the plain double quote "'),
    ("/", "a comment begins with // or #, a pattern or name with '/' is in double quotes"),
    ("-", "there is no arithmetic in rules; a name with other characters is in double quotes"),
    ("+", "there is no arithmetic in rules; a name with other characters is in double quotes"),
    (":", "resource attributes are written resource.x, a span's own fields span:x"),
    (";", "clauses and conditions follow each other without ';'"),
)


class RuleSyntaxError(ValueError):
    """A rule that cannot be accepted.

    ``line`` and ``column`` count from 1, the column in characters; ``message`` says what was
    found and what was expected; ``hint`` what was probably meant, or None. ``str()`` shows all
    of it with the source line and a caret.
    """

    def __init__(self, message: str, text: str, offset: int, hint: str | None = None) -> None:
        super().__init__(message)
        offset = min(offset, len(text))
        start = text.rfind("\n", 0, offset) + 1
        end = text.find("\n", offset)
        self.message = message
        self.hint = hint
        self.line = text.count("\n", 0, offset) + 1
        self.column = offset - start + 1
        self.source = text[start : end if end >= 0 else len(text)].rstrip("\r")

    def excerpt(self) -> str:
        """The source line (a part of it, if long) and below it a caret under the column."""
        at = self.column - 1
        first = max(0, min(at - _EXCERPT // 2, len(self.source) - _EXCERPT))
        shown = self.source[first : first + _EXCERPT]
        before = "…" if first else ""
        after = "…" if first + _EXCERPT < len(self.source) else ""
        line = before + "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in shown)
        gap = "".join("\t" if c == "\t" else " " for c in before + shown[: at - first])
        return f"{line}{after}\n{gap}^"

    def __str__(self) -> str:
        excerpt = "\n".join("  " + line for line in self.excerpt().split("\n"))
        text = f"line {self.line}, column {self.column}: {self.message}\n{excerpt}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text

    def to_json(self) -> dict[str, str | int | None]:
        """``line``, ``column``, ``message`` and ``hint``, as the HTTP interface names them."""
        return {
            "line": self.line,
            "column": self.column,
            "message": self.message,
            "hint": self.hint,
        }


def close_match(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that ``word`` is nearly, whatever its case; None if it is near none."""
    known = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word[:40].lower(), known, n=1, cutoff=0.7)
    return known[found[0]] if found else None


def unexpected_character(text: str, offset: int) -> RuleSyntaxError:
    """The error for text at ``offset`` that begins no token."""
    char = text[offset]
    if char == '"':
        return RuleSyntaxError(
            "this string is not closed", text, offset, 'end it with "; in it, write \\" for "'
        )
    if char.isdecimal() or (char == "-" and text[offset + 1 : offset + 2].isdecimal()):
        return RuleSyntaxError(
            "found a malformed number",
            text,
            offset,
            "durations have the units ns us ms s m h; "
            "a name that begins with a digit is in double quotes",
        )
    hint = next((h for start, h in _CHARACTER_HINTS if text.startswith(start, offset)), None)
    if hint is None and char != " " and char.isspace():
        hint = "use a plain space"
    elif hint is None and char.isprintable():
        hint = "names with other characters than A-Z a-z 0-9 _ - are in double quotes"
    run = _OPERATOR.match(text, offset)
    if run is not None:
        shown = f"'{run[0]}'"
    else:
        shown = repr(char) if char.isprintable() else f"the character U+{ord(char):04X}"
    return RuleSyntaxError(f"found {shown}, which means nothing here", text, offset, hint)


def unexpected_token(
    text: str, token: Token, before: Sequence[Token], opened: Sequence[Token], accepts: set[str]
) -> RuleSyntaxError:
    """The error for a token the grammar does not allow.

    ``before`` are the tokens that precede it, ``opened`` the brackets that are open, ``accepts``
    the types of tokens that would have been allowed.
    """
    at_end = token.type == "$END"
    offset = (before[-1].end_pos or 0) if at_end and before else (token.start_pos or 0)
    if at_end and not before:
        return RuleSyntaxError(
            "the rule is empty", text, 0, "write when { … } always { … }, or a condition"
        )
    message = f"found {_found(token)}, expected {_expected(accepts)}"
    return RuleSyntaxError(message, text, offset, _hint(text, token, before, opened, accepts))


def position(text: str, token: Token) -> str:
    """``line L, column C`` of a token."""
    offset = token.start_pos or 0
    start = text.rfind("\n", 0, offset) + 1
    return f"line {text.count(chr(10), 0, offset) + 1}, column {offset - start + 1}"


def _found(token: Token) -> str:
    if token.type == "$END":
        return "the end of the rule"
    word = str(token)
    word = word if len(word) <= 40 else word[:39] + "…"
    if token.type == "STRING":
        return f"the string {word}"
    return f"the keyword '{word}'" if word in KEYWORDS else f"'{word}'"


def _expected(accepts: Collection[str]) -> str:
    rest = set(accepts)
    phrases: list[str] = []
    for members, phrase in _GROUPS:
        if members <= rest:
            rest -= members
            phrases.append(phrase)
    if len(accepts) > 1:
        rest.discard("DOT")  # nearly always allowed, nearly never meant
    phrases += sorted(_SPELLED.get(name, f"'{name.lower()}'") for name in rest)
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " or " + phrases[-1]


def _hint(
    text: str, token: Token, before: Sequence[Token], opened: Sequence[Token], accepts: set[str]
) -> str | None:
    previous = before[-1] if before else None
    return (
        _near_miss(token, before, accepts)
        or (_after(token, previous) if previous is not None else None)
        or _unclosed(text, token, opened, accepts)
        or _misplaced(token, previous, accepts)
    )


def _near_miss(token: Token, before: Sequence[Token], accepts: set[str]) -> str | None:
    """A word that is nearly a keyword: this token, or the name before it."""
    keywords = [name.lower() for name in accepts if name.lower() in KEYWORDS]
    word = str(token)
    if token.type == "SEGMENT":
        if meant := close_match(word, keywords):
            return _did_you_mean(word, meant)
        if (meant := _SYNONYMS.get(word.lower())) and (meant in keywords or "CMP" in accepts):
            return _did_you_mean(word, meant)
    if not before or before[-1].type != "SEGMENT":
        return None
    word = str(before[-1])
    after_dot = len(before) > 1 and before[-2].type == "DOT"
    match token.type:
        case "LPAR":
            meant = close_match(word, ["where"] if after_dot else ["count", "not", "and", "or"])
        case "LBRACE":
            meant = close_match(word, ["when", "always", "never"]) or _SYNONYMS.get(word.lower())
        case "SEGMENT" | "STRING" | "COUNT" | "NOT":
            meant = close_match(word, ["not", "and", "or"])
        case _:
            return None
    return _did_you_mean(word, meant) if meant else None


def _did_you_mean(word: str, meant: str) -> str:
    lower = " (keywords are lower case)" if word.lower() == meant else ""
    return f"did you mean '{meant}'?{lower}"


def _after(token: Token, previous: Token) -> str | None:
    """What the previous token calls for."""
    match previous.type:
        case "WHERE":
            return "where takes a predicate in parentheses: payment.where(amount > 1000)"
        case "WHEN" | "ALWAYS" | "NEVER":
            return f"put the condition in braces: {previous} {{ … }}"
        case "COUNT":
            return "count takes a span name in parentheses: count(payment)"
        case "MATCHES":
            return "write the pattern in double quotes"
        case "IN":
            return 'write the list in brackets: in ["a", "b"]'
        case "LBRACE" if token.type == "RBRACE":
            return "write a condition between the braces, or leave the clause out"
        case "CMP" if previous == "<" and token == ">":
            return "use '!='"
        case "DOT" if token.type in ("NUMBER", "DURATION"):
            return "a name with a part that begins with a digit is in double quotes"
        case "DOT" if token.type == "SPAN_COLON":
            return "a span's own fields are compared in where: payment.where(span:duration > 1s)"
        case "DOT" if token.type == "WHERE":
            return "a where stands after a span name, not inside another where"
        case "DOT" if token in KEYWORDS:
            return f"'{token}' is a keyword; a name with it is in double quotes"
    return None


def _unclosed(text: str, token: Token, opened: Sequence[Token], accepts: set[str]) -> str | None:
    """A bracket that is missing."""
    closer = token.type in ("RPAR", "RSQB", "RBRACE")
    if closer and not any(bracket == _PAIRS[str(token)] for bracket in opened):
        return f"there is no '{_PAIRS[str(token)]}' before it that is open"
    ends = token.type == "CMP" and "RPAR" in accepts
    ends = ends or token.type in _CLAUSES or token.type in ("$END", "LBRACE")
    if opened and (ends or (closer and opened[-1] != _PAIRS[str(token)])):
        return f"the '{opened[-1]}' of {position(text, opened[-1])} is not closed"
    return None


def _misplaced(token: Token, previous: Token | None, accepts: set[str]) -> str | None:
    """A token that belongs elsewhere."""
    if token.type == "$END" and accepts == {"ALWAYS", "NEVER"}:
        return "say what must hold then: add always { … } or never { … }"
    if token.type in _CLAUSES:
        if "$END" in accepts and "OR" in accepts:
            return "with clauses, every condition stands in one: when { … } always { … }"
        return "a rule is when { … }, which may be left out, then always { … }, never { … } or both"
    if token.type == "CMP" and "BEFORE" in accepts:
        return f"to compare how many there are: count(…) {token} 3"
    if token.type == "COUNT" and "SPAN_COLON" in accepts:
        return 'count(…) is a condition of its own; for an attribute of that name write "count"'
    if token.type == "SPAN_COLON":
        return "a span's own fields are compared in where: payment.where(span:duration > 1s)"
    if token.type == "DURATION" and "COUNT" in accepts:
        return "a count is compared with a plain number"
    if token.type in ("SEGMENT", "STRING") and accepts == {"COUNT", "NUMBER"}:
        return f"to count the spans of a name: count({token})"
    if token.type == "COMMA":
        return "conditions are joined with 'and' or 'or'"
    if token in KEYWORDS and "SEGMENT" in accepts and token.type not in ("AND", "OR"):
        return f'a keyword is a name in double quotes only: "{token}"'
    if accepts == {"WHERE"}:
        return f"attributes of filtered spans are compared in another .where({token} …)"
    if token.type == "SEGMENT" and {"AND", "OR"} <= accepts:
        if "BEFORE" in accepts or previous is None or previous.type != "SEGMENT":
            return "conditions are joined with 'and' or 'or'"
        return "text of several words is in double quotes"
    return None
