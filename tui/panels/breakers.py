"""The circuit breakers, and what an operator can do to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.binding import Binding, BindingType

from betrace.tui.panels.details import show_breaker, trial_text
from betrace.tui.state import Breaker, State
from betrace.tui.widgets.changes import Change
from betrace.tui.widgets.table import Cell, Column, Row, TablePanel
from betrace.tui.widgets.text import (
    NONE,
    SYMBOLS,
    clock,
    duration,
    number,
    percent,
    status_tone,
    words,
)

_AFTER = {"trip": "open", "reset": "closed", "force-open": "forced open", "disable": "disabled"}
_NOTES = {
    "trip": "Calls are refused as if they had failed; trials follow after {open_for}.",
    "reset": "Calls are permitted, and the window of calls begins anew.",
    "force-open": "All calls are refused until another action; there are no trials.",
    "disable": "All calls are permitted whatever happens, until another action.",
}


class BreakersPanel(TablePanel):
    TITLE = "Breakers"

    COLUMNS = (
        Column("name", "breaker", 15),
        Column("state", "state", 13),
        Column("failures", "fails", 6, right=True),
        Column("calls", "calls", 5, right=True),
        Column("trial", "trial", 9),
        Column("last", "last transition", 20),
        Column("slow", "slow", 6, right=True),
        Column("failed", "failed", 6, right=True),
        Column("refused", "refused", 7, right=True),
        Column("since", "in this state", 14),
        Column("reason", "why"),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("T", "change_breaker('trip')", "Trip", tooltip="Open it as failures would"),
        Binding("R", "change_breaker('reset')", "Reset", tooltip="Close it"),
        Binding("F", "change_breaker('force-open')", "Force open", tooltip="Refuse all calls"),
        Binding("X", "change_breaker('disable')", "Disable", tooltip="Permit all calls"),
    ]

    def rows(self, state: State) -> Iterable[Row]:
        now = state.now
        for breaker in now.breakers if now else ():
            assert now is not None
            yield Row(breaker.name, _cells(breaker, now.at))

    def drill(self, key: str) -> None:
        show_breaker(self.betrace, key)

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
            Change(
                f"{verb} the breaker {breaker.name}?",
                verb,
                run,
                [("state", words(breaker.state), _AFTER[action])],
                _NOTES[action].format(open_for=open_for),
            )
        )


def _cells(breaker: Breaker, now: float) -> tuple[Cell, ...]:
    tone = status_tone(breaker.state)
    last = breaker.transitions[-1] if breaker.transitions else None
    closed = breaker.state == "closed"
    trial = NONE if closed else trial_text(breaker.state, breaker.retry_in)
    if trial.startswith(("not", "calls")):
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
