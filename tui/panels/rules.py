"""A tenant's rules, the signals they raise, and changing them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content

from betrace.tui.base import ReloadPanel, ShowPanel
from betrace.tui.changes import OperatorChange
from betrace.tui.client import ApiClient, ClientError
from betrace.tui.format import NONE, count, many, number
from betrace.tui.json_values import Json, mapping, objects
from betrace.tui.panels.lists import show_undecided
from betrace.tui.panels.rule_edit import RuleEditor
from betrace.tui.panels.rule_test import test_condition
from betrace.tui.panels.triage import mute_or_unmute, muted_text
from betrace.tui.state import ServiceState
from betrace.tui.tones import SEVERITIES, marked, severity, toned
from betrace.tui.widgets.descriptions import Descriptions
from betrace.tui.widgets.fields import fields
from betrace.tui.widgets.highlight import highlighted
from betrace.tui.widgets.list_panel import Part, TenantListPanel
from betrace.tui.widgets.table_panel import Cell, Column, Row

FIELDS = (
    "name",
    "description",
    "severity",
    "labels",
    "mode",
    "incomplete",
    "condition",
    "examples",
)
"""The fields that a rule is saved with, besides ``enabled``."""


FILE = "▪"
"""Marks rules in files written by hand."""


class RulesPanel(TenantListPanel):
    TITLE = "Rules"
    NOUN = "Rule"
    EMPTY = "No rules yet. Press A to write one."
    RELOAD = 10.0

    COLUMNS = (
        Column("enabled", "state", 10),
        Column("id", "rule", 28, narrow=20),
        Column("severity", "severity", 10),
        Column("active", "active", 6, right=True),
        Column("hour", "1 hour", 6, right=True),
        Column("name", "name", 20, flex=True),
        Column("version", "version", 16, shown_from=110),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("E", "change_edit", "Edit", tooltip="Edit the rule"),
        Binding("A", "change_new", "Add", tooltip="Write a new rule"),
        Binding("X", "change_toggle", "On/off", tooltip="Enable or disable the rule"),
        Binding("D", "change_delete", "Delete", tooltip="Delete the rule; its signals are kept"),
        Binding("T", "test", "Test", tooltip="Test the rule on a recent trace"),
        Binding("M", "change_mute", "Mute", tooltip="Mute the rule, or end its mute"),
        Binding("i", "signals", "Signals", tooltip="Show the signals of the rule"),
        Binding(
            "u", "undecided", "Undecided", show=False, tooltip="Show traces it could not judge"
        ),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._rules: dict[str, Json] = {}
        self._raised: Json = {}
        self._total: tuple[int, int] = (0, 0)
        self._could_change = True
        self._plans = Descriptions(self, self._rule_plan)
        """How the rules that relate spans are decided, by version."""

    async def read(self) -> None:
        client = self.betrace.client
        tenant = client.tenant
        rules = await client.get("/api/v1/rules")
        summary = await client.get("/api/v1/signals/summary")
        if tenant == client.tenant:
            self._rules = {str(rule.get("id")): rule for rule in objects(rules.get("rules"))}
            self._raised = mapping(summary.get("by_rule"))
            self._total = summary.get("total") or 0, summary.get("retracted") or 0

    def head(self) -> Sequence[Part]:
        enabled = sum(bool(rule.get("enabled")) for rule in self._rules.values())
        in_files = sum(not _editable(rule) for rule in self._rules.values())
        raised, retracted = self._total
        return [
            self.tenant_label,
            f"  {many(len(self._rules), 'rule')}, {count(enabled)} enabled",
            f", {FILE} {count(in_files)} in files" if in_files else "",
            f"  {many(raised, 'signal')} in the last hour, {count(retracted)} retracted",
        ]

    def rows(self, state: ServiceState) -> Iterable[Row]:
        for identity, rule in self._rules.items():
            word = str(rule.get("severity", ""))
            grade, tone = severity(word)
            rank = SEVERITIES.index(word) if word in SEVERITIES else len(SEVERITIES)
            active, raised = rule.get("active_signals"), self._raised.get(identity, 0)
            on, muted = bool(rule.get("enabled")), bool(rule.get("muted"))
            shadow = rule.get("mode") == "shadow"
            word = _state(on, muted, shadow)
            yield Row(
                identity,
                (
                    Cell(
                        f"{word:<8}{'' if _editable(rule) else f' {FILE}'}",
                        ("busy" if muted or shadow else "good") if on else "quiet",
                    ),
                    Cell(identity),
                    Cell(grade, tone, rank),
                    Cell(number(active), order=active or 0),
                    Cell(number(raised), order=raised),
                    Cell(str(rule.get("name", ""))),
                    Cell(str(rule.get("version", ""))),
                ),
            )

    @property
    def _rule(self) -> Json | None:
        return self._rules.get(self.selected or "")

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        rule = self._rules.get(key)
        if rule is None:
            return None
        labels = mapping(rule.get("labels"))
        on = marked("enabled", "good") if rule.get("enabled") else marked("disabled", "quiet")
        return Content("\n").join(
            [
                fields(
                    ("name", str(rule.get("name", ""))),
                    ("description", str(rule.get("description") or NONE)),
                    ("state", on),
                    ("severity", toned(*severity(str(rule.get("severity", ""))))),
                    ("labels", ", ".join(f"{k}={v}" for k, v in labels.items()) or NONE),
                    ("version", str(rule.get("version", ""))),
                    ("file", _source(rule)),
                    *(
                        [("muted", Content.assemble(marked(muted_text(muted), "busy")))]
                        if (muted := mapping(rule.get("muted")))
                        else []
                    ),
                    *([("mode", _SHADOW)] if rule.get("mode") == "shadow" else []),
                    *([("incomplete", _SKIPPED)] if rule.get("incomplete") == "skip" else []),
                    *([("decided", plan)] if (plan := self._plan(rule)) else []),
                    ("active signals", count(rule.get("active_signals"))),
                    ("in the last hour", count(self._raised.get(key, 0))),
                ),
                Content(""),
                highlighted(str(rule.get("condition", ""))),
            ]
        )

    def _plan(self, rule: Json) -> str:
        """How a rule that relates spans is decided; empty for others, and until it is known."""
        if rule.get("plan"):
            return str(rule["plan"])
        found = self._plans.get(str(rule.get("version")))
        return found.text if found is not None else ""

    def _rule_plan(self, version: str) -> RulePlan | None:
        those = (each for each in self._rules.values() if each.get("version") == version)
        return next((RulePlan(str(each.get("condition", ""))) for each in those), None)

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Disable changes of a rule that is in a file."""
        if action in _CHANGES and not self._can_change:
            return None
        return super().check_action(action, parameters)

    @property
    def _can_change(self) -> bool:
        rule = self._rule
        return rule is None or _editable(rule)

    def show(self, state: ServiceState) -> None:
        super().show(state)
        self._show_keys()

    def on_data_table_row_highlighted(self) -> None:
        self._show_keys()

    def _show_keys(self) -> None:
        """Show in the footer which keys are disabled for the rule under the cursor."""
        if self._can_change != self._could_change:
            self._could_change = self._can_change
            self.refresh_bindings()

    def action_change_mute(self) -> None:
        if self._rule is not None:
            mute_or_unmute(self.betrace, str(self._rule["id"]))

    def action_signals(self) -> None:
        if self._rule is not None:
            self.betrace.post_message(ShowPanel("SignalsPanel", str(self._rule["id"])))

    def action_undecided(self) -> None:
        if self._rule is not None:
            show_undecided(self.betrace, str(self._rule["id"]))

    def action_test(self) -> None:
        rule = self._rule
        if rule is not None:
            test_condition(self.betrace, str(rule["id"]), str(rule.get("condition", "")))

    def action_change_new(self) -> None:
        self.betrace.push_screen(RuleEditor())

    def action_change_edit(self) -> None:
        async def edit(rule: Json) -> None:
            self.betrace.push_screen(RuleEditor(rule))

        self._with_fresh(edit)

    def action_change_toggle(self) -> None:
        async def toggle(rule: Json) -> None:
            identity, on = str(rule["id"]), bool(rule.get("enabled"))

            async def run() -> str:
                body = {name: rule[name] for name in FIELDS if name in rule} | {"enabled": not on}
                await self.betrace.client.put_rule(identity, body, str(rule.get("etag")))
                return f"{identity} {_STATES[not on]}"

            verb = "Disable" if on else "Enable"
            self.betrace.change(
                OperatorChange(
                    f"{verb} rule {identity}?",
                    verb,
                    run,
                    [("state", _STATES[on], _STATES[not on])],
                    "Traces that are already open are decided by the previous rules.",
                )
            )

        self._with_fresh(toggle)

    def action_change_delete(self) -> None:
        async def delete(rule: Json) -> None:
            identity = str(rule["id"])

            async def run() -> str:
                await self.betrace.client.delete_rule(identity, str(rule.get("etag")))
                return f"{identity} deleted"

            self.betrace.change(
                OperatorChange(
                    f"Delete rule {identity}?",
                    "Delete",
                    run,
                    [("rule", f"version {rule.get('version')}", "none")],
                    "Its signals are kept.",
                )
            )

        self._with_fresh(delete)

    def _with_fresh(self, use: Callable[[Json], Awaitable[None]]) -> None:
        """Read the rule under the cursor again, to change its current version."""
        identity = self.selected
        if identity is None:
            return

        async def read() -> None:
            try:
                rule = await self.betrace.client.rule(identity)
            except ClientError:
                self.betrace.post_message(ReloadPanel())
                raise
            if not _editable(rule):
                raise ClientError("refused", f"{identity} is in the file {rule.get('source')}")
            await use(rule)

        self.betrace.start(self.betrace.reporting(read), "ask")


class RulePlan:
    """How a condition is decided, as the service says when it checks the condition."""

    def __init__(self, condition: str) -> None:
        self._condition = condition
        self.text = ""

    async def load(self, client: ApiClient) -> None:
        try:
            _, self.text = await client.check_condition(self._condition)
        except ClientError as error:
            self.text = f"not known: {error}"


def _editable(rule: Json) -> bool:
    """Whether the API may change the rule; rules in hand-written files change only there."""
    return bool(rule.get("editable", True))


def _source(rule: Json) -> str:
    source = str(rule.get("source") or NONE)
    if rule.get("all_tenants"):
        return f"{FILE} {source}: for all tenants, only the operator can change it"
    return source if _editable(rule) else f"{FILE} {source}: written by hand, edit it there"


def _state(on: bool, muted: bool, shadow: bool) -> str:
    """The state of a rule in one word, with its symbol."""
    if not on:
        return "○ off"
    if muted:
        return "● muted"
    return "● shadow" if shadow else "● on"


_SHADOW = "shadow: its signals are recorded and shown, but sent to nobody"
_SKIPPED = "traces with a parent that never came are skipped"
_STATES = {True: "enabled", False: "disabled"}
_CHANGES = ("change_edit", "change_toggle", "change_delete")
