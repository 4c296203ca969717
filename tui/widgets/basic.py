"""Widgets that panels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import Footer, Label, Sparkline, Static

from betrace.tui.state import State
from betrace.tui.widgets.text import SYMBOLS, Tone

if TYPE_CHECKING:
    from betrace.tui.app import BetraceApp

STYLES: dict[Tone, str] = {
    "good": "$success",
    "busy": "$warning",
    "bad": "$error",
    "quiet": "$text-muted",
}

Draw = Callable[[int], Content]


def toned(text: str, tone: Tone) -> tuple[str, str]:
    """A part of :meth:`Content.assemble`, in the tone's colour."""
    return text, STYLES[tone]


def marked(text: str, tone: Tone) -> tuple[str, str]:
    """The same with the tone's symbol before it."""
    return f"{SYMBOLS[tone]} {text}", STYLES[tone]


class Live(Static):
    """Text that is drawn for the widget's width, and painted only if it changed."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__("", id=id, classes=classes)
        self._draw: Draw | None = None
        self._drawn: Content | None = None

    def draw(self, draw: Draw) -> None:
        """Draw with this from now on."""
        self._draw = draw
        self._paint()

    def text(self, *parts: str | tuple[str, str] | Content) -> None:
        """Show the parts, in any width."""
        content = Content.assemble(*parts)
        self.draw(lambda _: content)

    def on_resize(self, event: Resize) -> None:
        self._paint()

    def _paint(self) -> None:
        width = self.content_size.width
        if self._draw is None or not width:
            return
        content, before = self._draw(width), self._drawn
        if before is None or content.plain != before.plain or content.spans != before.spans:
            layout = before is None or _height(content, width) != _height(before, width)
            self._drawn = content
            self.update(content, layout=layout)


def _height(content: Content, width: int) -> int:
    """Lines that a text takes where it may be wrapped."""
    return len(content.wrap(width))


class Tile(Vertical):
    """A figure with its name, and how it was lately as a sparkline."""

    def __init__(self, title: str, *, id: str) -> None:
        super().__init__(id=id, classes="tile")
        self._title = title

    def compose(self) -> ComposeResult:
        yield Label(self._title, classes="tile-title")
        yield Live(classes="tile-value")
        yield Sparkline([], summary_function=max)
        yield Live(classes="tile-note")

    def show(self, value: str, unit: str, note: str, tone: Tone, points: Sequence[float]) -> None:
        """``points`` are the history, oldest first; ``tone`` is shown in words by ``note``."""
        style = "bold" if tone in ("good", "quiet") else f"bold {STYLES[tone]}"
        self.query_one(".tile-value", Live).text((value, style), f" {unit}")
        self.query_one(".tile-note", Live).text(toned(note, "quiet" if tone == "good" else tone))
        sparkline = self.query_one(Sparkline)
        wanted = list(points[-max(1, sparkline.size.width) :])
        if wanted != sparkline.data:
            sparkline.data = wanted


class Section(Vertical):
    """A titled box around one live text."""

    def __init__(self, title: str, *, id: str) -> None:
        super().__init__(id=id, classes="section")
        self.border_title = title

    def compose(self) -> ComposeResult:
        yield Live()

    @property
    def body(self) -> Live:
        return self.query_one(Live)


class Detail(ModalScreen[None]):
    """One thing in full, live; `Esc` goes back.

    ``render_body`` makes the text from the state and the width, None when the thing is gone.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,backspace", "dismiss", "Back"),
        Binding("j", "scroll('down')", "Down", show=False),
        Binding("k", "scroll('up')", "Up", show=False),
        Binding("g", "scroll('home')", "Top", show=False),
        Binding("G", "scroll('end')", "Bottom", show=False),
    ]

    def __init__(self, title: str, render_body: Callable[[State, int], Content | None]) -> None:
        super().__init__()
        self._title = title
        self._render_body = render_body

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="detail") as scroll:
            scroll.border_title = Content(self._title)
            yield Live()
        yield Footer()

    def on_mount(self) -> None:
        self.show(cast("BetraceApp", self.app).state)

    def show(self, state: State) -> None:
        """Draw the state; the application calls it with each one, also before the screen is up."""
        gone = Content("this is no longer there")
        for body in self.query(Live):
            body.draw(lambda width: self._render_body(state, width) or gone)

    def action_scroll(self, where: str) -> None:
        scroll = self.query_one(VerticalScroll)
        getattr(scroll, f"scroll_{where}")(animate=False)


def fields(*pairs: tuple[str, str | tuple[str, str] | Content]) -> Content:
    """Names and values, one a line, the values below each other."""
    width = max((len(name) for name, _ in pairs), default=0)
    lines = [
        Content.assemble((f"{name:<{width}}  ", "$text-muted"), value) for name, value in pairs
    ]
    return Content("\n").join(lines)
