"""A titled box around one live text."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical

from betrace.tui.widgets.live_text import LiveText


class TitledBox(Vertical):
    def __init__(self, title: str, *, id: str) -> None:
        super().__init__(id=id, classes="titled-box")
        self.border_title = title

    def compose(self) -> ComposeResult:
        yield LiveText()

    @property
    def body(self) -> LiveText:
        return self.query_one(LiveText)
