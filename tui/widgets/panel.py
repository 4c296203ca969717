"""Panels: the screens that the number keys switch between. docs/tui.md explains how to add one."""

from __future__ import annotations

from typing import ClassVar, cast

from textual.binding import Binding, BindingType
from textual.containers import Vertical

from betrace.tui.base import BaseApp
from betrace.tui.changes import PREFIX
from betrace.tui.state import ServiceState


class Panel(Vertical, can_focus=False):
    """Base class of panels. A panel declares:

    - ``TITLE``: shown in the navigation bar, the help and the palette.
    - ``BINDINGS``: its actions, each with a description, for the footer, the help and the palette.
      An action that changes something is named ``action_change_…``.
    - ``compose``, like every widget, and ``show``.
    - ``SHORT``: a shorter title for narrow windows; by default ``TITLE``.
    - ``RELOAD``: seconds between calls of ``load`` while the panel is visible; 0 for never.
    - ``FILTERS``: whether `/` filters the panel, with ``filter_changed``.
    """

    TITLE: ClassVar[str] = ""
    SHORT: ClassVar[str] = ""
    FILTERS: ClassVar[bool] = False
    RELOAD: ClassVar[float] = 0.0

    loaded_at: float = 0.0
    """When ``load`` finished, in seconds since 1970; infinite while it runs."""
    filter_text: str = ""
    """The filter of `/`. A leading `!` inverts it."""

    @property
    def betrace(self) -> BaseApp:
        """The application, with its ``client``, ``state`` and ``change``."""
        return cast(BaseApp, self.app)

    def show(self, state: ServiceState) -> None:
        """Show the state. Called every second while the panel is visible and not frozen, and when
        it becomes visible or the theme changes. It should update only what changed."""

    async def load(self) -> None:
        """Read data that is not in the state. Called when the panel becomes visible, on `space`,
        and after a change or a reconnect. May raise :exc:`betrace.tui.client.ClientError`."""

    def choose(self, key: str) -> None:
        """Show one of the panel's rows."""

    def filter_changed(self) -> None:
        """``filter_text`` has changed."""

    def restyle(self) -> None:
        """The theme has changed: render again what stores colours."""

    def focus_first(self) -> None:
        """Focus the widget that handles the panel's keys, immediately, because the next key may
        already be waiting."""
        for widget in self.query("*"):
            if widget.focusable:
                self.screen.set_focus(widget)
                return

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Disable changes with --read-only."""
        if action.startswith(PREFIX) and self.betrace.read_only:
            return None
        return True


VI_KEYS: list[BindingType] = [
    Binding("j", "vi('cursor_down')", "Down", show=False),
    Binding("k", "vi('cursor_up')", "Up", show=False),
    Binding("g", "vi('scroll_top')", "First row", show=False),
    Binding("G", "vi('scroll_bottom')", "Last row", show=False),
    Binding("ctrl+d", "vi('page_down')", "Page down", show=False),
    Binding("ctrl+u", "vi('page_up')", "Page up", show=False),
    Binding("h", "vi('scroll_left')", "Left", show=False),
    Binding("l", "vi('scroll_right')", "Right", show=False),
]
