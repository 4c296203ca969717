"""The pipeline as a diagram: one box for each stage with its input channel."""

from __future__ import annotations

from textual.content import Content

from betrace.tui.format import bar, millis, number, words
from betrace.tui.panels.health import stage_condition
from betrace.tui.state import ServiceState, StageStatus
from betrace.tui.tones import STYLES, SYMBOLS, fill_tone, toned

Parts = list[str | tuple[str, str]]

MIN_INNER = 8


def draw_pipeline(state: ServiceState, width: int, chosen: int | None = None) -> Content:
    """Seven lines. The box of ``chosen`` has double edges. The sign before a box shows its input:
    → spans arrive, · nothing arrives, ■ the stage before is blocked by a full channel."""
    now = state.now
    if now is None or not now.stages:
        return Content("")
    boxes = len(now.stages)
    inner = max(MIN_INNER, (width - (boxes - 1)) // boxes - 2)
    lines: list[Parts] = [[] for _ in range(7)]
    for index, stage in enumerate(now.stages):
        if index:
            _arrow(lines, state, stage)
        for line, parts in zip(lines, _box(state, stage, inner, index == chosen), strict=True):
            line.extend(parts)
    return Content("\n").join(Content.assemble(*line) for line in lines)


def _arrow(lines: list[Parts], state: ServiceState, stage: StageStatus) -> None:
    for row, line in enumerate(lines):
        if row != 1:
            line.append(" ")
        elif stage.blocked:
            line.append(toned("■", "bad"))
        else:
            line.append("→" if state.rate(f"{stage.name}.in") else toned("·", "quiet"))


def _box(state: ServiceState, stage: StageStatus, inner: int, chosen: bool) -> list[Parts]:
    tone, word = stage_condition(stage, state)
    edge = STYLES[tone] if tone != "good" else ("$primary" if chosen else "$text-muted")
    top_left, top_right, bottom_left, bottom_right, flat, side = "╔╗╚╝═║" if chosen else "╭╮╰╯─│"
    name = stage.name if len(stage.name) <= inner - 2 else stage.name.rpartition("-")[2]
    name = f" {name[: inner - 2]} "
    share = f"{stage.fill:.0f}%"
    peak = stage.peak / stage.capacity if stage.capacity else 0.0
    fill = bar(stage.fill / 100, max(1, inner - 5), peak)
    rate = state.rate(f"{stage.name}.out")
    fill_style = STYLES[fill_tone(stage.fill, stage.blocked)]
    symbol = SYMBOLS["quiet" if word == "idle" else tone]
    rows: list[Parts] = [
        [(fill, fill_style), f"{share:>5}"],
        [f"{number(stage.size)} of {number(stage.capacity)}"],
        [f"{number(rate)} {words(stage.unit)}/s"],
        [f"p99 {millis(stage.p99)}"],
        [(f"{symbol} {word}", STYLES[tone])],
    ]
    return [
        [(top_left + flat, edge), name, (flat * (inner - 1 - len(name)) + top_right, edge)],
        *([(side, edge), *_fit(row, inner), (side, edge)] for row in rows),
        [(bottom_left + flat * inner + bottom_right, edge)],
    ]


def _fit(parts: Parts, width: int) -> Parts:
    """Parts cut or padded to a width."""
    fitted: Parts = []
    left = width
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        text = text[:left]
        left -= len(text)
        fitted.append((text, style))
    return [*fitted, " " * left]
