"""What panels and widgets use of the application."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from textual.app import App
from textual.color import Color, ColorParseError
from textual.message import Message
from textual.worker import Worker

from betrace.tui.changes import OperatorChange
from betrace.tui.client import ApiClient, ClientError
from betrace.tui.state import ServiceState
from betrace.tui.tones import Tone

_COLOURS: dict[Tone, str] = {"good": "success", "busy": "warning", "bad": "error"}


class ReloadPanel(Message):
    """Makes the visible panel read its own data again."""


class ShowPanel(Message):
    """Shows the panel whose class has this name, with the cursor on this row, in place of all
    details."""

    def __init__(self, name: str, row: str | None = None) -> None:
        super().__init__()
        self.name = name
        self.row = row


class ViewTenant(Message):
    """Shows this tenant's signals, traces and rules from now on."""

    def __init__(self, tenant: str) -> None:
        super().__init__()
        self.tenant = tenant


class MakeChange(Message):
    """Asks for confirmation (unless ``sure``), makes a change, and reports the result."""

    def __init__(self, change: OperatorChange, sure: bool = False) -> None:
        super().__init__()
        self.change = change
        self.sure = sure


class BaseApp(App[int]):
    """The application as its panels see it. :class:`betrace.tui.app.BetraceApp` composes it, and
    handles the messages above, which panels post to it.

    Args:
      client: sends the requests; its owner closes it.
      read_only: disables changes.
      clock: returns seconds since 1970.
    """

    def __init__(
        self, client: ApiClient, read_only: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__()
        self.client = client
        self.read_only = read_only
        self.clock = clock
        self.state = ServiceState()
        self.frozen_at: float | None = None
        """When the view was frozen; None while it is not."""
        self.panel_numbers: dict[str, int] = {}
        """The number keys of the panels by class name."""

    def start(self, work: Callable[[], Coroutine[Any, Any, None]], group: str) -> None:
        """Run an async function as a task. It replaces a running task of the same group."""
        _: Worker[None] = self.run_worker(work, group=group, exclusive=True)

    def change(self, change: OperatorChange, sure: bool = False) -> None:
        """Ask for confirmation, unless a dialog was answered before (``sure``); make a change, and
        report the result."""
        self.post_message(MakeChange(change, sure))

    # Errors

    def reporting(
        self, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        """The same function, with its :exc:`ClientError` shown as a toast."""

        async def reported() -> None:
            try:
                await work()
            except ClientError as error:
                self.toast_error(error)

        return reported

    def toast_error(self, error: ClientError) -> None:
        self.notify(str(error), title=f"✖ {error.kind}", severity="error", timeout=10, markup=False)

    # Colours

    def style(self, tone: Tone) -> str:
        """A tone as a Rich style in the theme's colours."""
        if tone == "quiet":
            return "dim"
        return self.colour(_COLOURS[tone])

    def colour(self, variable: str) -> str:
        """A theme variable as a Rich style; empty if the theme does not define it."""
        try:
            return Color.parse(self.theme_variables[variable]).rich_color.name
        except (ColorParseError, KeyError):
            return ""
