"""The first panel: whether all is well, and if not, which part needs attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content

from betrace.tui.format import bar, cut, duration, millis, number, percent, plural, words
from betrace.tui.panels.details import show_stage
from betrace.tui.panels.health import HealthProblem, problems
from betrace.tui.panels.lists import show_alerts, show_undecided
from betrace.tui.panels.pipeline_diagram import draw_pipeline
from betrace.tui.panels.recent_signals import RecentSignals
from betrace.tui.state import BreakerStatus, CacheStatus, ServiceState
from betrace.tui.tones import STYLES, SYMBOLS, marked, status_tone, toned
from betrace.tui.widgets.live_text import LiveText
from betrace.tui.widgets.panel import Panel
from betrace.tui.widgets.tile import Figure, Tile
from betrace.tui.widgets.titled_box import TitledBox

NAME_WIDTH = 15


class OverviewPanel(Panel, can_focus=True):
    TITLE = "Overview"
    RELOAD = 5.0

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "Stage before", show=False),
        Binding("right,l", "move(1)", "Next stage", show=False),
        Binding("enter", "open", "Open stage"),
        Binding("i", "app.panel(5)", "Signals", tooltip="Show the signals"),
        Binding("r", "app.panel(6)", "Rules", tooltip="Show the rules"),
        Binding("f", "alerts", "Firing", tooltip="Show the alerts that fire now"),
        Binding("u", "undecided", "Undecided", tooltip="Show traces that rules could not judge"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._chosen = 0
        self._recent = RecentSignals()

    def compose(self) -> ComposeResult:
        with Horizontal(id="tiles"):
            yield Tile("Ingestion", "accepted", number, id="tile-ingestion")
            yield Tile("Signals", "signals", number, id="tile-signals")
            yield Tile("Latency p99", "end_to_end_p99", millis, id="tile-latency")
            yield Tile("Refusals", "refused", number, id="tile-refusals")
        yield LiveText(id="pipeline-drawing")
        with Horizontal(id="recent"):
            yield TitledBox("Breaking rules", id="recent-rules")
            yield TitledBox("Latest signals", id="recent-signals")
            yield TitledBox("State", id="glance-state")
        with Horizontal(id="glance"):
            yield TitledBox("Breakers", id="glance-breakers")
            yield TitledBox("Caches", id="glance-caches")

    async def load(self) -> None:
        try:
            await self._recent.read(self.betrace.client)
        finally:
            if self.betrace.frozen_at is None:
                self._show_recent()

    def _show_recent(self) -> None:
        recent = self._recent
        tenant = self.betrace.client.tenant
        of = f" of {tenant}" if tenant else ""
        rules, signals = (self.query_one(f"#recent-{n}", TitledBox) for n in ("rules", "signals"))
        rules.border_title = recent.title
        signals.border_title = Content(f"Latest signals{of}")
        rules.body.draw(recent.rules_text)
        signals.body.draw(recent.latest_text)

    def focus_first(self) -> None:
        self.screen.set_focus(self)

    def show(self, state: ServiceState) -> None:
        now = state.now
        if now is None:
            return
        self._chosen = min(self._chosen, max(0, len(now.stages) - 1))
        self._show_tiles(state)
        self._show_recent()
        self.query_one("#pipeline-drawing", LiveText).draw(
            lambda width: draw_pipeline(state, width, self._chosen)
        )
        self.query_one("#glance-breakers", TitledBox).body.draw(
            lambda width: _breakers(now.breakers, width)
        )
        self.query_one("#glance-caches", TitledBox).body.draw(
            lambda width: _lines([_cache(each, state, width) for each in now.caches])
        )
        lines = [self._problem(each) for each in problems(state)]
        self.query_one("#glance-state", TitledBox).body.draw(
            lambda _: _lines(lines or [Content.assemble(marked("all well", "good"))])
        )

    def _show_tiles(self, state: ServiceState) -> None:
        now = state.now
        assert now is not None
        accepted, signals = state.rate("accepted"), state.rate("signals")
        refused, why = state.rate("refused"), ""
        if refused:
            why = max(now.refused, key=lambda reason: now.refused[reason], default="")
        total = sum(now.refused.values())
        refusals = f"refused: {words(why)}" if refused else f"{number(total)} total"
        open_traces = f"{number(now.open_traces)} open {plural(now.open_traces, 'trace')}"
        figures = {
            "ingestion": Figure(number(accepted), "spans/s", f"{number(now.accepted)} total"),
            "signals": Figure(
                number(signals), "/s", f"{number(now.signals)}, {number(now.retracted)} retracted"
            ),
            "latency": Figure(millis(now.end_to_end_p99), "", open_traces),
            "refusals": Figure(number(refused), "spans/s", refusals, "bad" if refused else "good"),
        }
        for name, figure in figures.items():
            self.query_one(f"#tile-{name}", Tile).show(state, figure)

    def _problem(self, problem: HealthProblem) -> Content:
        """A line of the state, with the key of the panel that shows more. A click opens it."""
        key = self.betrace.panel_numbers.get(problem.panel, 1)
        link = Content.from_markup(f"[@click=app.panel({key})]$text[/]", text=problem.text)
        return Content.assemble(
            (f"{SYMBOLS[problem.tone]} ", STYLES[problem.tone]),
            link,
            toned(f"  → {key}", "quiet"),
        )

    def action_move(self, by: int) -> None:
        now = self.betrace.state.now
        if now is not None and now.stages:
            self._chosen = (self._chosen + by) % len(now.stages)
            self.show(self.betrace.state)

    def action_alerts(self) -> None:
        show_alerts(self.betrace)

    def action_undecided(self) -> None:
        show_undecided(self.betrace)

    def action_open(self) -> None:
        now = self.betrace.state.now
        if now is not None and now.stages:
            show_stage(self.betrace, now.stages[self._chosen].name)


def _lines(lines: list[Content]) -> Content:
    return Content("\n").join(lines) if lines else Content.assemble(toned("none", "quiet"))


def _breakers(breakers: Sequence[BreakerStatus], width: int) -> Content:
    texts = [
        words(each.state) + (f" {duration(each.retry_in)}" if each.retry_in else "")
        for each in breakers
    ]
    length = min(NAME_WIDTH, width - 3 - max(map(len, texts), default=0))
    return _lines(
        [
            Content.assemble(
                f"{cut(each.name, length):<{length}}", " ", marked(text, status_tone(each.state))
            )
            for each, text in zip(breakers, texts, strict=True)
        ]
    )


def _cache(cache: CacheStatus, state: ServiceState, width: int) -> Content:
    rate = state.rate(f"{cache.name}.hit_rate")
    asked = cache.hits + cache.misses
    shown = percent((cache.hit_rate if rate is None else rate) if asked else None)
    fill = cache.size / cache.capacity if cache.capacity else 0.0
    length = min(NAME_WIDTH, width - 7)
    space = max(0, width - length - 8)
    return Content.assemble(
        f"{cut(cache.name, length):<{length}}",
        f"{shown:>7}",
        f" {bar(fill, space)}" if space >= 4 else "",
    )
