"""Durations such as ``15m``, and times as RFC 3339 with nanoseconds."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable

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

_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?"
    r"(?:([Zz])|([+\- ])(\d\d):(\d\d))"
)
_DURATION = re.compile(r"(\d{1,12})(?:\.(\d{1,9}))?(ns|us|ms|s|m|h|d)")
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def day_ns(day: datetime.date) -> int:
    """When a day begins in UTC, in nanoseconds since 1970."""
    return (day - _EPOCH.date()).days * UNITS["d"]


def read_time(text: str, now: Callable[[], int] = time.time_ns) -> int:
    """Nanoseconds since 1970, from RFC 3339 (up to nine decimals), an integer of nanoseconds,
    ``now``, or a duration before now such as ``-15m``. Raises :exc:`ValueError`, whose message
    continues the sentence "<name> …"."""
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
    problem = "must be a time such as 2025-01-31T12:00:00Z, or -15m for 15 minutes ago"
    if match is None or not text.isascii():
        raise ValueError(problem)
    *parts, fraction, _, sign, hours, minutes = match.groups()
    try:
        moment = datetime.datetime(*(int(part) for part in parts), tzinfo=datetime.UTC)  # type: ignore[misc,arg-type]
    except ValueError:
        raise ValueError(problem) from None
    since = moment - _EPOCH
    seconds = since.days * 86_400 + since.seconds
    if sign:  # an unescaped "+" in a URL arrives as a space
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds += offset if sign == "-" else -offset
    return seconds * SECOND + int((fraction or "").ljust(9, "0"))


def write_time(ns: int) -> str:
    """Nanoseconds since 1970 as RFC 3339 in UTC with nine decimals."""
    seconds, fraction = divmod(ns, SECOND)
    moment = _EPOCH + datetime.timedelta(seconds=seconds)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def read_duration(text: str) -> int:
    """Nanoseconds of a number with a unit, such as ``1.5s``. Raises :exc:`ValueError`."""
    match = _DURATION.fullmatch(text)
    if match is None or not text.isascii():
        raise ValueError("must be a duration such as 250ms, 1.5s, 15m, 1h or 7d")
    whole, fraction, unit = match.groups()
    scale = UNITS[unit]
    value = int(whole) * scale + int((fraction or "").ljust(9, "0")) * scale // SECOND
    if value > MAX_NS:
        raise ValueError("must be less than 292 years")
    return value


def short_duration(ns: int) -> str:
    """Nanoseconds with three digits in a unit that suits them, such as ``1.23 ms``."""
    for unit, scale in (("s", SECOND), ("ms", 1_000_000), ("µs", 1_000)):
        if ns >= scale:
            value = ns / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{ns} ns"
