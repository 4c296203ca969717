"""One row for each stage and its channel; pause, resume and drain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content

from betrace.tui.changes import OperatorChange
from betrace.tui.format import age, millis, number, plot, plural
from betrace.tui.panels.details import stage_text
from betrace.tui.panels.health import stage_condition
from betrace.tui.state import ServiceSnapshot, ServiceState
from betrace.tui.tones import SYMBOLS, fill_tone, marked, status_tone
from betrace.tui.widgets.live_text import LiveText
from betrace.tui.widgets.table_panel import Cell, Column, Row, TablePanel

DRAIN_SECONDS = 10


def _waiting(now: ServiceSnapshot) -> list[str | tuple[str, str]]:
    """The tenants that wait for CPU, if any."""
    names = ", ".join(each.name for each in now.waiting[:3])
    more = "…" if len(now.waiting) > 3 else ""
    return ["   ", marked(f"waiting for CPU: {names}{more}", "busy")] if names else []


class PipelinePanel(TablePanel):
    TITLE = "Pipeline"
    NOUN = "Stage"

    COLUMNS = (
        Column("stage", "stage", 19),
        Column("in", "in/s", 5, right=True),
        Column("out", "out/s", 5, right=True),
        Column("errors", "errs", 4, right=True),
        Column("dropped", "drop", 4, right=True),
        Column("fill", "fill", 6, right=True),
        Column("peak", "peak", 5, right=True),
        Column("blocked", "blkd", 4, right=True),
        Column("workers", "work", 4, right=True),
        Column("p99", "p99", 7, right=True),
        Column("progress", "last", 6, right=True),
        Column("state", "state", 11),
        Column("unit", "unit", 7),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("P", "change_pause", "Pause", tooltip="Refuse new spans"),
        Binding("R", "change_resume", "Resume", tooltip="Accept spans again"),
        Binding(
            "D",
            "change_drain",
            "Drain",
            tooltip="Refuse new spans and wait until the channels are empty",
        ),
    ]

    def above(self) -> ComposeResult:
        yield LiveText(id="ingestion")

    def show(self, state: ServiceState) -> None:
        now = state.now
        if now is not None:
            tone = status_tone(now.ingestion) if now.ingestion != "open" else "good"
            self.query_one("#ingestion", LiveText).text(
                "ingestion ",
                marked(now.ingestion, tone),
                *_waiting(now),
                f"   {number(now.in_flight)} {plural(now.in_flight, 'span')} in flight, "
                f"{number(now.open_traces)} open {plural(now.open_traces, 'trace')}",
            )
        super().show(state)

    def rows(self, state: ServiceState) -> Iterable[Row]:
        now = state.now
        for stage in now.stages if now else ():
            tone, word = stage_condition(stage, state)
            in_rate, out_rate = (state.rate(f"{stage.name}.{side}") for side in ("in", "out"))
            assert now is not None
            yield Row(
                stage.name,
                (
                    Cell(f"{SYMBOLS['quiet' if word == 'idle' else tone]} {stage.name}", tone),
                    Cell(number(in_rate), order=in_rate or 0.0),
                    Cell(number(out_rate), order=out_rate or 0.0),
                    Cell(number(stage.errors), "busy" if stage.errors else None, stage.errors),
                    Cell(number(stage.dropped), "bad" if stage.dropped else None, stage.dropped),
                    Cell(
                        f"{plot([stage.fill], 1, 100.0)} {stage.fill:.0f}%",
                        fill_tone(stage.fill, stage.blocked),
                        stage.fill,
                    ),
                    Cell(number(stage.peak), order=stage.peak),
                    Cell(str(stage.blocked), "bad" if stage.blocked else None, stage.blocked),
                    Cell(f"{stage.busy}/{stage.workers}", order=stage.busy),
                    Cell(millis(stage.p99), order=stage.p99 or 0.0),
                    Cell(age(stage.last_progress, now.at), order=stage.last_progress or 0.0),
                    Cell(word, tone),
                    Cell(stage.unit),
                ),
            )

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        return stage_text(state, key, width)

    @property
    def _ingestion(self) -> str:
        now = self.betrace.state.now
        return now.ingestion if now else "unknown"

    def action_change_pause(self) -> None:
        async def run() -> str:
            return f"ingestion is {(await self.betrace.client.pause()).get('ingestion')}"

        self.betrace.change(
            OperatorChange(
                "Pause ingestion?",
                "Pause",
                run,
                [("ingestion", self._ingestion, "paused")],
                "New spans are refused with 503 until you resume it; exporters retry for a while. "
                "Accepted spans are still processed.",
            )
        )

    def action_change_resume(self) -> None:
        async def run() -> str:
            return f"ingestion is {(await self.betrace.client.resume()).get('ingestion')}"

        effects = [("ingestion", self._ingestion, "open")]
        self.betrace.change(OperatorChange("Resume ingestion?", "Resume", run, effects))

    def action_change_drain(self) -> None:
        async def run() -> str:
            answer = await self.betrace.client.drain(DRAIN_SECONDS)
            if answer.get("drained"):
                return "drained: the channels are empty"
            waiting = answer.get("waiting") or {}
            left = ", ".join(f"{name} {size}" for name, size in waiting.items())
            return f"still not empty after {DRAIN_SECONDS} s: {left}"

        self.betrace.change(
            OperatorChange(
                "Drain the pipeline?",
                "Drain",
                run,
                [("ingestion", self._ingestion, "paused"), ("channels", "in use", "empty")],
                f"New spans are refused. BeTrace waits up to {DRAIN_SECONDS} s for the channels to "
                "empty. Ingestion stays paused until you resume it.",
            )
        )
