"""Renders templates and serves the files that pages need: CSS, JavaScript and an icon.

Every value is escaped by Jinja; :func:`shown` makes characters visible that could hide or reorder
text.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from betrace.service.times import SECOND, read_time, short_duration, write_time

_FOLDER = Path(__file__).parent
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"} | {
    ".svg": "image/svg+xml"
}


class Templates:
    """The templates. ``clock_ns`` tells the time for "2 min ago"."""

    def __init__(self, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._clock_ns = clock_ns
        environment = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        environment.filters |= {
            "shown": shown,
            "took": took,
            "ago": self._ago,
            "utc": utc,
            "iso": _iso,
            "many": many,
        }
        environment.globals["asset"] = lambda name: f"/assets/{ASSETS.version}/{name}"
        self._environment = environment

    def render(self, name: str, values: dict[str, Any]) -> bytes:
        """A page."""
        return self._environment.get_template(name).render(values).encode("utf-8", "replace")

    def _ago(self, moment: int | str) -> str:
        seconds = (self._clock_ns() - _ns(moment)) // SECOND
        for unit, width in (("d", 86_400), ("h", 3600), ("min", 60)):
            if abs(seconds) >= width:
                return f"{seconds // width} {unit} ago" if seconds > 0 else "in the future"
        return f"{seconds} s ago" if seconds >= 1 else "just now"


def shown(text: object) -> str:
    """``text`` with control characters and invisible or bidirectional formatting escaped; line
    breaks and tabs stay."""
    return "".join(
        each
        if each.isprintable() or each in "\n\t"
        else each.encode("unicode_escape").decode("ascii")
        for each in str(text)
    )


def utc(moment: int | str) -> str:
    """A time for people, in UTC."""
    text = write_time(_ns(moment))
    return f"{text[:10]} {text[11:23]}"


def took(ns: int) -> str:
    """A duration with three digits in a unit that suits it."""
    for unit, width in (("d", 86_400), ("h", 3600), ("min", 60)):
        if ns >= 2 * width * SECOND:
            number = ns / width / SECOND
            return f"{number:.3g} {unit}" if number < 1000 else f"{int(number):,} {unit}"
    return short_duration(ns)


def many(number: int, word: str) -> str:
    """Such as ``1 span`` and ``1,200 spans``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _iso(moment: int | str) -> str:
    return write_time(_ns(moment))


def _ns(moment: int | str) -> int:
    return moment if isinstance(moment, int) else read_time(moment)


class Assets:
    """The files in ``assets``, whose addresses change with their contents."""

    def __init__(self) -> None:
        self.files = {
            path.name: (path.read_bytes(), _TYPES[path.suffix])
            for path in sorted((_FOLDER / "assets").iterdir())
            if path.suffix in _TYPES
        }
        contents = b"".join(data for data, _ in self.files.values())
        self.version = hashlib.sha256(contents).hexdigest()[:12]


ASSETS = Assets()
