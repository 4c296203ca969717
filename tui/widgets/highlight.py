"""The rule language in colours, for reading and editing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from textual.content import Content

STYLES = {
    "comment": ("text-muted", "italic"),
    "string": ("success", ""),
    "field": ("accent", ""),
    "clause": ("warning", "bold"),
    "keyword": ("primary", "bold"),
    "number": ("secondary", ""),
}
"""Variables of the theme, and what is put on top, by kind of word."""

_WORDS = re.compile(
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


def words(text: str) -> Iterator[tuple[int, int, str]]:
    """What has a colour: (from, to, kind)."""
    for found in _WORDS.finditer(text):
        if found.lastgroup is not None:
            yield found.start(), found.end(), found.lastgroup


def highlighted(text: str) -> Content:
    """A condition as text of the screen."""
    content = Content(text)
    for start, end, kind in words(text):
        variable, more = STYLES[kind]
        content = content.stylize(f"{more} ${variable}".strip(), start, end)
    return content
