"""Numbers, times and sizes as short text."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import datetime

NONE = "–"
"""Shown where there is no value."""

_UNITS = ("", "k", "M", "G", "T")
_BLOCKS = " ▁▂▃▄▅▆▇█"


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
    """A noun in the form that follows a count: tenant, tenants, entries."""
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
    """Milliseconds in a suitable unit: 12 µs, 3.4 ms, 120 ms, 2.5 s."""
    if value is None or not math.isfinite(value):
        return NONE
    if value < 0.9995:
        return f"{value * 1000:.0f} µs"
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
    """The local time of day of a time in seconds since 1970."""
    return NONE if at is None else time.strftime("%H:%M:%S", time.localtime(at))


def short_date(at: float | None) -> str:
    """Month, day and local time: 11-14 22:13:25."""
    return NONE if at is None else time.strftime("%m-%d %H:%M:%S", time.localtime(at))


def date(at: float | None) -> str:
    """A date and its local time: 2023-11-14 22:13:25."""
    return NONE if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def moment(text: object) -> float | None:
    """An RFC 3339 time of the service in seconds since 1970."""
    try:
        return datetime.fromisoformat(f"{str(text)[:19]}+00:00").timestamp()
    except ValueError:
        return None


def ago(at: float | None, now: float) -> str:
    """How long ago a time was, to the second."""
    return "never" if at is None else f"{duration(now - at)} ago" if now - at >= 1 else "now"


def age(at: float | None, now: float) -> str:
    """The same in one unit: never, now, 42 s, 5 min, 2 h."""
    return ago(at, now) if at is None or now - at < 1 else " ".join(duration(now - at).split()[:2])


def words(name: str) -> str:
    """An identifier of the service as words: half_open → half open."""
    return name.replace("_", " ")


def cut(text: str, width: int) -> str:
    """Text of at most ``width`` characters; an ellipsis replaces what is cut off."""
    if len(text) <= width:
        return text
    return text[:width] if width <= 1 else f"{text[: width - 1]}…"


def bar(fraction: float, width: int, peak: float = 0.0) -> str:
    """A bar of ``width`` characters, with a lighter shade up to ``peak``. A bar above zero has at
    least one full character, and a bar below one has at least one that is not full."""
    full = _cells(fraction, width)
    high = max(full, _cells(peak, width))
    return "█" * full + "▒" * (high - full) + "░" * (width - high)


def _cells(fraction: float, width: int) -> int:
    if fraction <= 0 or fraction >= 1:
        return width if fraction >= 1 else 0
    return min(max(1, round(fraction * width)), max(1, width - 1))


def plot(points: Sequence[float], width: int, top: float | None = None) -> str:
    """A line of blocks, one for each point, the last point last. ``top`` is a full block; without
    it the largest point is."""
    points = points[-max(1, width) :]
    most = top if top is not None else max(points, default=0.0)
    steps = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[min(steps, max(1 if value > 0 else 0, round(value / most * steps)))]
        if most > 0
        else _BLOCKS[0]
        for value in points
    )


def condense(points: Sequence[float], width: int) -> list[float]:
    """At most ``width`` points: each is the maximum of the same number of consecutive points,
    except the first, which may have fewer."""
    group = max(1, math.ceil(len(points) / max(1, width)))
    first = len(points) % group
    starts = range(first, len(points), group)
    found = [max(points[:first])] if first else []
    return found + [max(points[at : at + group]) for at in starts]


def plot_lines(points: Sequence[float], height: int) -> list[str]:
    """A graph of ``height`` lines, top line first. The largest point is full."""
    most = max(points, default=0.0)
    steps = len(_BLOCKS) - 1
    total = max(1, height) * steps
    levels = [
        max(1, round(value / most * total)) if most > 0 and value > 0 else 0 for value in points
    ]
    return [
        "".join(_BLOCKS[min(steps, max(0, level - base))] for level in levels)
        for base in range(total - steps, -1, -steps)
    ]
