"""A figure with its recent history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content

from betrace.tui.format import condense, duration, plot_lines
from betrace.tui.state import ServiceState
from betrace.tui.tones import STYLES, Tone, toned
from betrace.tui.widgets.live_text import LiveText

PERIOD = 60
"""Seconds that a graph shows at least."""

_LABEL = 10
"""Columns for the label."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What a tile shows."""

    value: str
    unit: str
    note: str
    tone: Tone = "good"
    """``note`` says the same in words."""


class Tile(Vertical):
    """A title with the period of the graph; a value; the graph with its maximum; and a note.

    The graph has one column for each second if they fit, but shows at least the last `PERIOD`
    seconds. A short history is not stretched.

    Args:
      history: the name of the history in :class:`ServiceState`.
      show_value: formats the maximum.
    """

    def __init__(
        self, title: str, history: str, show_value: Callable[[float], str], *, id: str
    ) -> None:
        super().__init__(id=id, classes="tile")
        self._title = title
        self._history = history
        self._show_value = show_value

    def compose(self) -> ComposeResult:
        for part in ("title", "value", "graph", "note"):
            yield LiveText(classes=f"tile-{part}")

    def show(self, state: ServiceState, figure: Figure) -> None:
        tone = figure.tone
        style = "bold" if tone in ("good", "quiet") else f"bold {STYLES[tone]}"
        self._part("value").text((figure.value, style), f" {figure.unit}")
        self._part("note").text(toned(figure.note, "quiet" if tone == "good" else tone))
        self._part("title").draw(lambda width: self._heading(state, width))
        self._part("graph").draw(lambda width: self._graph(state, width))

    def _part(self, name: str) -> LiveText:
        return self.query_one(f".tile-{name}", LiveText)

    def _points(self, state: ServiceState, width: int) -> tuple[list[float], str]:
        """The points of the graph, and the label with their maximum."""
        points = state.history(self._history, max(PERIOD, width - _LABEL))
        return points, f" max {self._show_value(max(points))}" if points else ""

    def _heading(self, state: ServiceState, width: int) -> Content:
        points, _ = self._points(state, width)
        seconds = duration(round(state.period(self._history, len(points)))) if points else ""
        period = f"last {seconds}" if seconds else ""
        if len(self._title) + len(period) + 1 > width:
            period = seconds
        if len(self._title) + len(period) + 1 > width:
            period = ""
        space = max(0, width - len(self._title) - len(period))
        return Content.assemble(toned(f"{self._title}{' ' * space}{period}", "quiet"))

    def _graph(self, state: ServiceState, width: int) -> Content:
        points, label = self._points(state, width)
        if not points:
            return Content("")
        room = max(1, width - len(label))
        columns = condense(points, room)
        lines = plot_lines(columns, self._part("graph").content_size.height)
        shown = [Content.assemble((f"{line:>{room}}", "$primary")) for line in lines]
        shown[0] = Content.assemble(shown[0], toned(label, "quiet"))
        return Content("\n").join(shown)
