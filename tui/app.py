"""The admin TUI: panels that show and operate a service over its HTTP API."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import ContentSwitcher, Input

from betrace.tui.base import BaseApp, MakeChange, ShowPanel, ViewTenant
from betrace.tui.changes import PREFIX, OperatorChange
from betrace.tui.client import ApiClient, ClientError
from betrace.tui.connection import Link, ServiceConnection
from betrace.tui.json_values import Json
from betrace.tui.panels import OF_CLUSTERS, PANELS
from betrace.tui.panels.health import badges
from betrace.tui.state import parse
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.dialogs import Confirm
from betrace.tui.widgets.help import Help, bindings_of
from betrace.tui.widgets.key_bar import WIDE, KeyBar
from betrace.tui.widgets.nav_bar import NavBar
from betrace.tui.widgets.panel import Panel
from betrace.tui.widgets.status_bar import StatusBar
from betrace.tui.widgets.too_small import TooSmall

UNREACHABLE = 3
MIN_WIDTH, MIN_HEIGHT = 80, 24


class BetraceApp(BaseApp):
    """The application.

    Args:
      client: sends the requests; its owner closes it.
      read_only: disables changes.
      first: a snapshot to begin with.
      clock: returns seconds since 1970.
      cluster: whether the service is part of a cluster, which has panels of its own.
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
        Binding("p", "freeze", "Freeze", show=False, tooltip="Freeze or unfreeze the view"),
        Binding("space", "refresh", "Refresh", show=False, tooltip="Read the state now"),
        Binding("t", "next_theme", "Next theme", show=False),
        Binding("question_mark", "help", "Help"),
        Binding("escape", "unfilter", "Drop filter", show=False),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(
        self,
        client: ApiClient,
        read_only: bool = False,
        first: Json | None = None,
        clock: Callable[[], float] = time.time,
        cluster: bool = False,
    ) -> None:
        super().__init__(client, read_only, clock)
        self._kinds = (*PANELS, *OF_CLUSTERS) if cluster else PANELS
        self.panel_numbers = {panel.__name__: n for n, panel in enumerate(self._kinds, 1)}
        if cluster:
            for number, panel in enumerate(OF_CLUSTERS, len(PANELS) + 1):
                self.bind(str(number % 10), f"panel({number})", description=panel.TITLE, show=False)
        self._panels: list[Panel] = []
        """All panels. Each is mounted when it is first shown."""
        self._number = 1
        self.connection = ServiceConnection(client, self._linked, self._received, clock)
        if first is not None:
            self.state.update(parse(first, clock()))

    def compose(self) -> ComposeResult:
        yield StatusBar()
        yield NavBar([(panel.TITLE, panel.SHORT or panel.TITLE) for panel in self._kinds])
        self._panels = [panel() for panel in self._kinds]
        for panel in self._panels:
            panel.id = type(panel).__name__
        with ContentSwitcher(initial=self._panels[0].id):
            yield self._panels[0]
        yield Input(id="filter", placeholder="text to find; !text excludes")
        yield KeyBar()

    async def on_mount(self) -> None:
        self.query_one("#filter").display = False
        self.theme_changed_signal.subscribe(self, self._restyle)
        self.set_interval(1.0, self._show_bars)
        self.start(self.connection.run, "connection")
        await self.action_panel(1)

    # Panels

    @property
    def panel(self) -> Panel:
        """The visible panel."""
        return self._panels[self._number - 1]

    @property
    def _main(self) -> Screen[object]:
        return self.screen_stack[0]

    async def action_panel(self, number: int) -> None:
        """Show the panel of a number key."""
        self._end_filter()
        panel = self._panels[number - 1]
        switcher = self._main.query_one(ContentSwitcher)
        if not panel.is_attached:
            await switcher.add_content(panel)
        switcher.current = panel.id
        self._number = number
        self._main.query_one(NavBar).choose(number - 1)
        self._show_filter()
        panel.show(self.state)
        panel.focus_first()
        self.reload()

    async def on_show_panel(self, message: ShowPanel) -> None:
        while len(self.screen_stack) > 1:
            await self.pop_screen()
        await self.action_panel(self.panel_numbers[message.name])
        if message.row is not None:
            self.panel.choose(message.row)

    def on_reload_panel(self) -> None:
        self.reload()

    def reload(self) -> None:
        """Make the visible panel read its own data again."""
        self.start(partial(self._load, self.panel), "load")

    async def _load(self, panel: Panel, by_itself: bool = False) -> None:
        panel.loaded_at = math.inf
        try:
            await panel.load()
        except ClientError as error:
            if self.connection.link.status != "lost" and not by_itself:
                self.toast_error(error)
        finally:
            panel.loaded_at = self.clock()

    def _load_again(self) -> None:
        """Reload the visible panel when its ``RELOAD`` has passed."""
        panel = self.panel
        if panel.RELOAD and self.clock() - panel.loaded_at >= panel.RELOAD:
            self.start(partial(self._load, panel, by_itself=True), "load")

    def on_view_tenant(self, message: ViewTenant) -> None:
        self.client.view(message.tenant)
        self._show_bars()
        self.reload()

    async def action_signals_of(self, rule_id: str) -> None:
        """Show the signals of a rule."""
        self.post_message(ShowPanel("SignalsPanel", rule_id))

    # Events of the connection

    def _linked(self, link: Link) -> None:
        self.state.stale = link.status != "connected"
        if not self._up:
            return
        self._main.set_class(self.state.stale, "-stale")
        self._show_bars()
        if self.frozen_at is None:
            self._show()
        if link.status == "connected":
            self.reload()

    def _received(self, data: Json) -> None:
        self.state.update(parse(data, self.clock()))
        if self.frozen_at is None and self._up:
            self._show()
            self._load_again()

    @property
    def _up(self) -> bool:
        """Whether the widgets exist; they do not while the application exits."""
        return self.is_running

    def _show(self) -> None:
        found = badges(self.state).items()
        self._main.query_one(NavBar).badge({self.panel_numbers[k] - 1: v for k, v in found})
        self.panel.show(self.state)
        if isinstance(self.screen, Detail):
            self.screen.show(self.state)

    def _show_bars(self) -> None:
        if self._up:
            self._main.query_one(StatusBar).show(self, self.connection.link)

    def _restyle(self, _: Theme) -> None:
        for panel in self._main.query(Panel):
            panel.restyle()
        self._show()

    # Keys

    def action_freeze(self) -> None:
        self.frozen_at = self.clock() if self.frozen_at is None else None
        self._show_bars()
        self._show()

    async def action_refresh(self) -> None:
        try:
            await self.connection.refresh()
        except ClientError as error:
            self.toast_error(error)
            return
        self._show()
        self.reload()

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
        """Close the filter's input, and drop the filter."""
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
        """Disable the filter in panels without rows."""
        return self.panel.FILTERS if action == "filter" and self.screen is self._main else True

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The commands of the palette: all actions, and the themes."""
        yield SystemCommand("Theme", "Choose a theme", self.action_change_theme)
        for binding in bindings_of(self):
            yield SystemCommand(
                binding.description,
                f"{binding.tooltip or 'Show the panel'}  ({self.get_key_display(binding)})",
                lambda action=binding.action: self.run_action(action),
            )
        for number, panel in enumerate(self._panels, 1):
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
            await self.action_panel(number)
        await self.run_action(action, panel)

    # Changes

    def on_make_change(self, message: MakeChange) -> None:
        if self.read_only:
            self.notify("This TUI was started with --read-only.", title="✖ not done")
            return
        self.start(partial(self._change, message.change, message.sure), "change")

    async def _change(self, change: OperatorChange, sure: bool) -> None:
        if not sure and not await self.push_screen_wait(Confirm(change)):
            return
        try:
            result = await change.run()
        except ClientError as error:
            self.toast_error(error)
            return
        self.notify(result, title="✔ done", markup=False)
        await self.action_refresh()

    # The window

    def on_resize(self, event: Resize) -> None:
        small = event.size.width < MIN_WIDTH or event.size.height < MIN_HEIGHT
        if small and not isinstance(self.screen, TooSmall):
            self.push_screen(TooSmall(MIN_WIDTH, MIN_HEIGHT))
        elif not small and isinstance(self.screen, TooSmall):
            self.pop_screen()


def run(
    url: str,
    token: str | None = None,
    tenant: str | None = None,
    read_only: bool = False,
    ca: Path | None = None,
) -> int:
    """Run the TUI in this terminal and return the exit code. ``ca`` is a PEM file of certificates
    to trust."""
    return asyncio.run(_run(url, token, tenant, read_only, ca))


async def _run(
    url: str, token: str | None, tenant: str | None, read_only: bool, ca: Path | None
) -> int:
    try:
        async with ApiClient(url, token, tenant, ca) as client:
            first = await client.snapshot()
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise ClientError("refused", "the TUI needs a terminal; in scripts use the API")
            cluster = await client.in_cluster()
            await BetraceApp(client, read_only, first, cluster=cluster).run_async()
            return 0
    except ClientError as error:
        print(f"betrace: {error}; {_remedy(error)}", file=sys.stderr)
        return UNREACHABLE


def _remedy(error: ClientError) -> str:
    if error.status in (401, 403):
        return "give the operator token with --token or BETRACE_TOKEN"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "if the certificate is yours, name it or its CA with --ca FILE"
    if error.kind in ("unreachable", "timed out"):
        return "start it with `betrace serve`, or give its API with --url"
    return "see `betrace tui --help`"
