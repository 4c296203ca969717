"""The screen that Enter opens: one object in full."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen

from betrace.tui.base import BaseApp
from betrace.tui.state import ServiceState
from betrace.tui.widgets.key_bar import KeyBar
from betrace.tui.widgets.live_text import LiveText


class Detail(ModalScreen[None]):
    """One object in full, live. `Esc` goes back.

    ``render_body`` makes the text from the state and the width; None when the object is gone.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,backspace", "dismiss", "Back"),
        Binding("j", "scroll('down')", "Down", show=False),
        Binding("k", "scroll('up')", "Up", show=False),
        Binding("g", "scroll('home')", "Top", show=False),
        Binding("G", "scroll('end')", "Bottom", show=False),
    ]

    def __init__(
        self, title: str, render_body: Callable[[ServiceState, int], Content | None]
    ) -> None:
        super().__init__()
        self._title = title
        self._render_body = render_body

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="detail") as scroll:
            scroll.border_title = Content(self._title)
            yield LiveText(classes="detail-body")
        yield KeyBar()

    @property
    def betrace(self) -> BaseApp:
        return cast(BaseApp, self.app)

    def on_mount(self) -> None:
        self.show(self.betrace.state)

    def show(self, state: ServiceState) -> None:
        """Draw the state. The application calls this with each state, even before the screen is
        mounted."""
        gone = Content("This no longer exists.")
        for body in self.query(".detail-body").results(LiveText):
            body.draw(lambda width: self._render_body(state, width) or gone)

    def action_scroll(self, where: str) -> None:
        scroll = self.query_one(VerticalScroll)
        getattr(scroll, f"scroll_{where}")(animate=False)


class CachedText(ABC):
    """The text of a detail that does not follow the state: made once for each width."""

    def __init__(self) -> None:
        self._drawn: tuple[int, Content] | None = None

    def draw(self, _: ServiceState, width: int) -> Content:
        if self._drawn is None or self._drawn[0] != width:
            self._drawn = width, self.make(width)
        return self._drawn[1]

    def changed(self) -> None:
        """Make the text again the next time it is drawn."""
        self._drawn = None

    @abstractmethod
    def make(self, width: int) -> Content:
        """The text in lines of this width."""
