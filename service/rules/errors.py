"""Syntax errors in rules: the location, what was found, what was expected, and a suggestion."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from lark import Token

from betrace.service.config.suggest import close_match
from betrace.service.rules.words import FUNCTIONS

_EXCERPT = 100  # characters of the source line shown around the error

KEYWORDS = frozenset(
    {"when", "always", "never", "and", "or", "not", "count", "where", "in"}
    | {"matches", "contains", "before", "true", "false"}
)
_NEW_KEYWORDS = frozenset({"for", "each", "by", "as", "within"})  # only between two names
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
    "SCOPE": "'root:'",
    "ADD": "'+' or '-'",
    "MULTIPLY": "'*' or '/'",
    "SEGMENT": "a name",
    "STRING": "a string in double quotes",
    "NUMBER": "a number",
    "DURATION": "a duration",
    "$END": "the end of the rule",
}
# Groups of terminals that readers know as one thing: those that show it, and others that belong to
# it. The first that applies wins.
_REFS = frozenset({"SCOPE", "EXISTS", "COUNT", "RELATION", "TIMED", "PART", "DOT", "SPAN_COLON"})
_NUMBERS = frozenset({"LPAR", "NUMBER", "DURATION", "AGGREGATE"}) | _REFS
_GROUPS: tuple[tuple[frozenset[str], frozenset[str], str], ...] = (
    (frozenset({"SPAN_COLON", "NOT", "LPAR", "SEGMENT", "STRING"}), _NUMBERS, "a predicate"),
    (frozenset({"COUNT", "NOT", "LPAR", "SEGMENT", "STRING", "NUMBER"}), _NUMBERS, "a condition"),
    (
        frozenset({"SEGMENT", "STRING", "NUMBER", "DURATION", "TRUE", "FALSE"}),
        _NUMBERS,
        "a value",
    ),
    (frozenset({"NUMBER", "DURATION", "LPAR"}), _NUMBERS, "a number or an attribute"),
    (frozenset({"SEGMENT", "STRING", "SPAN_COLON", "SCOPE"}), frozenset({"DOT"}), "an attribute"),
    (frozenset({"RELATION", "PART"}), frozenset({"TIMED"}), "child(…), event(…) or the like"),
    (frozenset({"SEGMENT", "STRING"}), frozenset(), "a name"),
    (
        frozenset({"CMP", "IN", "MATCHES", "CONTAINS"}),
        frozenset(),
        "a comparison (== != < <= > >= in …)",
    ),
)
# Words of other languages, and what they are called here.
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
    ("'", "put strings in double quotes"),
    ("`", "put strings in double quotes"),
    ("“", 'use the plain double quote "'),
    ("”", 'use the plain double quote "'),
    (
        "/",
        "comments begin with // or #; put names and patterns with '/' in double quotes, "
        "and spaces around '/' to divide",
    ),
    ("-", "put spaces around '-' to subtract; put names with other characters in double quotes"),
    (":", "write resource.x for a resource attribute and span:x for a field of the span"),
    (";", "write clauses and conditions without ';'"),
)


class RuleSyntaxError(ValueError):
    """The text is not a valid rule.

    ``line`` and ``column`` count from 1, the column in characters; ``message`` says what was found
    and what was expected; ``hint`` says how to correct it, or is None. ``str()`` includes all of
    these, the source line, and a caret.
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
        """The source line (a part of a long one), and below it a caret under the column."""
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
        """``line``, ``column``, ``message`` and ``hint``, named as in the HTTP API."""
        return {
            "line": self.line,
            "column": self.column,
            "message": self.message,
            "hint": self.hint,
        }


def unexpected_character(text: str, offset: int) -> RuleSyntaxError:
    """The error for text at ``offset`` that is not the beginning of a token."""
    char = text[offset]
    if char == '"':
        return RuleSyntaxError(
            "this string is not closed", text, offset, 'end it with "; inside it, write \\" for "'
        )
    if char.isdecimal() or (char == "-" and text[offset + 1 : offset + 2].isdecimal()):
        return RuleSyntaxError(
            "found a malformed number",
            text,
            offset,
            "the units of durations are ns us ms s m h; "
            "put names that begin with a digit in double quotes",
        )
    hint = next((h for start, h in _CHARACTER_HINTS if text.startswith(start, offset)), None)
    if hint is None and char != " " and char.isspace():
        hint = "use a plain space"
    elif hint is None and char.isprintable():
        hint = "put names with characters other than A-Z a-z 0-9 _ - in double quotes"
    run = _OPERATOR.match(text, offset)
    if run is not None:
        shown = f"'{run[0]}'"
    else:
        shown = repr(char) if char.isprintable() else f"the character U+{ord(char):04X}"
    return RuleSyntaxError(f"found {shown}, which is not part of the language", text, offset, hint)


def unexpected_token(
    text: str, token: Token, before: Sequence[Token], opened: Sequence[Token], accepts: set[str]
) -> RuleSyntaxError:
    """The error for a token that the grammar does not allow.

    ``before`` are the tokens before it, ``opened`` the open brackets, and ``accepts`` the types of
    tokens that would have been allowed.
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
    for members, others, phrase in _GROUPS:
        if members <= rest:
            rest -= members | others
            phrases.append(phrase)
    if len(accepts) > 1:
        rest -= {"DOT", "ADD", "MULTIPLY"}  # almost always allowed, almost never intended
        if "ALWAYS" in rest:
            rest.discard("FOR")
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
    """A misspelled keyword: this token, or the name before it."""
    keywords = [name.lower() for name in accepts if name.lower() in KEYWORDS | _NEW_KEYWORDS]
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
            words = ["where"] if after_dot else ["count", "not", "and", "or", *FUNCTIONS]
            meant = close_match(word, words)
        case "LBRACE":
            meant = close_match(word, ["when", "always", "never"]) or _SYNONYMS.get(word.lower())
        case "SEGMENT" | "STRING" | "COUNT" | "NOT":
            if word.lower() == "for":
                return "to judge spans one by one: for each payment as p always { … }"
            meant = close_match(word, ["not", "and", "or"])
        case _:
            return None
    if meant is None and token.type == "LPAR" and not after_dot:
        return f"there is no function '{word}'; there are count, {', '.join(FUNCTIONS)}"
    return _did_you_mean(word, meant) if meant else None


def _did_you_mean(word: str, meant: str) -> str:
    lower = " (keywords are in lower case)" if word.lower() == meant else ""
    return f"did you mean '{meant}'?{lower}"


def _after(token: Token, previous: Token) -> str | None:
    """What must follow the previous token."""
    match previous.type:
        case "WHERE":
            return "where takes a predicate in parentheses: payment.where(amount > 1000)"
        case "WHEN" | "ALWAYS" | "NEVER":
            return f"put the condition in braces: {previous} {{ … }}"
        case "WITHIN":
            return "within takes a duration: followed_by(payment.settled within 5s)"
        case "AS":
            return "after 'as' stands a word of your own: for each payment as p"
        case "BY":
            return "after 'by' stand attributes: for each payment by order_id as p"
        case "EACH":
            return "name the spans: for each payment as p"
        case "SCOPE":
            return f"name an attribute or a field after the colon: {previous}name"
        case "AGGREGATE":
            return f"{previous} takes spans and an attribute: {previous}(payment, amount)"
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
            return "put a part of a name that begins with a digit in double quotes"
        case "DOT" if token.type == "SPAN_COLON":
            return "compare the fields of a span in where: payment.where(span:duration > 1s)"
        case "DOT" if token.type == "WHERE":
            return "where follows a span name; it cannot be inside another where"
        case "DOT" if token in KEYWORDS:
            return f"'{token}' is a keyword; put it in double quotes to use it in a name"
    return None


def _unclosed(text: str, token: Token, opened: Sequence[Token], accepts: set[str]) -> str | None:
    """A missing bracket."""
    closer = token.type in ("RPAR", "RSQB", "RBRACE")
    if closer and not any(bracket == _PAIRS[str(token)] for bracket in opened):
        return f"there is no open '{_PAIRS[str(token)]}' before it"
    ends = token.type == "CMP" and "RPAR" in accepts
    ends = ends or token.type in _CLAUSES or token.type in ("$END", "LBRACE")
    if opened and (ends or (closer and opened[-1] != _PAIRS[str(token)])):
        return f"the '{opened[-1]}' at {position(text, opened[-1])} is not closed"
    return None


def _misplaced(token: Token, previous: Token | None, accepts: set[str]) -> str | None:
    """A token in the wrong place."""
    if token.type == "$END" and accepts - {"FOR"} == {"ALWAYS", "NEVER"}:
        return "say what must hold in these traces: add always { … } or never { … }"
    if token.type in _CLAUSES:
        if "$END" in accepts and "OR" in accepts:
            return "if a rule has clauses, every condition is in one: when { … } always { … }"
        return "a rule is an optional when { … }, followed by always { … }, never { … } or both"
    if token.type == "CMP" and "BEFORE" in accepts:
        return f"to compare the number of spans: count(…) {token} 3"
    if "RELATION" in accepts and "SPAN_COLON" not in accepts:
        return (
            "counts of the trace's spans cannot be inside where; "
            "count(child(…)) counts the children of the span"
        )
    if token.type == "AGGREGATE" and "SPAN_COLON" in accepts:
        return f"{token}(…) is of the whole trace and cannot be inside where"
    if token.type in ("RELATION", "TIMED", "PART") and "COUNT" in accepts:
        return f"{token}(…) is about one span; use it in where: payment.where({token}(…))"
    if token.type in ("RELATION", "PART") and previous is not None and previous.type == "LPAR":
        return f"to count them, name the spans: payment.where(count({token}(…)) > 3)"
    if token.type in ("ADD", "MULTIPLY") and previous is not None and previous.type == "SEGMENT":
        if "CMP" in accepts:
            return f"to calculate with the attribute, write .{previous}"
        return f"to calculate with the attribute, write .{previous}; names without a dot are text"
    if token.type == "WITHIN":
        return "within stands inside followed_by(…) and preceded_by(…), after the spans"
    if token.type == "FOR" or (token.type == "WHEN" and accepts == {"ALWAYS", "NEVER"}):
        return "a rule has one 'for each', after when { … } and before always { … } and never { … }"
    if "ADD" in accepts and str(token)[:1] in ("-", "*") and len(token) > 1:
        return f"put spaces around '{str(token)[0]}' to calculate"
    if token.type == "DOT" and ("COUNT" in accepts or "SEGMENT" not in accepts):
        return "an attribute of a span can be used in where only: payment.where(amount > .limit)"
    if token.type == "SPAN_COLON":
        return "compare the fields of a span in where: payment.where(span:duration > 1s)"
    if token.type == "DURATION" and "COUNT" in accepts:
        return "compare counts with numbers without a unit"
    if token.type in ("SEGMENT", "STRING") and accepts == {"COUNT", "NUMBER"}:
        return f"to count the spans with this name: count({token})"
    if token.type == "COMMA":
        return "join conditions with 'and' or 'or'"
    if token in KEYWORDS and "SEGMENT" in accepts and token.type not in ("AND", "OR"):
        return f'put a keyword in double quotes to use it as a name: "{token}"'
    if accepts == {"WHERE"}:
        return f"compare attributes of filtered spans in another .where({token} …)"
    if token.type == "SEGMENT" and {"AND", "OR"} <= accepts:
        if "BEFORE" in accepts or previous is None or previous.type != "SEGMENT":
            return "join conditions with 'and' or 'or'"
        return "put text of several words in double quotes"
    return None
