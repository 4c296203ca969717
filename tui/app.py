"""The admin TUI: panels over the service's HTTP interface."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, ClassVar

from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.color import Color, ColorParseError
from textual.events import Resize
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import ContentSwitcher, Footer, Input
from textual.worker import Worker

from betrace.tui.client import Client, ClientError, Json
from betrace.tui.connection import Connection, Link
from betrace.tui.panels import PANELS
from betrace.tui.state import State, parse
from betrace.tui.widgets.bars import NavBar, StatusBar
from betrace.tui.widgets.basic import Detail
from betrace.tui.widgets.changes import PREFIX, Change, Confirm
from betrace.tui.widgets.help import Help, TooSmall, bindings_of
from betrace.tui.widgets.panel import Panel
from betrace.tui.widgets.text import Tone

UNREACHABLE = 3
MIN_WIDTH, MIN_HEIGHT = 80, 24
WIDE = 100
"""Columns from which the keys at the bottom are set apart."""

_COLOURS: dict[Tone, str] = {"good": "success", "busy": "warning", "bad": "error"}


class BetraceApp(App[int]):
    """The application.

    Args:
      client: what to speak to the service with; its owner closes it.
      read_only: whether changes are disabled.
      first: a snapshot that was read already.
      clock: seconds since 1970.
    """

    CSS_PATH = "betrace.tcss"
    TITLE = "BeTrace"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (36, "-tall")]  # noqa: RUF012
    ENABLE_COMMAND_PALETTE = True

    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"panel({number})", panel.TITLE, show=False)
            for number, panel in enumerate(PANELS, 1)
        ),
        Binding("slash", "filter", "Filter", tooltip="Show rows that contain a text; ! inverts"),
        Binding("p", "freeze", "Freeze", show=False, tooltip="Freeze the view, or let it go on"),
        Binding("space", "refresh", "Refresh", show=False, tooltip="Read the state now"),
        Binding("t", "next_theme", "Next theme", show=False),
        Binding("question_mark", "help", "Help"),
        Binding("escape", "unfilter", "Drop filter", show=False),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(
        self,
        client: Client,
        read_only: bool = False,
        first: Json | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self.client = client
        self.read_only = read_only
        self.clock = clock
        self.state = State()
        self.frozen_at: float | None = None
        self.connection = Connection(client, self._linked, self._received, clock)
        if first is not None:
            self.state.update(parse(first, clock()))

    def compose(self) -> ComposeResult:
        yield StatusBar()
        yield NavBar([(panel.TITLE, panel.SHORT or panel.TITLE) for panel in PANELS])
        with ContentSwitcher(initial=PANELS[0].__name__):
            for panel in PANELS:
                widget = panel()
                widget.id = panel.__name__
                yield widget
        yield Input(id="filter", placeholder="text to find; !text for what lacks it")
        yield Footer(show_command_palette=True)

    def on_mount(self) -> None:
        self.query_one("#filter").display = False
        self.theme_changed_signal.subscribe(self, self._restyle)
        self.set_interval(1.0, self._show_bars)
        self.start(self.connection.run, "connection")
        self.action_panel(1)

    def start(self, work: Callable[[], Coroutine[Any, Any, None]], group: str) -> None:
        """Run an async function as a task, in place of another of its group."""
        _: Worker[None] = self.run_worker(work, group=group, exclusive=True)

    # Panels

    @property
    def panel(self) -> Panel:
        """The visible panel."""
        shown = self._main.query_one(ContentSwitcher).visible_content
        assert isinstance(shown, Panel)
        return shown

    @property
    def _main(self) -> Screen[object]:
        return self.screen_stack[0]

    def action_panel(self, number: int) -> None:
        """Show the panel of a number key."""
        self._end_filter()
        self._main.query_one(ContentSwitcher).current = PANELS[number - 1].__name__
        panel = self.panel
        self._main.query_one(NavBar).choose(number - 1)
        self._show_filter()
        panel.show(self.state)
        panel.focus_first()
        self.load(panel)

    def show_panel(self, name: str) -> None:
        """Show the panel of a class of this name."""
        self.action_panel([panel.__name__ for panel in PANELS].index(name) + 1)

    def load(self, panel: Panel | None = None) -> None:
        """Have a panel (the visible one) read what it shows besides the state."""
        self.start(partial(self._load, panel or self.panel), "load")

    async def _load(self, panel: Panel, by_itself: bool = False) -> None:
        panel.loaded_at = math.inf
        try:
            await panel.load()
        except ClientError as error:
            if self.connection.link.status != "lost" and not by_itself:
                self._toast_error(error)
        finally:
            panel.loaded_at = self.clock()

    def _load_again(self) -> None:
        """Have the visible panel read again what it reads now and then."""
        panel = self.panel
        if panel.RELOAD and self.clock() - panel.loaded_at >= panel.RELOAD:
            self.start(partial(self._load, panel, by_itself=True), "load")

    def view_tenant(self, tenant: str) -> None:
        """Look at this tenant's signals, traces and rules from now on."""
        self.client.view(tenant)
        self._show_bars()
        self.load()

    # What the connection tells

    def _linked(self, link: Link) -> None:
        self.state.stale = link.status != "connected"
        if not self._up:
            return
        self._main.set_class(self.state.stale, "-stale")
        self._show_bars()
        if self.frozen_at is None:
            self._show()
        if link.status == "connected":
            self.load()

    def _received(self, data: Json) -> None:
        self.state.update(parse(data, self.clock()))
        if self.frozen_at is None and self._up:
            self._show()
            self._load_again()

    @property
    def _up(self) -> bool:
        """Whether there is something to show things on: not while the application ends."""
        return self.is_running

    def _show(self) -> None:
        self.panel.show(self.state)
        if isinstance(self.screen, Detail):
            self.screen.show(self.state)

    def _show_bars(self) -> None:
        if self._up:
            self._main.query_one(StatusBar).show(self)

    def _restyle(self, _: Theme) -> None:
        for panel in self._main.query(Panel):
            panel.restyle()
        self._show()

    def style(self, tone: Tone) -> str:
        """A tone as a style of Rich, in the colours of the theme."""
        if tone == "quiet":
            return "dim"
        return self.colour(_COLOURS[tone])

    def colour(self, variable: str) -> str:
        """A colour of the theme as a style of Rich; empty where it has none."""
        try:
            return Color.parse(self.theme_variables[variable]).rich_color.name
        except (ColorParseError, KeyError):
            return ""

    # Keys

    def action_freeze(self) -> None:
        self.frozen_at = self.clock() if self.frozen_at is None else None
        self._show_bars()
        if self.frozen_at is None:
            self._show()

    async def action_refresh(self) -> None:
        try:
            await self.connection.refresh()
        except ClientError as error:
            self._toast_error(error)
            return
        self._show()
        self.load()

    def action_next_theme(self) -> None:
        names = sorted(self.available_themes)
        self.theme = names[(names.index(self.theme) + 1) % len(names)]
        self.notify(self.theme, title="Theme", timeout=2)

    def action_help(self) -> None:
        self.push_screen(Help(self.panel))

    def action_filter(self) -> None:
        if self.panel.FILTERS:
            entry = self.query_one("#filter", Input)
            entry.value = self.panel.filter_text
            entry.display = True
            entry.focus()

    def action_unfilter(self) -> None:
        """End typing a filter, else drop the filter."""
        if self._end_filter():
            self.panel.focus_first()
        self._filter("")

    def _end_filter(self) -> bool:
        entry = self._main.query_one("#filter", Input)
        shown, entry.display = entry.display, False
        return bool(shown)

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.id == "filter" and event.input.display:
            self._filter(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.input.id == "filter":
            self._end_filter()
            self.panel.focus_first()

    def _filter(self, text: str) -> None:
        if self.panel.filter_text != text:
            self.panel.filter_text = text
            self.panel.filter_changed()
        self._show_filter()

    def _show_filter(self) -> None:
        self._main.query_one(NavBar).filter(self.panel.filter_text)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """No filter where there is nothing to filter."""
        return self.panel.FILTERS if action == "filter" and self.screen is self._main else True

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: every action there is, and the themes."""
        yield SystemCommand("Theme", "Choose a theme", self.action_change_theme)
        for binding in bindings_of(self):
            yield SystemCommand(
                binding.description,
                f"{binding.tooltip or 'Show the panel'}  ({self.get_key_display(binding)})",
                lambda action=binding.action: self.run_action(action),
            )
        for number, panel in enumerate(self._main.query(Panel), 1):
            for binding in bindings_of(panel):
                if self.read_only and binding.action.startswith(PREFIX):
                    continue
                yield SystemCommand(
                    f"{panel.TITLE}: {binding.description}",
                    f"{binding.tooltip or binding.description}  ({self.get_key_display(binding)})",
                    lambda n=number, p=panel, a=binding.action: self._do_in(n, p, a),
                )

    async def _do_in(self, number: int, panel: Panel, action: str) -> None:
        if panel is not self.panel:
            self.action_panel(number)
        await self.run_action(action, panel)

    # Changes

    def change(self, change: Change) -> None:
        """Ask whether a change is meant, do it, and tell how it went."""
        if self.read_only:
            self.notify("this TUI was started with --read-only", title="✖ not done")
            return
        self.start(partial(self._change, change), "change")

    async def _change(self, change: Change) -> None:
        if not await self.push_screen_wait(Confirm(change)):
            return
        try:
            told = await change.run()
        except ClientError as error:
            self._toast_error(error)
            return
        self.notify(told, title="✔ done", markup=False)
        await self.action_refresh()

    def telling(
        self, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        """The same function, whose :exc:`ClientError` becomes a toast."""

        async def told() -> None:
            try:
                await work()
            except ClientError as error:
                self._toast_error(error)

        return told

    def _toast_error(self, error: ClientError) -> None:
        self.notify(str(error), title=f"✖ {error.kind}", severity="error", timeout=10, markup=False)

    # The window

    def on_resize(self, event: Resize) -> None:
        small = event.size.width < MIN_WIDTH or event.size.height < MIN_HEIGHT
        if small and not isinstance(self.screen, TooSmall):
            self.push_screen(TooSmall(MIN_WIDTH, MIN_HEIGHT))
        elif not small and isinstance(self.screen, TooSmall):
            self.pop_screen()
        self._main.query_one(Footer).compact = event.size.width < WIDE


def run(
    url: str, token: str | None = None, tenant: str | None = None, read_only: bool = False
) -> int:
    """Run the TUI in this terminal until it is left; the exit code."""
    return asyncio.run(_run(url, token, tenant, read_only))


async def _run(url: str, token: str | None, tenant: str | None, read_only: bool) -> int:
    try:
        async with Client(url, token, tenant) as client:
            first = await client.snapshot()
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise ClientError("refused", "the TUI needs a terminal; use the API in scripts")
            await BetraceApp(client, read_only, first).run_async()
            return 0
    except ClientError as error:
        print(f"betrace: {error}; {_remedy(error)}", file=sys.stderr)
        return UNREACHABLE


def _remedy(error: ClientError) -> str:
    if error.status in (401, 403):
        return "give the operator token with --token or BETRACE_TOKEN"
    if error.kind in ("unreachable", "timed out"):
        return "start it with `betrace serve`, or name its API with --url"
    return "see `betrace tui --help`"
