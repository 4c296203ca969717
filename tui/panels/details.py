"""The details of a stage, a breaker or a cache."""

from __future__ import annotations

from textual.content import Content

from betrace.tui.base import BaseApp
from betrace.tui.format import (
    NONE,
    ago,
    bar,
    count,
    date,
    duration,
    many,
    millis,
    number,
    percent,
    plot,
    words,
)
from betrace.tui.panels.health import stage_condition
from betrace.tui.panels.history_graph import history_graph
from betrace.tui.state import ServiceState
from betrace.tui.tones import fill_tone, marked, status_tone, toned
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.fields import fields


def show_stage(app: BaseApp, name: str) -> None:
    app.push_screen(Detail(f"Stage {name}", lambda state, width: stage_text(state, name, width)))


def stage_text(state: ServiceState, name: str, width: int) -> Content | None:
    now = state.now
    stage = next((s for s in now.stages if s.name == name), None) if now else None
    if now is None or stage is None:
        return None
    tone, word = stage_condition(stage, state)
    unit = stage.unit
    room = max(10, width - 40)
    return Content("\n").join(
        [
            fields(
                ("state", marked(f"{word}: {stage.detail}" if tone != "good" else word, tone)),
                ("workers", f"{stage.busy} busy of {stage.workers}"),
                ("last progress", ago(stage.last_progress, now.at)),
                ("last error", stage.last_error or "none"),
            ),
            Content(""),
            fields(
                (
                    "channel",
                    Content.assemble(
                        toned(bar(stage.fill / 100, 20), fill_tone(stage.fill, stage.blocked)),
                        f" {percent(stage.fill / 100)}: {count(stage.size)} of "
                        f"{count(stage.capacity)} {unit}",
                    ),
                ),
                ("peak", f"{count(stage.peak)} {unit} in the last second"),
                (
                    "blocked",
                    marked(
                        f"{many(stage.blocked, 'sender')} blocked by the full channel",
                        "bad",
                    )
                    if stage.blocked
                    else "no",
                ),
            ),
            Content(""),
            fields(
                (f"{unit} in", f"{count(stage.taken)}  ({number(state.rate(f'{name}.in'))}/s)"),
                (f"{unit} out", f"{count(stage.done)}  ({number(state.rate(f'{name}.out'))}/s)"),
                ("errors", count(stage.errors)),
                ("dropped", count(stage.dropped)),
                (
                    "time per batch",
                    f"p50 {millis(stage.p50)}, p95 {millis(stage.p95)}, p99 {millis(stage.p99)}",
                ),
            ),
            Content(""),
            fields(
                (f"{unit}/s out", history_graph(state, f"{name}.out", room, number)),
                ("fill", history_graph(state, f"{name}.fill", room, _percent, 100.0)),
            ),
        ]
    )


def breaker_text(state: ServiceState, name: str) -> Content | None:
    now = state.now
    breaker = next((b for b in now.breakers if b.name == name), None) if now else None
    if now is None or breaker is None:
        return None
    limits = breaker.settings

    def limit(key: str) -> float:
        return limits.get(key, 0.0)

    lasting = f" for {duration(now.at - breaker.since)}" if breaker.since else ""
    lines = [
        fields(
            ("state", marked(words(breaker.state) + lasting, status_tone(breaker.state))),
            ("next trial", trial_text(breaker.state, breaker.retry_in)),
            (
                "failures",
                f"{percent(breaker.failure_rate)} of the last "
                f"{many(breaker.window_calls, 'call')}; opens at {percent(limit('failureRate'))} "
                f"of {limit('minimumCalls'):.0f} to {limit('windowCalls'):.0f}",
            ),
            (
                "slow calls",
                f"{percent(breaker.slow_rate)}; opens at {percent(limit('slowCallRate'))} over "
                f"{limit('slowCallSeconds'):g} s",
            ),
            (
                "limits",
                f"calls time out after {limit('timeoutSeconds'):g} s; open for "
                f"{limit('openSeconds'):g} s, then {many(int(limit('halfOpenCalls')), 'trial')}",
            ),
            (
                "running",
                f"{many(breaker.running, 'call')}, {many(breaker.trials_left, 'trial')} left",
            ),
            (
                "calls",
                ", ".join(f"{words(k)} {count(n)}" for k, n in breaker.calls.items()) or NONE,
            ),
        ),
        Content(""),
        Content.assemble(("Transitions", "bold"), " (newest first)"),
    ]
    lines += [
        Content.assemble(
            f"{date(each.at)}  {words(each.before)} → ",
            marked(words(each.after), status_tone(each.after)),
            f"  {each.reason}",
        )
        for each in reversed(breaker.transitions)
    ]
    if not breaker.transitions:
        lines.append(Content.assemble(toned("none since the service started", "quiet")))
    return Content("\n").join(lines)


def trial_text(state: str, retry_in: float | None) -> str:
    """When the next trial call is permitted."""
    if state in ("closed", "disabled"):
        return "calls are permitted"
    if retry_in is None:
        return "only after an operator resets it"
    return f"in {duration(retry_in)}" if retry_in >= 1 else "now"


def cache_text(state: ServiceState, name: str, width: int) -> Content | None:
    now = state.now
    cache = next((c for c in now.caches if c.name == name), None) if now else None
    if cache is None:
        return None
    points = state.history(f"{name}.hit_rate")
    fill = cache.size / cache.capacity if cache.capacity else 0.0
    lines = [
        fields(
            (
                "size",
                f"{bar(fill, 20)} {percent(fill)}: {count(cache.size)} of {count(cache.capacity)}",
            ),
            ("hits", f"{count(cache.hits)}, misses {count(cache.misses)}"),
            ("hit rate", f"{percent(cache.hit_rate)} since the start"),
            ("now", percent(points[-1]) if points else f"{NONE} (no requests yet)"),
            ("evictions", count(cache.evictions)),
            ("loads", f"{count(cache.loads)}, failed {count(cache.load_failures)}"),
            ("time per load", f"{millis(cache.load_ms)} on average"),
        ),
        Content(""),
        Content("hit rate over time, one column for each second with requests; full is 100 %"),
        Content(plot(points, width, 1.0)),
    ]
    return Content("\n").join(lines)


def _percent(value: float) -> str:
    return f"{value:.0f} %"
