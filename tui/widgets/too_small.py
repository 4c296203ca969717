"""The screen of a window that is too small."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.screen import Screen
from textual.widgets import Static


class TooSmall(Screen[None]):
    """Replaces everything while the window is too small."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q", "app.quit", "Quit")]

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._needed = f"{width}×{height}"

    def compose(self) -> ComposeResult:
        yield Static(id="too-small")

    def on_resize(self, event: Resize) -> None:
        self.query_one(Static).update(
            f"The window is {event.size.width}×{event.size.height}; BeTrace needs {self._needed}. "
            "Enlarge it, or press q to quit."
        )
