"""Acknowledging a signal, and muting a rule: people say that they know."""

from __future__ import annotations

import re
from collections.abc import Callable

from betrace.tui.base import BaseApp
from betrace.tui.changes import OperatorChange
from betrace.tui.format import date, moment
from betrace.tui.json_values import Json, mapping
from betrace.tui.widgets.dialogs import Ask

_DURATION = re.compile(r"[1-9][0-9]*[smhd]")


def acknowledge(app: BaseApp, signal: Json, done: Callable[[Json], None]) -> None:
    """Ask for a note, and acknowledge a signal. Calls ``done`` with the acknowledgement."""
    identity = str(signal.get("id"))

    async def ask() -> None:
        before = acknowledged_text(signal)
        note = await app.push_screen_wait(
            Ask(
                f"Acknowledge the signal of {signal.get('rule_id')}?",
                f"It was {before}. A note" if before else "A note for others; it may be empty",
            )
        )
        if note is None:
            return

        async def run() -> str:
            done(await app.client.acknowledge(identity, note))
            return f"the signal of {signal.get('rule_id')} is acknowledged"

        app.change(OperatorChange("Acknowledge the signal?", "Acknowledge", run), sure=True)

    app.start(ask, "ask")


def mute_or_unmute(app: BaseApp, rule_id: str) -> None:
    """Ask for how long and why, and mute a rule; or end its mute."""

    async def ask() -> None:
        muted = mapping((await app.client.rule(rule_id)).get("muted"))
        if muted:
            app.change(_unmute(app, rule_id, muted))
            return
        text = await app.push_screen_wait(
            Ask(
                f"Mute rule {rule_id}?",
                "For how long, and why: 2h the bank is migrating",
                check=_check,
            )
        )
        if text is None:
            return
        duration, _, reason = text.partition(" ")

        async def run() -> str:
            answer = await app.client.mute(rule_id, duration, reason.strip())
            return f"{rule_id} is muted until {date(moment(answer.get('until')))}"

        app.change(OperatorChange(f"Mute rule {rule_id}?", "Mute", run), sure=True)

    app.start(app.reporting(ask), "ask")


def _unmute(app: BaseApp, rule_id: str, muted: Json) -> OperatorChange:
    async def run() -> str:
        await app.client.unmute(rule_id)
        return f"{rule_id} is no longer muted"

    return OperatorChange(
        f"End the mute of rule {rule_id}?",
        "Unmute",
        run,
        [("rule", f"muted until {date(moment(muted.get('until')))}", "not muted")],
        "Its signals are sent to webhooks again.",
    )


def _check(text: str) -> str:
    duration, _, reason = text.partition(" ")
    if not _DURATION.fullmatch(duration):
        return "begin with a duration such as 30m, 2h or 7d"
    return "" if reason.strip() else "say why it is muted"


def acknowledged_text(signal: Json) -> str:
    """Who acknowledged a signal; empty if nobody did."""
    found = mapping(signal.get("acknowledged"))
    if not found:
        return ""
    note = f": {found['note']}" if found.get("note") else ""
    return f"acknowledged by {found.get('by')} at {date(moment(found.get('at')))}{note}"


def muted_text(muted: Json) -> str:
    """Until when a rule is muted, by whom and why."""
    return f"until {date(moment(muted.get('until')))} by {muted.get('by')}: {muted.get('reason')}"
