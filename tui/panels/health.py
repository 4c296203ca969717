"""How the stages and the service are doing."""

from __future__ import annotations

from dataclasses import dataclass

from betrace.tui.format import clock, number, percent, words
from betrace.tui.state import ComponentStatus, ServiceState, StageStatus
from betrace.tui.tones import Tone, fill_tone

_MOST_WAITING = 5
"""Maximum number of waiting tenants listed."""

_WORST: dict[Tone, int] = {"bad": 0, "busy": 1, "good": 2, "quiet": 3}


@dataclass(frozen=True, slots=True)
class HealthProblem:
    """Something that needs attention, and the name of the panel that shows it."""

    tone: Tone
    text: str
    panel: str


def stage_condition(stage: StageStatus, state: ServiceState) -> tuple[Tone, str]:
    """The condition of a stage and its channel in a word or two."""
    busy = state.rate(f"{stage.name}.in")
    if stage.status == "failed":
        return "bad", "stalled"
    if state.rate(f"{stage.name}.dropped"):
        return "bad", "dropping"
    if stage.state == "paused":
        return "busy", "paused"
    if stage.blocked:
        return "bad", f"{stage.blocked} blocked"
    tone = fill_tone(stage.fill)
    if tone != "good":
        return tone, "full" if tone == "bad" else "filling"
    if stage.status in ("starting", "stopping"):
        return "busy", stage.status
    return "good", "working" if busy or stage.busy or stage.size else "idle"


def problems(state: ServiceState) -> list[HealthProblem]:
    """All problems, the worst first."""
    now = state.now
    if now is None:
        return []
    found: list[HealthProblem] = []
    if state.stale:
        text = f"no connection; this is the state at {clock(now.at)}"
        found.append(HealthProblem("bad", text, "SystemPanel"))
    if not now.ready:
        found.append(HealthProblem("bad", "the service is not ready", "SystemPanel"))
    if now.ingestion != "open":
        found.append(HealthProblem("busy", f"ingestion is {now.ingestion}", "PipelinePanel"))
    refused = state.rate("refused")
    if refused:
        found.append(HealthProblem("bad", f"{number(refused)} spans/s refused", "PipelinePanel"))
    for stage in now.stages:
        tone = fill_tone(stage.fill, stage.blocked)
        if tone != "good":
            text = f"{stage.name} is {percent(stage.fill / 100)} full"
            if stage.blocked:
                text += f", {stage.blocked} blocked"
            found.append(HealthProblem(tone, text, "PipelinePanel"))
    found += [
        HealthProblem("busy", f"tenant {each.name} waits for CPU", "TenantsPanel")
        for each in now.waiting[:_MOST_WAITING]
    ]
    stages = {stage.name for stage in now.stages}
    found += [
        _of_component(each, stages) for each in now.components if each.status not in ("ok", "")
    ]
    found.sort(key=lambda each: _WORST[each.tone])
    return found


def _of_component(component: ComponentStatus, stages: set[str]) -> HealthProblem:
    refuses = component.detail in ("open", "forced_open")  # a breaker
    tone: Tone = "bad" if component.status == "failed" or refuses else "busy"
    name, panel = component.name, "SystemPanel"
    if name.startswith("breaker-"):
        name, panel = name.replace("breaker-", "breaker "), "BreakersPanel"
    elif name.startswith("fallback-"):
        name = name.replace("fallback-", "fallback ")
    elif name == "dead-letters":
        name, panel = "dead letters", "DeadLettersPanel"
    elif name == "rules":
        panel = "RulesPanel"
    elif name in stages:
        panel = "PipelinePanel"
    return HealthProblem(tone, f"{name}: {words(component.detail) or component.status}", panel)


def badges(state: ServiceState) -> dict[str, tuple[str, Tone]]:
    """The number of problems and the worst tone for each panel that shows one. The panel of dead
    letters has their number instead."""
    found: dict[str, tuple[str, Tone]] = {}
    for problem in problems(state):
        number_, tone = found.get(problem.panel, ("0", problem.tone))
        found[problem.panel] = str(int(number_) + 1), tone
    if "DeadLettersPanel" in found and state.now is not None:
        _, tone = found["DeadLettersPanel"]
        details = {each.name: each.detail for each in state.now.components}
        letters = details.get("dead-letters", "").partition(" ")[0]
        if letters.isdigit():
            found["DeadLettersPanel"] = number(int(letters)), tone
    return found
