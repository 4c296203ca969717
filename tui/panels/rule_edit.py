"""The rule editor: checks the condition while you type, tests it, and saves after a question."""

from __future__ import annotations

import asyncio
import difflib
from typing import ClassVar, cast

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.css.query import NoMatches
from textual.screen import ModalScreen
from textual.widgets import Input, Label, TextArea
from textual.worker import Worker

from betrace.tui.base import BaseApp
from betrace.tui.changes import OperatorChange, nothing
from betrace.tui.client import ClientError
from betrace.tui.format import many
from betrace.tui.json_values import Json
from betrace.tui.panels.rule_test import test_condition
from betrace.tui.tones import SEVERITIES, marked, toned
from betrace.tui.widgets.dialogs import Confirm
from betrace.tui.widgets.highlight import TOKEN_STYLES, tokens
from betrace.tui.widgets.key_bar import KeyBar
from betrace.tui.widgets.live_text import LiveText

PAUSE = 0.3
"""Seconds without typing before the condition is checked."""

_EXAMPLE = """Example:

when   { payment.charge_card.where(amount > 1000) }
always { payment.fraud_check }"""
_NEW: Json = {"severity": "medium", "condition": ""}
_MOST_LINES = 10
"""Maximum number of lines of a difference."""


class ConditionArea(TextArea):
    """A text area with syntax highlighting."""

    def get_line(self, line_index: int) -> Text:
        line = super().get_line(line_index)
        app = cast(BaseApp, self.app)
        for start, end, kind in tokens(line.plain):
            variable, more = TOKEN_STYLES[kind]
            line.stylize(f"{more} {app.colour(variable)}".strip(), start, end)
        return line


class RuleEditor(ModalScreen[None]):
    """Edits a rule, or with None a new one."""

    AUTO_FOCUS = "TextArea"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Save", priority=True),
        Binding("ctrl+t", "test", "Test", priority=True, tooltip="Against a recent trace"),
        Binding("escape", "leave", "Back", priority=True),
    ]

    def __init__(self, rule: Json | None = None) -> None:
        super().__init__()
        self._rule = rule
        self._checked: str | None = None
        self._errors: list[Json] = []

    @property
    def _betrace(self) -> BaseApp:
        return cast(BaseApp, self.app)

    def compose(self) -> ComposeResult:
        rule = self._rule or _NEW
        labels = rule.get("labels") or {}
        values = {
            "name": str(rule.get("name", "")),
            "severity": str(rule.get("severity", "")),
            "description": str(rule.get("description", "")),
            "labels": ", ".join(f"{name}={value}" for name, value in labels.items()),
        }
        if self._rule is None:
            values = {"id": "", **values}
        with Vertical(classes="rule-editor") as box:
            box.border_title = f"Rule {self._rule['id']}" if self._rule else "New rule"
            for name, value in values.items():
                with Horizontal():
                    yield Label(name)
                    yield Input(value, id=f"rule-{name}", placeholder=_HINTS[name])
            yield ConditionArea(
                str(rule.get("condition", "")), show_line_numbers=True, placeholder=_EXAMPLE
            )
            yield LiveText(id="errors")
        yield KeyBar()

    def on_mount(self) -> None:
        if self._rule is None:
            self.query_one("#rule-id").focus()
        self._check_soon()

    @property
    def _condition(self) -> str:
        return self.query_one(ConditionArea).text

    # Checking

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        self._check_soon()

    def _check_soon(self) -> None:
        async def check() -> None:
            await asyncio.sleep(PAUSE)
            await self._check()

        # A worker of the screen, so that it ends with the screen.
        _: Worker[None] = self.run_worker(check, group="check", exclusive=True)

    async def _check(self) -> None:
        try:
            condition = self._condition
            shown = self.query_one("#errors", LiveText)
        except NoMatches:  # the screen is closing and its widgets are already gone
            return
        if not condition.strip():
            self._checked, self._errors = condition, [{"message": "write a condition first"}]
            shown.text(toned("write a condition", "quiet"))
            return
        try:
            self._errors, plan = await self._betrace.client.check_condition(condition)
        except ClientError as error:
            self._checked = None
            shown.text(marked(f"not checked: {error}", "busy"))
            return
        self._checked = condition
        if self._errors:
            shown.text(marked("\n".join(error_text(each) for each in self._errors), "bad"))
        else:
            decided = f"\n{plan}" if plan else ""
            shown.text(marked("the condition is valid", "good"), toned(decided, "quiet"))

    # Keys

    def action_test(self) -> None:
        test_condition(self._betrace, "the edited rule", self._condition)

    def action_leave(self) -> None:
        async def leave() -> None:
            question = OperatorChange(
                "Leave without saving?", "Leave", nothing, note="Your edits will be lost."
            )
            if not self._changes() or await self.app.push_screen_wait(Confirm(question)):
                self.dismiss()

        self._betrace.start(leave, "leave")

    def _value(self, name: str) -> str:
        return self.query_one(f"#rule-{name}", Input).value.strip()

    def _edited(self) -> Json:
        """The edited rule. Raises :exc:`ValueError`."""
        labels = {}
        for part in filter(None, (each.strip() for each in self._value("labels").split(","))):
            name, equals, value = part.partition("=")
            if not equals or not name.strip():
                raise ValueError(f"labels: {part!r} is not a label; write team=payments, tier=1")
            labels[name.strip()] = value.strip()
        severity = self._value("severity")
        if severity not in SEVERITIES:
            raise ValueError(
                f"severity: {severity!r} is unknown; write one of {', '.join(SEVERITIES)}"
            )
        enabled = bool(self._rule.get("enabled", True)) if self._rule else True
        found = {
            "description": self._value("description"),
            "severity": severity,
            "labels": labels,
            "condition": self._condition,
            "enabled": enabled,
        }
        for name in ("mode", "incomplete", "examples"):
            if self._rule and name in self._rule:
                found[name] = self._rule[name]
        if self._value("name"):
            found["name"] = self._value("name")
        return found

    def _changes(self) -> list[tuple[str, str, str]]:
        before = self._rule or _NEW
        try:
            edited = self._edited()
        except ValueError as error:
            return [("rule", "", str(error))]
        found = [
            (name, _short(before.get(name)), _short(edited.get(name)))
            for name in ("name", "severity", "description", "labels")
            if _short(before.get(name)) != _short(edited.get(name))
        ]
        if before.get("condition") != edited["condition"]:
            old, new = (len(str(e["condition"]).splitlines()) for e in (before, edited))
            found.append(("condition", many(old, "line"), f"{many(new, 'line')}, as below"))
        return found

    def action_save(self) -> None:
        self._betrace.start(self._save, "save")

    async def _save(self) -> None:
        if self._checked != self._condition:
            await self._check()
        try:
            edited = self._edited()
        except ValueError as error:
            self.notify(str(error), title="✖ not saved", severity="error", markup=False)
            return
        rule, client = self._rule, self._betrace.client
        identity = str(rule["id"]) if rule else self._value("id")
        problem = error_text(self._errors[0]) if self._errors else ""
        if not identity:
            problem = "id: a rule needs an id, such as payment-fraud-check"
        if problem:
            self.notify(problem, title="✖ not saved", severity="error", markup=False)
            return

        async def run() -> str:
            etag = str(rule["etag"]) if rule else None
            saved = await client.put_rule(identity, edited, etag)
            self.dismiss()
            return f"{identity} saved, version {saved.get('version')}"

        old = str(rule.get("condition", "")) if rule else ""
        self._betrace.change(
            OperatorChange(
                f"Save rule {identity}?" if rule else f"Create rule {identity}?",
                "Save" if rule else "Create",
                run,
                self._changes() if rule else [("rule", "none", f"{edited['severity']}, enabled")],
                difference(old, edited["condition"])
                + "\nTraces that are already open are decided by the previous rules.",
            )
        )


_HINTS = {
    "id": "a-z 0-9 . _ -",
    "name": "a short title",
    "severity": ", ".join(SEVERITIES),
    "description": "why the rule exists",
    "labels": "team=payments, tier=1",
}


def error_text(error: Json) -> str:
    """An error in a condition: location, message and hint."""
    where = f"line {error['line']}, column {error['column']}: " if error.get("line") else ""
    hint = f"; {error['hint']}" if error.get("hint") else ""
    return f"{where}{error.get('message', 'wrong')}{hint}"


def difference(old: str, new: str) -> str:
    """The removed and added lines."""
    found = [
        line
        for line in difflib.ndiff(old.splitlines(), new.splitlines())
        if line.startswith(("- ", "+ "))
    ]
    left = len(found) - _MOST_LINES
    return "\n".join(
        found[:_MOST_LINES] + ([f"… and {many(left, 'more line')}"] if left > 0 else [])
    )


def _short(value: object) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name}={each}" for name, each in value.items())
    text = str(value or "none")
    return text if len(text) <= 60 else f"{text[:59]}…"
