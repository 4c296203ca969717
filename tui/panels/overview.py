"""The first panel: is all well, and if not, where does it stick?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content

from betrace.tui.panels.details import show_stage
from betrace.tui.panels.drawing import draw_pipeline
from betrace.tui.panels.problems import problems
from betrace.tui.state import Breaker, Cache, State
from betrace.tui.widgets.basic import Live, Section, Tile, marked, toned
from betrace.tui.widgets.panel import Panel
from betrace.tui.widgets.text import (
    bar,
    duration,
    millis,
    number,
    percent,
    plural,
    status_tone,
    words,
)

NAME_WIDTH = 15


class Overview(Panel, can_focus=True):
    TITLE = "Overview"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "Stage before", show=False),
        Binding("right,l", "move(1)", "Next stage", show=False),
        Binding("enter", "open", "Open stage"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._chosen = 0

    def compose(self) -> ComposeResult:
        with Horizontal(id="tiles"):
            yield Tile("Ingestion", id="tile-ingestion")
            yield Tile("Signals", id="tile-signals")
            yield Tile("Latency p99", id="tile-latency")
            yield Tile("Refusals", id="tile-refusals")
        yield Live(id="pipeline-drawing")
        with Horizontal(id="glance"):
            yield Section("Breakers", id="glance-breakers")
            yield Section("Caches", id="glance-caches")
            yield Section("State", id="glance-state")

    def focus_first(self) -> None:
        self.screen.set_focus(self)

    def show(self, state: State) -> None:
        now = state.now
        if now is None:
            return
        self._chosen = min(self._chosen, max(0, len(now.stages) - 1))
        self._show_tiles(state)
        self.query_one("#pipeline-drawing", Live).draw(
            lambda width: draw_pipeline(state, width, self._chosen)
        )
        self.query_one("#glance-breakers", Section).body.draw(
            lambda width: _breakers(now.breakers, width)
        )
        self.query_one("#glance-caches", Section).body.draw(
            lambda width: _lines([_cache(each, state, width) for each in now.caches])
        )
        found = problems(state)
        lines = [Content.assemble(marked(text, tone)) for tone, text in found]
        self.query_one("#glance-state", Section).body.draw(
            lambda _: _lines(lines or [Content.assemble(marked("all well", "good"))])
        )

    def _show_tiles(self, state: State) -> None:
        now = state.now
        assert now is not None
        accepted, signals = state.rate("accepted"), state.rate("signals")
        refused, why = state.rate("refused"), ""
        if refused:
            why = max(now.refused, key=lambda reason: now.refused[reason], default="")
        total = sum(now.refused.values())
        self.query_one("#tile-ingestion", Tile).show(
            number(accepted),
            "spans/s",
            f"{number(now.accepted)} in all",
            "good",
            state.history("accepted"),
        )
        self.query_one("#tile-signals", Tile).show(
            number(signals),
            "/s",
            f"{number(now.signals)}, {number(now.retracted)} retracted",
            "good",
            state.history("signals"),
        )
        self.query_one("#tile-latency", Tile).show(
            millis(now.end_to_end_p99),
            "",
            f"{number(now.open_traces)} open {plural(now.open_traces, 'trace')}",
            "good",
            state.history("end_to_end_p99"),
        )
        self.query_one("#tile-refusals", Tile).show(
            number(refused),
            "spans/s",
            f"refused: {words(why)}" if refused else f"{number(total)} in all",
            "bad" if refused else "good",
            state.history("refused"),
        )

    def action_move(self, by: int) -> None:
        now = self.betrace.state.now
        if now is not None and now.stages:
            self._chosen = (self._chosen + by) % len(now.stages)
            self.show(self.betrace.state)

    def action_open(self) -> None:
        now = self.betrace.state.now
        if now is not None and now.stages:
            show_stage(self.betrace, now.stages[self._chosen].name)


def _lines(lines: list[Content]) -> Content:
    return Content("\n").join(lines) if lines else Content.assemble(toned("none", "quiet"))


def _breakers(breakers: Sequence[Breaker], width: int) -> Content:
    said = [
        words(each.state) + (f" {duration(each.retry_in)}" if each.retry_in else "")
        for each in breakers
    ]
    room = min(NAME_WIDTH, width - 3 - max(map(len, said), default=0))
    return _lines(
        [
            Content.assemble(_cut(each.name, room), " ", marked(text, status_tone(each.state)))
            for each, text in zip(breakers, said, strict=True)
        ]
    )


def _cache(cache: Cache, state: State, width: int) -> Content:
    rate = state.rate(f"{cache.name}.hit_rate")
    asked = cache.hits + cache.misses
    shown = percent((cache.hit_rate if rate is None else rate) if asked else None)
    fill = cache.size / cache.capacity if cache.capacity else 0.0
    room = min(NAME_WIDTH, width - 7)
    space = max(0, width - room - 8)
    return Content.assemble(
        _cut(cache.name, room),
        f"{shown:>7}",
        f" {bar(fill, space)}" if space >= 4 else "",
    )


def _cut(text: str, width: int) -> str:
    """Text of exactly so many characters."""
    return f"{text:<{width}}" if len(text) <= width else text[: max(0, width - 1)] + "…"
