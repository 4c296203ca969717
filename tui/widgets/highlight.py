"""Syntax highlighting for the rule language."""

from __future__ import annotations

import re
from collections.abc import Iterator

from textual.content import Content

TOKEN_STYLES = {
    "comment": ("text-muted", "italic"),
    "string": ("success", ""),
    "field": ("accent", ""),
    "clause": ("warning", "bold"),
    "keyword": ("primary", "bold"),
    "number": ("secondary", ""),
}
"""The theme variable and the text style of each kind of token."""

_TOKENS = re.compile(
    r"""
    (?P<comment> (?://|\#)[^\n]* )
  | (?P<string> "[^"\\]*(?:\\[\s\S][^"\\]*)*"? )
  | (?P<field> span:[A-Za-z_]* )
  | (?P<clause> \b(?:when|always|never)\b(?![.*-]) )
  | (?P<keyword> \b(?:and|or|not|count|where|in|matches|contains|before|true|false)\b(?![.*-]) )
  | (?P<number> (?<![\w.-])-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?:ns|us|ms|s|m|h)?\b )
  | (?: [A-Za-z_*][\w*-]* )
    """,
    re.VERBOSE,
)


def tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """The tokens that have a colour: (start, end, kind)."""
    for found in _TOKENS.finditer(text):
        if found.lastgroup is not None:
            yield found.start(), found.end(), found.lastgroup


def highlighted(text: str) -> Content:
    """A condition in colours."""
    content = Content(text)
    for start, end, kind in tokens(text):
        variable, more = TOKEN_STYLES[kind]
        content = content.stylize(f"{more} ${variable}".strip(), start, end)
    return content
