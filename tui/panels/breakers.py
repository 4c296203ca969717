"""The circuit breakers: their states, and the actions on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content

from betrace.tui.changes import OperatorChange
from betrace.tui.format import NONE, clock, duration, number, percent, words
from betrace.tui.panels.details import breaker_text, trial_text
from betrace.tui.state import BreakerStatus, ServiceState
from betrace.tui.tones import SYMBOLS, status_tone
from betrace.tui.widgets.table_panel import Cell, Column, Row, TablePanel

_AFTER = {"trip": "open", "reset": "closed", "force-open": "forced open", "disable": "disabled"}
_NOTES = {
    "trip": "All calls are refused; trial calls follow after {open_for}.",
    "reset": "Calls are permitted again, and the statistics of recent calls start over.",
    "force-open": "All calls are refused until you reset it; there are no trial calls.",
    "disable": "All calls are permitted, even if they fail, until you reset it.",
}


class BreakersPanel(TablePanel):
    TITLE = "Breakers"
    NOUN = "Breaker"

    COLUMNS = (
        Column("name", "breaker", 15),
        Column("state", "state", 13),
        Column("failures", "fails", 6, right=True),
        Column("calls", "calls", 5, right=True),
        Column("trial", "trial", 9),
        Column("last", "last transition", 20),
        Column("slow", "slow", 6, right=True, shown_from=110),
        Column("failed", "failed", 6, right=True, shown_from=110),
        Column("refused", "refused", 7, right=True, shown_from=110),
        Column("since", "in this state", 14, shown_from=110),
        Column("reason", "reason", 8, flex=True, shown_from=110),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("T", "change_breaker('trip')", "Trip", tooltip="Open it as if calls had failed"),
        Binding("R", "change_breaker('reset')", "Reset", tooltip="Close it"),
        Binding("F", "change_breaker('force-open')", "Force open", tooltip="Refuse all calls"),
        Binding("X", "change_breaker('disable')", "Disable", tooltip="Permit all calls"),
    ]

    def rows(self, state: ServiceState) -> Iterable[Row]:
        now = state.now
        for breaker in now.breakers if now else ():
            assert now is not None
            yield Row(breaker.name, _cells(breaker, now.at))

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        return breaker_text(state, key)

    def action_change_breaker(self, action: str) -> None:
        name, now = self.selected, self.betrace.state.now
        breaker = next((b for b in now.breakers if b.name == name), None) if now else None
        if breaker is None:
            return

        async def run() -> str:
            after = await self.betrace.client.act_on_breaker(breaker.name, action)
            return f"{breaker.name} is {words(str(after.get('state')))}"

        verb = words(action.replace("-", " ")).capitalize()
        open_for = duration(breaker.settings.get("openSeconds"))
        self.betrace.change(
            OperatorChange(
                f"{verb} breaker {breaker.name}?",
                verb,
                run,
                [("state", words(breaker.state), _AFTER[action])],
                _NOTES[action].format(open_for=open_for),
            )
        )


def _cells(breaker: BreakerStatus, now: float) -> tuple[Cell, ...]:
    tone = status_tone(breaker.state)
    last = breaker.transitions[-1] if breaker.transitions else None
    closed = breaker.state == "closed"
    trial = NONE if closed else trial_text(breaker.state, breaker.retry_in)
    if trial.startswith(("only", "calls")):
        trial = "operator"
    when, latest = (last.at, f"{clock(last.at)} {words(last.after)}") if last else (0.0, NONE)
    failed = breaker.calls.get("failed", 0) + breaker.calls.get("timed_out", 0)
    refused = breaker.calls.get("not_permitted", 0)
    return (
        Cell(breaker.name),
        Cell(f"{SYMBOLS[tone]} {words(breaker.state)}", tone),
        Cell(percent(breaker.failure_rate), order=breaker.failure_rate or 0.0),
        Cell(number(breaker.window_calls), order=breaker.window_calls),
        Cell(trial, order=breaker.retry_in or 0.0),
        Cell(latest, order=when),
        Cell(percent(breaker.slow_rate), order=breaker.slow_rate or 0.0),
        Cell(number(failed), order=failed),
        Cell(number(refused), order=refused),
        Cell(duration(now - breaker.since) if breaker.since else NONE, order=breaker.since or 0),
        Cell(last.reason if last else NONE),
    )
