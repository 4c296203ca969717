"""The process and what it keeps: memory, CPU, threads, stores, the log, the checkpoint."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content

from betrace.tui.client import ClientError, Json
from betrace.tui.panels.details import plot
from betrace.tui.state import State
from betrace.tui.widgets.basic import Draw, Section, fields, marked, toned
from betrace.tui.widgets.changes import Change
from betrace.tui.widgets.listing import mapping, objects
from betrace.tui.widgets.panel import Panel
from betrace.tui.widgets.text import (
    NONE,
    count,
    date,
    duration,
    many,
    moment,
    number,
    percent,
    size,
    status_tone,
)

_NARROW = 60


class SystemPanel(Panel):
    TITLE = "System"
    RELOAD = 5.0

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("C", "change_checkpoint", "Checkpoint", tooltip="Save a checkpoint now"),
        Binding("F", "change_replay", "Write back", tooltip="Replay the fallback files now"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._checkpoint: Json = {}
        self._read_at = 0.0
        self._fallbacks: list[Json] = []
        self.problem = ""

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="system"):
            yield Section("Process", id="system-process")
            yield Section("Stores, log and fallback", id="system-stores")
            yield Section("Checkpoint", id="system-checkpoint")

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

    def show(self, state: State) -> None:
        self._draw("process", lambda width: process_text(state, width))
        self._draw("stores", lambda _: stores_text(state, self._fallbacks))
        self._draw("checkpoint", lambda _: self._checkpoint_text(state))

    def _draw(self, name: str, draw: Draw) -> None:
        self.query_one(f"#system-{name}", Section).body.draw(draw)

    def _checkpoint_text(self, state: State) -> Content:
        found, covers = self._checkpoint, mapping(self._checkpoint.get("covers"))
        if self.problem:
            return Content.assemble(marked(f"not read: {self.problem}", "bad"))
        if not found:
            return Content("is read …")
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
            ("a restart reads", f"{size(left)} of the log beyond it"),
            ("failures", marked(count(failures), "bad") if failures else "none"),
        )

    def _age(self, state: State) -> str:
        now = state.now.at if state.now else self._read_at
        age = (self._checkpoint.get("ageSeconds") or 0) + max(0.0, now - self._read_at)
        return duration(age) if self._checkpoint.get("savedAt") else "there is none yet"

    def _saved(self) -> str:
        saving = ", one is being saved" if self._checkpoint.get("saving") else ""
        return date(moment(self._checkpoint.get("savedAt"))) + saving

    # Keys

    def action_change_checkpoint(self) -> None:
        async def run() -> str:
            after = await self.betrace.client.save_checkpoint()
            return f"checkpoint saved: {size(after.get('bytes'))}"

        effects = [("age of the checkpoint", self._age(self.betrace.state), "0 s")]
        note = "What has left the traces is stored first, which may take half a minute."
        self.betrace.change(Change("Save a checkpoint now?", "Save", run, effects, note))

    def action_change_replay(self) -> None:
        waiting = sum(each.get("pendingRecords") or 0 for each in self._fallbacks)

        async def run() -> str:
            await self.betrace.client.replay_fallback()
            return "the local files are written back, as far as the stores take them"

        effects = [("records in local files", count(waiting), "written back")]
        note = "They are written back by themselves when the store's breaker permits it."
        self.betrace.change(
            Change("Write the local files back now?", "Write back", run, effects, note)
        )


def process_text(state: State, width: int) -> Content:
    """Of the process: figures, and the last minutes of memory and CPU."""
    now = state.now
    if now is None:
        return Content("is read …")
    system = mapping(now.raw.get("system"))
    memory, cpu = mapping(system.get("memory")), mapping(system.get("cpu"))
    windows = mapping(now.raw.get("traceWindows"))
    collections = mapping(system.get("gc")).get("collections")
    used = state.rate("cpu")
    cores = cpu.get("cores") or 1
    room = max(10, min(_NARROW, width - 40))
    memories, cpus = state.history("memory"), state.history("cpu")
    return fields(
        (
            "memory",
            f"{size(memory.get('rssBytes')):<10} {plot(memories, room)}",
        ),
        (
            "CPU",
            f"{percent(used) + ' of a core':<17} {plot(cpus, room - 7, float(cores))}",
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


def stores_text(state: State, fallbacks: list[Json]) -> Content:
    """Of the components that are no stage: how they are; and what waits for them."""
    now = state.now
    if now is None:
        return Content("is read …")
    stages = {stage.name for stage in now.stages}
    lines: list[tuple[str, str | tuple[str, str] | Content]] = [
        (each.name, marked(f"{each.status}: {each.detail}", status_tone(each.status)))
        for each in now.components
        if each.name not in stages and not each.name.startswith(("breaker-", "fallback-"))
    ]
    for each in fallbacks:
        waiting = each.get("pendingRecords") or 0
        told = (
            marked(f"{many(waiting, 'record')} waiting, {size(each.get('pendingBytes'))}", "busy")
            if waiting
            else toned("nothing waits", "quiet")
        )
        lines.append((f"fallback {each.get('name')}", told))
    return fields(*lines)
