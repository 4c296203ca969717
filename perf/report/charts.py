"""Draws curves as SVG, without a library: x logarithmic (or time), y from 0, and the allowed
band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 48, 56
DOTTED = 40  # points; longer lines are drawn without dots
COLOURS = ("#1f5fa8", "#c4561b", "#2f7d3b", "#7a3d9a")


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name and its points (x, y, minimum y, maximum y)."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


def _short(x: float) -> str:
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def _step(most: float) -> float:
    """Return the distance of marks on an axis from 0: at most eight, at round numbers."""
    step: float = 10 ** math.floor(math.log10(most)) if most > 0 else 1.0
    return next(step * f for f in (0.1, 0.2, 0.25, 0.5, 1, 2) if most / (step * f) <= 8)


def chart(
    title: str,
    x_name: str,
    y_name: str,
    series: Sequence[Series],
    band: tuple[float, float] | None = None,
    *,
    linear: bool = False,
) -> str:
    """Return an SVG document. ``band`` shades the allowed values of y. The x axis is logarithmic
    with a mark at each point, or ``linear`` from 0 with marks at round numbers."""
    xs = sorted({point[0] for s in series for point in s.points})
    if linear:
        low, high = 0.0, xs[-1]
        every = _step(high)
        xs = [i * every for i in range(int(high / every) + 1)]
    else:
        low, high = math.log10(xs[0]), math.log10(xs[-1])
    span = high - low or 1.0
    top: float = max([point[3] for s in series for point in s.points] + ([band[1]] if band else []))
    step = _step(top * 1.08)
    top = step * (math.ceil(top * 1.08 / step) or 1)

    def at_x(x: float) -> float:
        return LEFT + ((x if linear else math.log10(x)) - low) / span * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, extra: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(words)}</text>'

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 20, title, 'font-size="15" font-weight="600"'),
    ]
    if band:
        parts.append(
            f'<rect x="{LEFT}" y="{at_y(band[1]):.1f}" width="{right - LEFT}" '
            f'height="{at_y(band[0]) - at_y(band[1]):.1f}" fill="#e4f1e4"/>'
        )
    for i in range(round(top / step) + 1):
        y = at_y(i * step)
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
            + text(LEFT - 8, y + 4, _short(i * step), 'text-anchor="end"')
        )
    for x in xs:
        parts.append(
            f'<line x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{bottom}" y2="{bottom + 5}" '
            'stroke="#888888"/>' + text(at_x(x), bottom + 19, _short(x), 'text-anchor="middle"')
        )
    parts.append(text((LEFT + right) / 2, HEIGHT - 14, x_name, 'text-anchor="middle"'))
    middle = (TOP + bottom) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 16 {middle:.1f})"'
    parts.append(text(16, middle, y_name, turned))
    for i, line in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y, _, _ in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, least, most in line.points if len(line.points) <= DOTTED else ():
            parts.append(
                f'<line x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{at_y(least):.1f}" '
                f'y2="{at_y(most):.1f}" stroke="{colour}"/>'
                f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="{colour}"/>'
            )
        legend = LEFT + i * 260
        parts.append(
            f'<rect x="{legend}" y="30" width="12" height="4" fill="{colour}"/>'
            + text(legend + 18, 36, line.name)
        )
    return "\n".join([*parts, "</svg>", ""])
