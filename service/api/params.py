"""Parameters of the API: how their text is read, and how values are written."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from betrace.service.config.suggest import close_match
from betrace.service.receiver.responses import ApiError

MAX_NS = (1 << 63) - 1
SECOND = 1_000_000_000
UNITS = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": SECOND,
    "m": 60 * SECOND,
    "h": 3600 * SECOND,
    "d": 86_400 * SECOND,
}
MAX_TEXT = 1000

_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?"
    r"(?:([Zz])|([+\- ])(\d\d):(\d\d))"
)
_DURATION = re.compile(r"(\d{1,12})(?:\.(\d{1,9}))?(ns|us|ms|s|m|h|d)")
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Param:
    """A query or path parameter. ``read`` turns its text into a value and raises
    :exc:`ValueError`, whose text continues the sentence "<name> …"."""

    name: str
    description: str
    read: Callable[[str], Any]
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    default: Any = None


def read_params(params: Iterable[Param], given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The values of all ``params``, from the query string's pairs.

    Raises :exc:`ApiError` 400 for a name that is unknown or given twice and for a bad value.
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
    """The value of one parameter; :exc:`ApiError` 400 if it is bad."""
    try:
        return param.read(text)
    except ValueError as error:
        raise ApiError(400, f"{param.name} is {text[:80]!r}", f"{param.name} {error}") from None


def near(word: str, known: Iterable[str]) -> str:
    """A hint for a word that is not known."""
    names = sorted(known)
    found = close_match(word, names)
    if found:
        return f"did you mean {found}?"
    return f"known are: {', '.join(names)}" if names else "there are none here"


def read_time(text: str, now: Callable[[], int] = time.time_ns) -> int:
    """Nanoseconds since 1970 of RFC 3339 text (up to nine decimals), of an integer of
    nanoseconds, of ``now``, or of a duration before now, as ``-15m``."""
    if text == "now":
        return now()
    if text.startswith("-"):
        return max(now() - read_duration(text[1:]), 0)
    if text.isascii() and text.isdigit() and len(text) < 20:
        value = int(text)
    else:
        value = _read_rfc3339(text)
    if not 0 <= value <= MAX_NS:
        raise ValueError("must be between 1970 and 2262")
    return value


def _read_rfc3339(text: str) -> int:
    match = _RFC3339.fullmatch(text)
    problem = "must be a time, such as 2025-01-31T12:00:00Z, or -15m for a quarter of an hour ago"
    if match is None or not text.isascii():
        raise ValueError(problem)
    *parts, fraction, _, sign, hours, minutes = match.groups()
    try:
        moment = datetime.datetime(*(int(part) for part in parts), tzinfo=datetime.UTC)  # type: ignore[misc,arg-type]
    except ValueError:
        raise ValueError(problem) from None
    since = moment - _EPOCH
    seconds = since.days * 86_400 + since.seconds
    if sign:  # a "+" that was not escaped in the URL arrives as a space
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds += offset if sign == "-" else -offset
    return seconds * SECOND + int((fraction or "").ljust(9, "0"))


def write_time(ns: int) -> str:
    """RFC 3339 in UTC with nine decimals."""
    seconds, fraction = divmod(ns, SECOND)
    moment = _EPOCH + datetime.timedelta(seconds=seconds)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def read_duration(text: str) -> int:
    """Nanoseconds of a number with unit, such as 1.5s."""
    match = _DURATION.fullmatch(text)
    if match is None or not text.isascii():
        raise ValueError("must be a duration, such as 250ms, 1.5s, 15m, 1h or 7d")
    whole, fraction, unit = match.groups()
    scale = UNITS[unit]
    value = int(whole) * scale + int((fraction or "").ljust(9, "0")) * scale // SECOND
    if value > MAX_NS:
        raise ValueError("must be less than 292 years")
    return value


def read_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def read_text(text: str) -> str:
    """Any text of a sensible length."""
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
    """A reader of ids in hex, in either case, as lower case."""
    pattern = re.compile(rf"[0-9a-f]{{{digits}}}")

    def read(text: str) -> str:
        if not pattern.fullmatch(text.lower()):
            raise ValueError(f"must be {digits} hex digits")
        return text.lower()

    return read


def read_pattern(pattern: str, words: str) -> Callable[[str], str]:
    """A reader of text that matches a pattern, described by ``words``."""
    compiled = re.compile(pattern)

    def read(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(words)
        return text

    return read


LIMIT = Param(
    "limit",
    "How many, at most.",
    read_integer(1, 1000),
    {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
    default=100,
)
CURSOR = Param("cursor", "`next` of the answer before, to go on from there.", read_text)
SINCE = Param(
    "since",
    "From this time on: RFC 3339, nanoseconds since 1970, or a time ago such as `-15m`.",
    read_time,
)
UNTIL = Param("until", "Before this time; written as `since`.", read_time)
