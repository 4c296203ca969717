"""Draws rows of the dashboard as SVG, with the data of a running Prometheus and without Grafana.

``python -m grafana.picture --url http://127.0.0.1:9091 --rows Rules > docs/dashboard.svg``. The
places, titles, queries and thresholds are those of the dashboard; the style is only similar.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from html import escape
from typing import Any

from grafana.generate import HEIGHT, ROWS, SMALL_HEIGHT
from grafana.panel import Panel

WIDTH = 1200
COLUMN = WIDTH // 24
UNIT = 30  # pixels of a step of height
STEPS = 120  # points of a line
COLOURS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0")
NAMED = {"green": "#3d8b40", "yellow": "#c9a227", "red": "#b23b3b"}


@dataclass(frozen=True, slots=True)
class Line:
    """A series: its legend and its points (seconds since 1970, value)."""

    name: str
    points: list[tuple[float, float]]


def fetch(url: str, panel: Panel, minutes: float, now: float) -> list[Line]:
    """The series of a panel."""
    found = []
    for query in panel.queries:
        expr = query.expr.replace("$on", 'job=~".+"').replace("$__rate_interval", "1m")
        asked = {
            "query": expr,
            "start": now - 60 * minutes,
            "end": now,
            "step": 60 * minutes / STEPS,
        }
        address = f"{url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            data: dict[str, Any] = json.load(answer)
        for series in data["data"]["result"]:
            labels = series["metric"]
            name = re.sub(r"\{\{(\w+)\}\}", lambda m, own=labels: own.get(m[1], ""), query.legend)
            points = [(float(at), float(value)) for at, value in series["values"]]
            found.append(Line(name.strip(), [p for p in points if math.isfinite(p[1])]))
    return [line for line in found if line.points]


def shown(value: float, unit: str) -> str:
    """A value with its unit, short."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{'B' if unit in ('bytes', 'Bps') else ''}"
    suffix = {"cps": "/s", "reqps": "/s", "ops": "/s", "bytes": " B", "Bps": " B/s"}
    return f"{value:.3g}{suffix.get(unit, '')}"


def text(x: float, y: float, size: int, words: str, more: str = "") -> str:
    """A text element."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" {more}>{escape(words)}</text>'


def stat(panel: Panel, lines: list[Line], width: int, height: int) -> list[str]:
    """The last value, large, on the colour of its threshold."""
    value = lines[0].points[-1][1] if lines else None
    colour = panel.base
    for least, name in panel.thresholds:
        if value is not None and value >= least:
            colour = name
    fill = NAMED.get(colour, "#22252b") if panel.thresholds else "#22252b"
    words = "–" if value is None else shown(value, panel.unit)
    middle = 'text-anchor="middle" fill="#fff" font-weight="bold"'
    return [
        f'<rect x="4" y="26" width="{width - 8}" height="{height - 30}" fill="{fill}" rx="3"/>',
        text(width / 2, 26 + (height - 30) / 2 + 10, 30, words, middle),
    ]


def graph(panel: Panel, lines: list[Line], width: int, height: int, span: range) -> list[str]:
    """Lines over time, with a legend."""
    left, top, bottom = 56, 34, height - 46
    most = max([v for line in lines for _, v in line.points], default=1.0)
    most = 1.08 * (max(most, panel.most or 0) or 1.0)
    drawn = []
    for part in range(5):
        y = bottom - (bottom - top) * part / 4
        drawn.append(f'<path d="M{left} {y:.1f}H{width - 10}" stroke="#2c3036"/>')
        label = shown(most * part / 4, panel.unit)
        drawn.append(text(left - 6, y + 4, 10, label, 'text-anchor="end" fill="#9fa7b3"'))
    for number, line in enumerate(lines[:10]):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{left + (at - span.start) / len(span) * (width - left - 10):.1f},"
            f"{bottom - (bottom - top) * value / most:.1f}"
            for at, value in line.points
        )
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        columns = max((width - left) // 190, 1)
        x = left + number % columns * (width - left) / columns
        y = height - 30 + number // columns * 13
        if number < 2 * columns:
            drawn.append(f'<rect x="{x:.0f}" y="{y - 6}" width="10" height="3" fill="{colour}"/>')
            name = f"{line.name[:24]}  {shown(line.points[-1][1], panel.unit)}"
            drawn.append(text(x + 14, y, 10, name, 'fill="#c7ccd3"'))
    if not lines:
        middle = 'text-anchor="middle" fill="#9fa7b3"'
        drawn.append(text(width / 2, (top + bottom) / 2, 12, "No data", middle))
    return drawn


def picture(url: str, rows: list[str], minutes: float) -> str:
    """The SVG of these rows."""
    now = time.time()
    span = range(int(now - 60 * minutes), int(now))
    parts: list[str] = []
    y = 0
    for title, panels in ROWS:
        if title not in rows:
            continue
        parts.append(text(8, y + 22, 15, title, 'fill="#d8dce2" font-weight="bold"'))
        y, x, tallest = y + 32, 0, 0
        for panel in panels:
            width = COLUMN * panel.width
            height = UNIT * (SMALL_HEIGHT if panel.kind == "stat" else HEIGHT)
            if x + width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            lines = fetch(url, panel, minutes, now)
            draw = (
                stat(panel, lines, width, height)
                if panel.kind == "stat"
                else graph(panel, lines, width, height, span)
            )
            frame = f'<rect x="2" y="2" width="{width - 4}" height="{height - 4}" rx="3"'
            parts.append(f'<g transform="translate({x} {y})">{frame} fill="#181b1f"/>')
            parts.append(text(10, 19, 12, panel.title, 'fill="#d8dce2"'))
            parts += [*draw, "</g>"]
            x, tallest = x + width, max(tallest, height)
        y += tallest + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'height="{y}" font-family="Inter, Helvetica, Arial, sans-serif">'
        f'<rect width="{WIDTH}" height="{y}" fill="#111217"/>' + "\n".join(parts) + "</svg>\n"
    )


def main() -> None:
    """Print the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:9091", help="of Prometheus")
    parser.add_argument("--rows", nargs="+", default=["At a glance", "Rules"])
    parser.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    sys.stdout.write(picture(given.url, given.rows, given.minutes))


if __name__ == "__main__":
    main()
