"""Figures and states as an operator reads them.

A state is always a word and a symbol; its colour comes on top. Colours are names of theme variables
(:data:`TONES`), so that they follow the theme.
"""

from __future__ import annotations

import math
import time
from datetime import datetime
from typing import Literal

Tone = Literal["good", "busy", "bad", "quiet"]

SYMBOLS: dict[Tone, str] = {"good": "●", "busy": "▲", "bad": "✖", "quiet": "○"}

NONE = "–"
"""What stands where there is no figure."""

_UNITS = ("", "k", "M", "G", "T")


def number(value: float | None) -> str:
    """At most five characters: 999, 12.3k, 4.5M."""
    if value is None or not math.isfinite(value):
        return NONE
    if abs(value) < 10 and value != int(value):
        return f"{value:.1f}"
    scaled, power = float(value), 0
    while abs(scaled) >= 999.5 and power < len(_UNITS) - 1:
        scaled, power = scaled / 1000, power + 1
    if not power:
        return f"{scaled:.0f}"
    return f"{scaled:.1f}{_UNITS[power]}" if abs(scaled) < 99.95 else f"{scaled:.0f}{_UNITS[power]}"


def count(value: int | None) -> str:
    """All digits, in groups: 1 234 567."""
    return NONE if value is None else f"{value:,}".replace(",", "\u202f")


def many(value: int | None, noun: str) -> str:
    """A count with its noun: 1 tenant, 2 tenants."""
    return f"{count(value)} {plural(value, noun)}"


def plural(value: int | None, noun: str) -> str:
    """A noun as it stands after a count: tenant, tenants, entries."""
    if value == 1:
        return noun
    return f"{noun[:-1]}ies" if noun.endswith("entry") else f"{noun}s"


def percent(fraction: float | None) -> str:
    """0.5 as 50 %."""
    if fraction is None or not math.isfinite(fraction):
        return NONE
    whole = 100 * fraction
    return f"{whole:.1f} %" if 0 < whole < 10 or 99 <= whole < 100 else f"{whole:.0f} %"


def millis(value: float | None) -> str:
    """Milliseconds in the unit that suits."""
    if value is None or not math.isfinite(value):
        return NONE
    if value < 10:
        return f"{value:.1f} ms"
    return f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.1f} s"


def duration(seconds: float | None) -> str:
    """Two units at most: 42 s, 3 min 5 s, 2 h 10 min, 4 d 3 h."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    whole = max(0, int(seconds))
    for size, name, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name} {rest} {smaller}" if rest else f"{whole // size} {name}"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole} s"


def size(value: float | None) -> str:
    """Bytes: 12.5 MiB."""
    if value is None or not math.isfinite(value):
        return NONE
    scaled, units = float(value), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while scaled >= 1024 and unit != "TiB":
        scaled, unit = scaled / 1024, next(units)
    return f"{scaled:.0f} {unit}" if scaled >= 100 or unit == "B" else f"{scaled:.1f} {unit}"


def clock(at: float | None) -> str:
    """A time of day; seconds since 1970 in local time."""
    return NONE if at is None else time.strftime("%H:%M:%S", time.localtime(at))


def moment(text: object) -> float | None:
    """Seconds since 1970 of a time as the service writes it (RFC 3339)."""
    try:
        return datetime.fromisoformat(f"{str(text)[:19]}+00:00").timestamp()
    except ValueError:
        return None


def date(at: float | None) -> str:
    """A day and its time, in local time."""
    return NONE if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def severity(word: str) -> tuple[str, Tone]:
    """A severity with its symbol, and its tone."""
    tone = SEVERITY_TONES.get(word, "quiet")
    return f"{SYMBOLS[tone]} {word or NONE}", tone


def ago(at: float | None, now: float) -> str:
    """How long ago a time was, to the second."""
    return "never" if at is None else f"{duration(now - at)} ago" if now - at >= 1 else "now"


def age(at: float | None, now: float) -> str:
    """The same in one unit: never, now, 42 s, 5 min, 2 h."""
    return ago(at, now) if at is None or now - at < 1 else " ".join(duration(now - at).split()[:2])


def bar(fraction: float, width: int, peak: float = 0.0) -> str:
    """A bar of so many characters, up to a peak in a lighter shade. What is not empty shows at
    least one, and what is not full leaves one."""
    full = _cells(fraction, width)
    high = max(full, _cells(peak, width))
    return "█" * full + "▒" * (high - full) + "░" * (width - high)


def _cells(fraction: float, width: int) -> int:
    if fraction <= 0 or fraction >= 1:
        return width if fraction >= 1 else 0
    return min(max(1, round(fraction * width)), max(1, width - 1))


def fill_tone(percent_full: float, blocked: int = 0) -> Tone:
    """How a channel does: from 50 % it is filling, from 90 % spans are refused."""
    if blocked or percent_full >= 90:
        return "bad"
    return "busy" if percent_full >= 50 else "good"


STATUS_TONES: dict[str, Tone] = {
    "ok": "good",
    "working": "good",
    "active": "good",
    "deleting": "busy",
    "closed": "good",
    "open": "bad",
    "half_open": "busy",
    "forced_open": "bad",
    "disabled": "busy",
    "degraded": "busy",
    "paused": "busy",
    "starting": "busy",
    "stopping": "busy",
    "failed": "bad",
}
"""Tones of the words that the service uses for states."""


SEVERITIES = ("critical", "high", "medium", "low", "info")
SEVERITY_TONES: dict[str, Tone] = {"critical": "bad", "high": "busy", "medium": "good"}


def status_tone(word: str) -> Tone:
    return STATUS_TONES.get(word, "quiet")


def words(name: str) -> str:
    """A name of the service as words: half_open → half open."""
    return name.replace("_", " ")
