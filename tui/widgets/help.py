"""Help generated from the bindings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Static

from betrace.tui.widgets.key_bar import KeyBar
from betrace.tui.widgets.panel import Panel

_GENERAL = (
    ("↑ ↓ j k", "Move; also page keys, g and G, ctrl+d and ctrl+u"),
    ("tab", "Move to the next part of the panel"),
    ("enter", "Open the row under the cursor; esc goes back"),
    ("ctrl+p", "Palette: every action by name"),
)


def bindings_of(owner: Widget | App[int]) -> Iterator[Binding]:
    """The bindings of a panel or of the application, without those that move the cursor and without
    Textual's own."""
    seen = set[str]()
    for bindings in owner._bindings.key_to_bindings.values():
        for binding in bindings:
            moves = binding.action.startswith(("vi(", "move("))
            inherited = binding.system or binding.key in ("ctrl+q", "ctrl+p", "ctrl+c")
            if binding.description and not moves and not inherited and binding.action not in seen:
                seen.add(binding.action)
                yield binding


class Help(ModalScreen[None]):
    """All keys of a panel and of the application."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q,enter", "dismiss", "Back"),
        Binding("j,down", "scroll('down')", "Down", show=False),
        Binding("k,up", "scroll('up')", "Up", show=False),
    ]

    def __init__(self, panel: Panel) -> None:
        super().__init__()
        self._panel = panel

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="detail") as scroll:
            scroll.border_title = "Keys"
            yield Static(self._text())
        yield KeyBar()

    def _text(self) -> Content:
        lines = [Content.assemble((f"{self._panel.TITLE}", "bold"))]
        lines += [self._line(binding) for binding in bindings_of(self._panel)]
        lines += [Content(""), Content.assemble(("Everywhere", "bold"))]
        lines += [_keys(key, text) for key, text in _GENERAL]
        app: App[int] = self.app  # type: ignore[assignment]
        lines += [self._line(binding) for binding in bindings_of(app)]
        return Content("\n").join(lines)

    def _line(self, binding: Binding) -> Content:
        text = binding.description
        if binding.tooltip:
            text += f": {binding.tooltip[0].lower()}{binding.tooltip[1:]}"
        if self._panel.check_action(binding.action.partition("(")[0], ()) is None:
            why = "read-only" if self._panel.betrace.read_only else "not for this row"
            text += f" (disabled: {why})"
        return _keys(self.app.get_key_display(binding), text)

    def action_scroll(self, where: str) -> None:
        getattr(self.query_one(VerticalScroll), f"scroll_{where}")(animate=False)


def _keys(key: str, text: str) -> Content:
    return Content.assemble((f"  {key:<9}", "bold $primary"), text)
