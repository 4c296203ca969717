"""Pictures are well-formed SVG whose lines stay within the axes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from perf.report.charts import BOTTOM, DOTTED, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(picture: str) -> list[list[tuple[float, float]]]:
    """The points of each line, in pixels."""
    lines = ElementTree.fromstring(picture).iter(f"{SVG}polyline")
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", line.attrib["points"])]
        for line in lines
    ]


def words(picture: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_a_logarithmic_axis_has_equidistant_decades_and_marks_each_point() -> None:
    line = Series("fold", [(10.0**i, 1.0, 0.9, 1.1) for i in range(1, 5)])
    picture = chart("Cost <&>", "spans", "ratio", [line], (0.8, 1.2))
    ((first, *rest),) = drawn(picture)
    gaps = [b[0] - a[0] for a, b in zip([first, *rest], rest, strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2)
    assert (first[0], rest[-1][0]) == (LEFT, WIDTH - RIGHT)
    assert {"Cost <&>", "spans", "ratio", "fold", "10", "1 k", "10 k"} <= set(words(picture))


def test_a_time_axis_starts_at_zero_with_few_marks() -> None:
    line = Series("MB", [(i + 0.5, 400.0, 400.0, 400.0) for i in range(300)])
    picture = chart("Soak", "seconds", "MB", [line], linear=True)
    ((first, *_, last),) = drawn(picture)
    assert first[0] == pytest.approx(LEFT + 0.5 / 299.5 * (WIDTH - LEFT - RIGHT), abs=0.1)
    assert last[0] == WIDTH - RIGHT
    marks = [word for word in words(picture) if word in {"0", "50", "100", "200", "250"}]
    assert marks == ["0", "100", "200", "0", "50", "100", "200", "250"]  # of MB, of seconds
    assert not list(ElementTree.fromstring(picture).iter(f"{SVG}circle"))  # more than DOTTED


@pytest.mark.parametrize("most", [0.0, 0.003, 0.9, 1.0, 7.4, 8.0, 999.0, 50_000.0, 1e9])
@pytest.mark.parametrize("linear", [False, True])
def test_everything_is_within_the_axes(most: float, linear: bool) -> None:
    points = [(float(x), most * x / 5, most * x / 6, most * x / 4) for x in (1, 2, 4)]
    picture = chart("t", "x", "y", [Series("a", points), Series("b", points[:1])], linear=linear)
    for line in drawn(picture):
        for x, y in line:
            assert LEFT <= x <= WIDTH - RIGHT
            assert TOP <= y <= HEIGHT - BOTTOM


def test_few_points_have_dots() -> None:
    points = [(float(x), 1.0, 1.0, 1.0) for x in range(1, DOTTED + 1)]
    picture = chart("t", "x", "y", [Series("a", points)], linear=True)
    assert len(list(ElementTree.fromstring(picture).iter(f"{SVG}circle"))) == DOTTED
