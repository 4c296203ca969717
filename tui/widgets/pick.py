"""A dialog to pick one of several options: typing narrows them, Enter picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Label, OptionList, Static
from textual.widgets.option_list import Option

from betrace.tui.widgets.text_filter import matches


class Pick(ModalScreen[str | None]):
    """Returns the chosen value; None when cancelled.

    Args:
      title: the question.
      options: (value, label), in order.
      check: allows other values. Returns what is wrong with one, or an empty string.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Cancel"),
        Binding("down,ctrl+n", "move('cursor_down')", "Down", priority=True),
        Binding("up,ctrl+p", "move('cursor_up')", "Up", priority=True),
        Binding("pagedown", "move('page_down')", "Page down", show=False, priority=True),
        Binding("pageup", "move('page_up')", "Page up", show=False, priority=True),
    ]

    def __init__(
        self,
        title: str,
        options: Sequence[tuple[str, str]],
        check: Callable[[str], str] | None = None,
    ) -> None:
        super().__init__()
        self._title = title
        self._options = options
        self._shown: list[str] = []
        self._check = check

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog pick"):
            yield Label(Content(self._title), classes="dialog-title")
            yield Input(placeholder="type to narrow, ↑ ↓ to choose, Enter to pick")
            yield OptionList(markup=False)
            yield Static("", id="problem")

    def on_mount(self) -> None:
        self.query_one(OptionList).can_focus = False
        self._show("")

    def on_input_changed(self, event: Input.Changed) -> None:
        self._show(event.value)

    def _show(self, text: str) -> None:
        found = [(value, label) for value, label in self._options if matches(label, text)]
        self._shown = [value for value, _ in found]
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options([Option(Content(label)) for _, label in found])
        options.highlighted = 0 if found else None

    def action_move(self, where: str) -> None:
        getattr(self.query_one(OptionList), f"action_{where}")()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._shown[event.option_index])

    def on_input_submitted(self, event: Input.Submitted) -> None:
        at = self.query_one(OptionList).highlighted
        if at is not None:
            self.dismiss(self._shown[at])
            return
        typed = event.value.strip()
        problem = self._check(typed) if self._check else "no option matches; change the text"
        if problem:
            self.query_one("#problem", Static).update(
                Content.assemble(("✖ ", "$error"), (problem, "$error"))
            )
        else:
            self.dismiss(typed)
