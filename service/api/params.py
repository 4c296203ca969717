"""Query and path parameters: how their text is read and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from betrace.service.api.errors import ApiError
from betrace.service.config.suggest import close_match
from betrace.service.tenants import TENANT_RULE
from betrace.service.times import read_time

MAX_TEXT = 1000


@dataclass(frozen=True, slots=True)
class Param:
    """A query or path parameter. ``read`` turns its text into a value, or raises
    :exc:`ValueError` with a message that continues the sentence "<name> …"."""

    name: str
    description: str
    read: Callable[[str], Any]
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    default: Any = None


def read_params(params: Iterable[Param], given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The values of all ``params``, from the pairs of a query string.

    Raises :exc:`ApiError` 400 for an unknown or repeated name and for an invalid value.
    """
    known = {param.name: param for param in params}
    values = {param.name: param.default for param in known.values()}
    seen: set[str] = set()
    for name, text in given:
        param = known.get(name)
        if param is None:
            raise ApiError(400, f"unknown parameter {name[:80]!r}", near(name, known))
        if name in seen:
            raise ApiError(400, f"parameter {name} is given twice", "give it once")
        seen.add(name)
        values[name] = read_param(param, text)
    return values


def read_param(param: Param, text: str) -> Any:
    """The value of one parameter. Raises :exc:`ApiError` 400 if it is invalid."""
    try:
        return param.read(text)
    except ValueError as error:
        shown = f"{param.name} is {text[:80]!r}"
        raise ApiError(400, shown, f"{param.name} {error}") from None


def near(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word."""
    names = sorted(known)
    found = close_match(word, names)
    if found:
        return f"did you mean {found}?"
    return f"use one of: {', '.join(names)}" if names else "remove it; none are allowed here"


def read_bool(text: str) -> bool:
    """``true`` or ``false``."""
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def read_text(text: str) -> str:
    """Any text of 1 to 1000 characters."""
    if not text or len(text) > MAX_TEXT:
        raise ValueError(f"must have 1 to {MAX_TEXT} characters")
    return text


def read_integer(low: int, high: int) -> Callable[[str], int]:
    """A reader of integers within bounds."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 19 and low <= int(text) <= high):
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(text)

    return read


def read_choice(*choices: str) -> Callable[[str], str]:
    """A reader of one of a few words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return read


def read_hex(digits: int) -> Callable[[str], str]:
    """A reader of ids in hex of either case; the value is in lower case."""
    pattern = re.compile(rf"[0-9a-f]{{{digits}}}")

    def read(text: str) -> str:
        if not pattern.fullmatch(text.lower()):
            raise ValueError(f"must be {digits} hex digits")
        return text.lower()

    return read


def read_pattern(pattern: str, words: str) -> Callable[[str], str]:
    """A reader of text that matches a pattern, which ``words`` describe."""
    compiled = re.compile(pattern)

    def read(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(words)
        return text

    return read


read_tenant = read_pattern(r"[a-z0-9][a-z0-9_-]{0,62}", f"must be a tenant name: {TENANT_RULE}")

NEXT = "`next` of the previous page."
LIMIT = Param(
    "limit",
    "The most to return.",
    read_integer(1, 1000),
    {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
    default=100,
)
CURSOR = Param("cursor", NEXT, read_text)
SINCE = Param(
    "since",
    "At or after this time: RFC 3339, nanoseconds since 1970, or a time ago such as `-15m`.",
    read_time,
)
UNTIL = Param("until", "Before this time, in the same forms as `since`.", read_time)
WAIT = Param(
    "wait",
    "The most seconds to wait.",
    read_integer(0, 60),
    {"type": "integer", "minimum": 0, "maximum": 60, "default": 10},
    default=10,
)
