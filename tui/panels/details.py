"""What `Enter` opens: a stage, a breaker or a cache in full."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from textual.content import Content

from betrace.tui.panels.drawing import condition
from betrace.tui.state import State
from betrace.tui.widgets.basic import Detail, fields, marked, toned
from betrace.tui.widgets.text import (
    NONE,
    ago,
    bar,
    clock,
    count,
    duration,
    fill_tone,
    many,
    millis,
    number,
    percent,
    status_tone,
    words,
)

if TYPE_CHECKING:
    from betrace.tui.app import BetraceApp

BLOCKS = " ▁▂▃▄▅▆▇█"


def show_stage(app: BetraceApp, name: str) -> None:
    app.push_screen(Detail(f"Stage {name}", lambda state, width: stage_text(state, name, width)))


def show_breaker(app: BetraceApp, name: str) -> None:
    app.push_screen(Detail(f"Breaker {name}", lambda state, _: breaker_text(state, name)))


def show_cache(app: BetraceApp, name: str) -> None:
    app.push_screen(Detail(f"Cache {name}", lambda state, width: cache_text(state, name, width)))


def plot(points: list[float], width: int, top: float | None = None) -> str:
    """A line of blocks, the last point at the right end; ``top`` is a full block."""
    points = points[-max(1, width) :]
    most = top if top is not None else max(points, default=0.0)
    steps = len(BLOCKS) - 1
    return "".join(
        BLOCKS[min(steps, max(1 if value > 0 else 0, round(value / most * steps)))]
        if most > 0
        else BLOCKS[0]
        for value in points
    )


def stage_text(state: State, name: str, width: int) -> Content | None:
    now = state.now
    stage = next((s for s in now.stages if s.name == name), None) if now else None
    if now is None or stage is None:
        return None
    tone, word = condition(stage, state)
    unit = stage.unit
    room = max(10, width - 16)
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
                        f"{many(stage.blocked, 'sender')} "
                        f"{'waits' if stage.blocked == 1 else 'wait'} for room",
                        "bad",
                    )
                    if stage.blocked
                    else "no sender waits",
                ),
            ),
            Content(""),
            fields(
                (f"{unit} in", f"{count(stage.taken)}  ({number(state.rate(f'{name}.in'))}/s)"),
                (f"{unit} out", f"{count(stage.done)}  ({number(state.rate(f'{name}.out'))}/s)"),
                ("errors", count(stage.errors)),
                ("dropped", count(stage.dropped)),
                (
                    "a batch takes",
                    f"p50 {millis(stage.p50)}, p95 {millis(stage.p95)}, p99 {millis(stage.p99)}",
                ),
            ),
            Content(""),
            fields(
                (f"{unit}/s out", plot(state.history(f"{name}.out"), room)),
                ("fill", plot(state.history(f"{name}.fill"), room, 100.0)),
            ),
        ]
    )


def breaker_text(state: State, name: str) -> Content | None:
    now = state.now
    breaker = next((b for b in now.breakers if b.name == name), None) if now else None
    if now is None or breaker is None:
        return None
    limits = breaker.settings

    def limit(key: str) -> float:
        return limits.get(key, 0.0)

    held = f" for {duration(now.at - breaker.since)}" if breaker.since else ""
    lines = [
        fields(
            ("state", marked(words(breaker.state) + held, status_tone(breaker.state))),
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
                f"a call may take {limit('timeoutSeconds'):g} s; open for "
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
            f"{_when(each.at)}  {words(each.before)} → ",
            marked(words(each.after), status_tone(each.after)),
            f"  {each.reason}",
        )
        for each in reversed(breaker.transitions)
    ]
    if not breaker.transitions:
        lines.append(Content.assemble(toned("none since the start", "quiet")))
    return Content("\n").join(lines)


def trial_text(state: str, retry_in: float | None) -> str:
    """When a call may be tried again."""
    if state in ("closed", "disabled"):
        return "calls are permitted"
    if retry_in is None:
        return "not before an operator resets it"
    return f"in {duration(retry_in)}" if retry_in >= 1 else "now"


def cache_text(state: State, name: str, width: int) -> Content | None:
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
            ("a load takes", f"{millis(cache.load_ms)} on average"),
        ),
        Content(""),
        Content("hit rate over time, while there were requests (full: 100 %)"),
        Content(plot(points, width, 1.0)),
    ]
    return Content("\n").join(lines)


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d ", time.localtime(at)) + clock(at)
