"""Screens in typical states, for the snapshots and for the pictures of the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from tests.support.tui_fake import T0, FakeApi, screen_text, snapshot_at, until


@dataclass(frozen=True)
class Scene:
    """Keys to press, and an event of the service before them."""

    keys: Sequence[str]
    happens: Callable[[FakeApi], None] | None = None
    read_only: bool = False
    cluster: bool = False
    """Whether the service is part of a cluster."""
    both: bool = False
    """Whether there is also a snapshot at 120×40."""
    wide: bool = False
    """Whether there is also a snapshot at 200×50."""
    shows: Mapping[str, str] = field(default_factory=dict)
    """Text that appears when the work started by a key is done, for keys that wait for the
    service."""


def overloaded(api: FakeApi) -> None:
    """The store is slow: channels fill up to the receiver, which refuses spans."""
    data = snapshot_at(61)
    fills = ((92, 0, 1), (100, 1, 1), (94, 1, 1), (62, 0, 2), (14, 0, 2))
    for queue, (fill, blocked, busy) in zip(data["queues"], fills, strict=True):
        size = queue["capacity"] * fill // 100
        queue |= {"utilizationPercent": float(fill), "currentSize": size, "peak": size}
        queue |= {"waitingSenders": blocked, "busyConsumers": busy}
    data["metrics"]["spansRefused"]["overloaded"] = 4321
    api.publish(data)


def paused(api: FakeApi) -> None:
    """An operator paused ingestion; a stage had errors and stalls."""
    data = snapshot_at(61)
    data["pipeline"]["ingestion"] = "paused"
    worked: dict[str, Any] = data["metrics"]["stages"]["storage-write"]
    worked |= {"errors": 14, "dead": 2, "lastError": "disk I/O error", "lastProgress": T0 - 42}
    stalled = {"status": "failed", "detail": "no progress for 30 s with input waiting"}
    data["components"]["storage-write"] = stalled
    api.publish(data)


SCENES = {
    "overview": Scene(("1",), both=True, wide=True),
    "overview-overloaded": Scene(("1", "l"), overloaded, both=True),
    "pipeline": Scene(("2",), both=True),
    "pipeline-paused": Scene(("2", "s", "j"), paused),
    "stage": Scene(("2", "j", "enter"), overloaded),
    "breakers": Scene(("3", "j"), both=True),
    "breaker": Scene(("3", "j", "enter")),
    "confirm": Scene(("3", "j", "R")),
    "caches": Scene(("4",), both=True),
    "cache": Scene(("4", "enter")),
    "signals": Scene(("5",), both=True, wide=True),
    "signals-by-rule": Scene(("5", "b")),
    "signal": Scene(("5", "enter", "j"), both=True, wide=True, shows={"enter": "POST /checkout"}),
    "acknowledge": Scene(("5", "A")),
    "rules": Scene(("6",), both=True, wide=True),
    "rule": Scene(("6", "j", "j", "enter")),
    "rule-edit": Scene(("6", "E"), both=True, shows={"E": "the condition is valid"}),
    "rule-new": Scene(("6", "A"), shows={"A": "write a condition"}),
    "rule-test": Scene(
        ("6", "T", "enter"), shows={"T": "on which trace", "enter": "spans matched by"}
    ),
    "dead-letters": Scene(("7", "x"), both=True),
    "dead-letter": Scene(("7", "enter")),
    "tenants": Scene(("8",), both=True),
    "tenant-delete": Scene(("8", "D")),
    "system": Scene(("9",), both=True),
    "cluster": Scene(("0",), cluster=True, both=True, shows={"0": "no owner"}),
    "lost": Scene(("1",), FakeApi.go_away),
    "read-only": Scene(("3", "question_mark"), read_only=True),
}


async def prepare(pilot: Pilot[int], api: FakeApi, scene: Scene) -> None:
    """Bring the TUI to a scene."""
    app: Any = pilot.app
    app.animation_level = "none"
    for kind in (TextArea, Input):
        kind.cursor_blink._default = False  # from the start, so that the time does not matter
    await until(lambda: app.connection.link.status == "connected" and bool(api.streams))
    if scene.happens is not None:
        before = app.connection.link, app.state.now
        scene.happens(api)
        await until(lambda: (app.connection.link, app.state.now) != before)
    for key in scene.keys:
        await pilot.press(key)
        await settled(pilot)
        text = scene.shows.get(key, "")
        await until(lambda text=text: text in screen_text(app))  # type: ignore[misc]
    if scene.keys[0] == "5":
        await until(lambda: bool(api.tails))
        app._show()
    await pilot.pause(0.05)


async def settled(pilot: Pilot[int]) -> None:
    """Wait for the work started by a key, except questions and streams."""
    lasting = ("connection", "tail", "ask", "test", "change")
    workers = pilot.app.workers

    def done() -> bool:
        return not any(w.is_running for w in workers if w.group not in lasting)

    await pilot.pause()
    await until(done)
    await pilot.pause(0.05)
