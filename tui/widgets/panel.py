"""Panels: what number keys switch between. How to add one is told in docs/tui.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from textual.binding import Binding, BindingType
from textual.containers import Vertical

from betrace.tui.state import State
from betrace.tui.widgets.changes import PREFIX

if TYPE_CHECKING:
    from betrace.tui.app import BetraceApp


class Panel(Vertical, can_focus=False):
    """Base of panels. A panel declares:

    - ``TITLE``: in the bar of panels, the help and the palette.
    - ``BINDINGS``: its actions, each with a description; the footer, the help and the palette are
      made of them. What changes something is an ``action_change_…``.
    - ``compose``, as every widget, and ``show``.
    - ``SHORT``: the title where there is little room; else ``TITLE``.
    - ``RELOAD``: seconds after which ``load`` is called again while it is visible; 0 for never.
    - ``FILTERS``: whether `/` filters it, with ``filter_changed``.
    """

    TITLE: ClassVar[str] = ""
    SHORT: ClassVar[str] = ""
    FILTERS: ClassVar[bool] = False
    RELOAD: ClassVar[float] = 0.0

    loaded_at: float = 0.0
    """When ``load`` ended, in seconds since 1970; infinite while it runs."""
    filter_text: str = ""
    """What `/` was given; begins with `!` to show what does not match."""

    @property
    def betrace(self) -> BetraceApp:
        """The application: its ``client``, ``state``, and ``change``."""
        return cast("BetraceApp", self.app)

    def show(self, state: State) -> None:
        """Show the state. Called once a second while the panel is visible and not frozen, and
        when it becomes visible or the theme changes; it should touch only what changed."""

    async def load(self) -> None:
        """Read what is not in the state. Called when the panel becomes visible, on `space`, and
        after a change or a reconnect. May raise :exc:`betrace.tui.client.ClientError`."""

    def filter_changed(self) -> None:
        """``filter_text`` is another."""

    def restyle(self) -> None:
        """The theme is another: make anew what has colours of its own."""

    def focus_first(self) -> None:
        """Give the focus to what takes the panel's keys, at once: the next key may be there
        already."""
        for widget in self.query("*"):
            if widget.focusable:
                self.screen.set_focus(widget)
                return

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Changes are disabled with --read-only."""
        if action.startswith(PREFIX) and self.betrace.read_only:
            return None
        return True


def matches(text: str, needle: str) -> bool:
    """Whether a filter lets text through: it contains the needle, in any case; with `!` before
    it, it does not."""
    inverse, needle = needle.startswith("!"), needle.removeprefix("!").strip().casefold()
    return not needle or (needle in text.casefold()) != inverse


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
