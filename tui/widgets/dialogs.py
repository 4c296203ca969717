"""Questions: whether to make a change, and a line of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Static

from betrace.tui.changes import OperatorChange


class Confirm(ModalScreen[bool]):
    """Asks before a change. Cancel has the focus."""

    AUTO_FOCUS = "#cancel"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n,q", "answer(False)", "Cancel"),
        Binding("y", "answer(True)", "Do it"),
        Binding("left,right,h,l,up,down,j,k", "other", "Other button", show=False),
    ]

    def __init__(self, change: OperatorChange) -> None:
        super().__init__()
        self._change = change

    def compose(self) -> ComposeResult:
        change = self._change
        with Vertical(classes="dialog"):
            yield Label(Content(change.title), classes="dialog-title")
            for name, old, new in change.effects:
                yield Static(
                    Content.assemble(f"{name}: ", (old, "bold"), " → ", (new, "bold $warning"))
                )
            if change.note:
                yield Static(Content(change.note), classes="dialog-note")
            with Horizontal(classes="dialog-buttons"):
                yield Button("Cancel", id="cancel")
                yield Button(Content(change.verb), id="confirm")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "confirm")

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)

    def action_other(self) -> None:
        self.focus_next()


class Ask(ModalScreen[str | None]):
    """Asks for a line of text; returns None when cancelled.

    ``check`` returns what is wrong with the text, or an empty string.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Cancel")]

    def __init__(
        self, title: str, label: str, value: str = "", check: Callable[[str], str] | None = None
    ) -> None:
        super().__init__()
        self._title = title
        self._label = label
        self._value = value
        self._check = check

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(Content(self._title), classes="dialog-title")
            yield Label(Content(self._label))
            yield Input(self._value)
            yield Static("", id="problem")
            yield Static("Enter continues, Esc cancels.", classes="dialog-note")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        problem = self._check(text) if self._check else ""
        if problem:
            self.query_one("#problem", Static).update(
                Content.assemble(("✖ ", "$error"), (problem, "$error"))
            )
        else:
            self.dismiss(text)

    def action_cancel(self) -> None:
        self.dismiss(None)
