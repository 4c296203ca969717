"""What is not well, the worst first."""

from __future__ import annotations

from betrace.tui.state import State
from betrace.tui.widgets.text import Tone, clock, fill_tone, number, percent

_WORST: dict[Tone, int] = {"bad": 0, "busy": 1, "good": 2, "quiet": 3}


def problems(state: State) -> list[tuple[Tone, str]]:
    """Sentences with their tone; empty if all is well."""
    now = state.now
    if now is None:
        return []
    found: list[tuple[Tone, str]] = []
    if state.stale:
        found.append(("bad", f"no connection: as it was at {clock(now.at)}"))
    if not now.ready:
        found.append(("bad", "the service is not ready"))
    if now.ingestion != "open":
        found.append(("busy", f"ingestion is {now.ingestion}"))
    refused = state.rate("refused")
    if refused:
        found.append(("bad", f"{number(refused)} spans/s refused"))
    for stage in now.stages:
        tone = fill_tone(stage.fill, stage.blocked)
        if tone != "good":
            text = f"{stage.name} is {percent(stage.fill / 100)} full"
            if stage.blocked:
                text += f", {stage.blocked} blocked"
            found.append((tone, text))
    for component in now.components:
        if component.status not in ("ok", ""):
            refuses = component.detail in ("open", "forced_open")  # of a breaker
            tone = "bad" if component.status == "failed" or refuses else "busy"
            name = component.name.replace("breaker-", "breaker ").replace("fallback-", "fallback ")
            detail = component.detail.replace("_", " ") or component.status
            found.append((tone, f"{name}: {detail}"))
    found.sort(key=lambda each: _WORST[each[0]])
    return found
