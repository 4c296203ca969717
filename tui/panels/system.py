"""The process: memory, CPU, threads, stores, the span log and the checkpoint."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content

from betrace.tui.changes import OperatorChange
from betrace.tui.client import ClientError
from betrace.tui.format import NONE, count, date, duration, many, moment, number, percent, size
from betrace.tui.json_values import Json, mapping, objects
from betrace.tui.panels.history_graph import history_graph
from betrace.tui.state import ServiceState
from betrace.tui.tones import marked, status_tone, toned
from betrace.tui.widgets.fields import fields
from betrace.tui.widgets.live_text import Draw
from betrace.tui.widgets.panel import Panel
from betrace.tui.widgets.titled_box import TitledBox

_NARROW = 60


class SystemPanel(Panel):
    TITLE = "System"
    RELOAD = 5.0

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("C", "change_checkpoint", "Checkpoint", tooltip="Save a checkpoint now"),
        Binding(
            "F",
            "change_replay",
            "Write back",
            tooltip="Write the fallback files back to the stores now",
        ),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._checkpoint: Json = {}
        self._read_at = 0.0
        self._fallbacks: list[Json] = []
        self.problem = ""

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="system"):
            yield TitledBox("Process", id="system-process")
            yield TitledBox("Stores, log and fallback files", id="system-stores")
            yield TitledBox("Checkpoint", id="system-checkpoint")

    async def load(self) -> None:
        client = self.betrace.client
        try:
            self._fallbacks = objects((await client.get("/api/admin/fallback")).get("fallbacks"))
            self._checkpoint = await client.get("/api/admin/checkpoint")
            self._read_at = self.betrace.clock()
            self.problem = ""
        except ClientError as error:
            self.problem = str(error)
            raise
        finally:
            if self.betrace.frozen_at is None:
                self.show(self.betrace.state)

    def show(self, state: ServiceState) -> None:
        self._draw("process", lambda width: process_text(state, width))
        self._draw("stores", lambda _: stores_text(state, self._fallbacks))
        self._draw("checkpoint", lambda _: self._checkpoint_text(state))

    def _draw(self, name: str, draw: Draw) -> None:
        self.query_one(f"#system-{name}", TitledBox).body.draw(draw)

    def _checkpoint_text(self, state: ServiceState) -> Content:
        found, covers = self._checkpoint, mapping(self._checkpoint.get("covers"))
        if self.problem:
            return Content.assemble(marked(f"not loaded: {self.problem}", "bad"))
        if not found:
            return Content("loading …")
        failures = found.get("failures") or 0
        left = found.get("toReplayBytes")
        return fields(
            ("age", self._age(state)),
            ("saved", self._saved()),
            (
                "covers",
                f"{many(covers.get('openTraces'), 'open trace')} of "
                f"{many(covers.get('tenants'), 'tenant')}, {size(found.get('bytes'))}",
            ),
            ("a restart reads", f"{size(left)} of the span log after it"),
            ("failures", marked(count(failures), "bad") if failures else "none"),
        )

    def _age(self, state: ServiceState) -> str:
        now = state.now.at if state.now else self._read_at
        age = (self._checkpoint.get("ageSeconds") or 0) + max(0.0, now - self._read_at)
        return duration(age) if self._checkpoint.get("savedAt") else "no checkpoint yet"

    def _saved(self) -> str:
        saving = ", another is being saved" if self._checkpoint.get("saving") else ""
        return date(moment(self._checkpoint.get("savedAt"))) + saving

    # Keys

    def action_change_checkpoint(self) -> None:
        async def run() -> str:
            after = await self.betrace.client.save_checkpoint()
            return f"checkpoint saved: {size(after.get('bytes'))}"

        effects = [("age of the checkpoint", self._age(self.betrace.state), "0 s")]
        note = "Decided traces are stored first, which may take half a minute."
        self.betrace.change(OperatorChange("Save a checkpoint now?", "Save", run, effects, note))

    def action_change_replay(self) -> None:
        waiting = sum(each.get("pendingRecords") or 0 for each in self._fallbacks)

        async def run() -> str:
            await self.betrace.client.replay_fallback()
            return "wrote back as many records as the stores accepted"

        effects = [("records in fallback files", count(waiting), "written back")]
        note = "The service also does this by itself as soon as the store's breaker permits calls."
        self.betrace.change(
            OperatorChange("Write the fallback files back now?", "Write back", run, effects, note)
        )


def process_text(state: ServiceState, width: int) -> Content:
    """Figures of the process, and the recent memory and CPU usage."""
    now = state.now
    if now is None:
        return Content("loading …")
    system = mapping(now.raw.get("system"))
    memory, cpu = mapping(system.get("memory")), mapping(system.get("cpu"))
    windows = mapping(now.raw.get("traceWindows"))
    collections = mapping(system.get("gc")).get("collections")
    used = state.rate("cpu")
    cores = cpu.get("cores") or 1
    busy = f"{percent(used)} of a core"
    room = max(10, min(_NARROW, width - 62))
    return fields(
        (
            "memory",
            f"{size(memory.get('rssBytes')):<17} {history_graph(state, 'memory', room, size)}",
        ),
        (
            "CPU",
            f"{busy:<17} {history_graph(state, 'cpu', room, _cores, cores)}",
        ),
        ("cores, threads", f"{cores}, {system.get('threads', NONE)}"),
        (
            "garbage coll.",
            " / ".join(number(n) for n in collections) if isinstance(collections, list) else NONE,
        ),
        (
            "traces",
            f"{count(now.open_traces)} open, {many(windows.get('totalSpansInMemory'), 'span')}, "
            f"{size(windows.get('memoryBytes'))}",
        ),
        ("running for", duration(now.uptime)),
    )


def _cores(value: float) -> str:
    return many(int(value), "core")


def stores_text(state: ServiceState, fallbacks: list[Json]) -> Content:
    """The status of the components that are not stages, and of the fallback files."""
    now = state.now
    if now is None:
        return Content("loading …")
    stages = {stage.name for stage in now.stages}
    lines: list[tuple[str, str | tuple[str, str] | Content]] = [
        (each.name, marked(f"{each.status}: {each.detail}", status_tone(each.status)))
        for each in now.components
        if each.name not in stages and not each.name.startswith(("breaker-", "fallback-"))
    ]
    for each in fallbacks:
        waiting = each.get("pendingRecords") or 0
        status = (
            marked(f"{many(waiting, 'record')} waiting, {size(each.get('pendingBytes'))}", "busy")
            if waiting
            else toned("empty", "quiet")
        )
        lines.append((f"fallback {each.get('name')}", status))
    return fields(*lines)
