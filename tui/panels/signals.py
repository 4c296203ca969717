"""The signals, live; Enter opens one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Hide

from betrace.tui.base import ReloadPanel
from betrace.tui.client import ClientError, segment
from betrace.tui.json_values import Json, objects
from betrace.tui.panels.evidence import SignalText
from betrace.tui.panels.lists import show_alerts
from betrace.tui.panels.signal_rows import (
    COLUMNS,
    GROUP,
    by_rule,
    group_row,
    group_text,
    signal_row,
)
from betrace.tui.panels.signal_screen import SignalScreen
from betrace.tui.panels.triage import acknowledge, mute_or_unmute
from betrace.tui.panels.web import open_page
from betrace.tui.state import ServiceState
from betrace.tui.tones import SEVERITIES, marked
from betrace.tui.widgets.descriptions import Descriptions
from betrace.tui.widgets.list_panel import Part, TenantListPanel
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.table_panel import Row

PAGE = 200
"""Signals read at first, and kept while new ones arrive."""
MOST_KEPT = 1000
"""Maximum number kept when older signals are loaded."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds before a lost stream is opened again; they double up to the maximum."""

_ALL = "all"
_STREAMED = ("rule", "severity", "service")  # filters that the stream has, too
_FILTERS = (*_STREAMED, "status")
_STATUSES = ("active", "retracted")


class SignalsPanel(TenantListPanel):
    TITLE = "Signals"
    NOUN = "Signal"
    EMPTY = "No signals yet. New signals appear here as they are raised."
    FOLLOWS_TOP = True

    COLUMNS = COLUMNS

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("A", "change_acknowledge", "Ack", tooltip="Say that you take care of the signal"),
        Binding("M", "change_mute", "Mute", tooltip="Mute the rule of the signal, or unmute it"),
        Binding("b", "group", "By rule", tooltip="Show one row for each rule, or for each signal"),
        Binding("m", "older", "Older", tooltip="Load older signals too"),
        Binding("r", "pick('rule')", "Rule", tooltip="Show signals of one rule"),
        Binding("v", "pick('severity')", "Severity", tooltip="Show signals of one severity"),
        Binding(
            "a", "pick('status')", "Status", tooltip="Show only active or only retracted signals"
        ),
        Binding(
            "e", "pick('service')", "Service", show=False, tooltip="Show signals of one service"
        ),
        Binding("c", "clear", "All", tooltip="Show all signals again"),
        Binding("f", "alerts", "Firing", show=False, tooltip="Show the alerts that fire now"),
        Binding("w", "web", "Page", show=False, tooltip="Open the page of the signal"),
    ]

    RELOAD = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, str | None] = dict.fromkeys(_FILTERS)
        self._read_as: object = None
        self._signals: dict[str, tuple[Json, Row]] = {}
        self._ordered: list[Row] | None = None
        self._next: str | None = None
        self._most = PAGE
        self._live = ""
        self._grouped = False
        self._texts = Descriptions(self, self._described)

    # Reading

    async def read(self) -> None:
        """Read the newest signals, then follow the stream."""
        read_as = (self.betrace.client.tenant, *self._of.values())
        if read_as != self._read_as:
            self._signals.clear()
            self._ordered = None
            self._read_as, self._most, self._next = read_as, PAGE, None
            self.from_top()
        await self._read_page()
        if not self._live:
            self.betrace.start(self._follow, "tail")

    async def _read_page(self, cursor: str | None = None) -> None:
        asked, read_as = dict(self._of), self._read_as
        answer = await self.betrace.client.get(
            "/api/v1/signals", limit=PAGE, cursor=cursor, **asked
        )
        if read_as != self._read_as:
            return
        for signal in objects(answer.get("signals")):
            self._keep(signal)
        if cursor is not None or self._next is None:
            self._next = answer.get("next")
        self._forget()

    async def _follow(self) -> None:
        """Receive signals until cancelled. Signals raised between reading the list and opening the
        stream are read once it is open."""
        pause = FIRST_PAUSE
        client, seen = self.betrace.client, self._read_as
        try:
            while True:
                self._live = "connecting"
                try:
                    stream = client.signals(
                        self._opened, **{name: self._of[name] for name in _STREAMED}
                    )
                    async for name, signal in stream:
                        pause = FIRST_PAUSE
                        if name == "signal" and seen == self._read_as:
                            self._received(signal)
                except ClientError:
                    pass
                self._live = "lost"
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            self._live = ""

    def _opened(self) -> None:
        self._live = "live"

        async def catch_up() -> None:
            try:
                await self._read_page()
            except ClientError as error:
                self.problem = str(error)

        self.betrace.start(catch_up, "catch-up")

    def _received(self, signal: Json) -> None:
        if signal.get("kind") == "retracted":
            for known, _ in list(self._signals.values()):
                if all(known.get(name) == signal.get(name) for name in _IDENTITY):
                    self._keep({**known, "status": "retracted"})
            signal = {**signal, "status": "retracted"}
        if self._of["status"] in (None, signal.get("status") or "active"):
            self._keep(signal)
            self._forget()

    def _keep(self, signal: Json) -> None:
        identity = str(signal.get("id"))
        before = self._signals.get(identity)
        if before is None or before[0] != signal:
            if before is not None and "status" not in signal:
                return  # the list has already given the complete signal
            self._signals[identity] = signal, signal_row(signal)
            self._texts.forget(identity)
            self._ordered = None

    def _forget(self) -> None:
        if len(self._signals) > self._most + PAGE:
            for signal, _ in self._newest()[self._most :]:
                del self._signals[str(signal.get("id"))]
            self._ordered = None

    def _newest(self) -> list[tuple[Json, Row]]:
        return sorted(self._signals.values(), key=_age, reverse=True)

    def on_hide(self, event: Hide) -> None:
        """Close the stream while nobody watches."""
        self.betrace.workers.cancel_group(self.app, "tail")

    # Showing

    def rows(self, state: ServiceState) -> Iterable[Row]:
        if self._ordered is None:
            newest = self._newest()[: self._most]
            if self._grouped:
                groups = by_rule(signal for signal, _ in newest)
                self._ordered = [group_row(rule, those) for rule, those in groups.items()]
            else:
                self._ordered = [row for _, row in newest]
        return self._ordered

    def head(self) -> Sequence[Part]:
        parts: list[Part] = [self.tenant_label]
        for name, value in self._of.items():
            if value is None and name == "service":
                continue  # the line is full
            chosen = f"{name} {value or _ALL}"
            parts += ["  ", (chosen, "bold $warning") if value else chosen]
        shown = min(len(self._signals), self._most)
        grouped = ("  by rule", "bold $warning") if self._grouped else ""
        return [*parts, "  ", self._stream_status(), f"  {shown} newest", grouped]

    def _stream_status(self) -> Part:
        if self.betrace.frozen_at is not None:
            return marked("frozen", "busy")
        if self._live == "live" and not self.betrace.state.stale:
            return marked("live", "good")
        if self._live == "lost" or self.betrace.state.stale:
            return marked("stream lost, reconnecting", "bad")
        return marked("connecting", "busy")

    # One signal

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        if key.startswith(GROUP):
            rule = key.removeprefix(GROUP)
            return group_text(rule, self._of_rule(rule))
        shown = self._texts.get(key)
        return shown.draw(state, width) if shown is not None else None

    def title_of(self, key: str) -> str:
        return f"Rule {key.removeprefix(GROUP)}" if key.startswith(GROUP) else super().title_of(key)

    def drill(self, key: str) -> None:
        if key.startswith(GROUP):
            self._grouped = False
            self.filter_by("rule", key.removeprefix(GROUP))
        elif key in self._signals:
            self.betrace.push_screen(SignalScreen(key, self._texts.get, self.neighbour))

    def _described(self, key: str) -> SignalText | None:
        found = self._signals.get(key)
        return SignalText(found[0]) if found is not None else None

    def neighbour(self, key: str, step: int) -> str | None:
        """The signal in the row before (-1) or after (1) another; the cursor follows."""
        keys = list(self.table.keys)
        place = keys.index(key) + step if key in keys else -1
        if not 0 <= place < len(keys):
            return None
        self.table.select(keys[place])
        return keys[place]

    def _of_rule(self, rule_id: str) -> list[Json]:
        newest = self._newest()[: self._most]
        return [signal for signal, _ in newest if signal.get("rule_id") == rule_id]

    @property
    def _chosen(self) -> Json | None:
        """The signal under the cursor, or the newest of the rule under it."""
        key = self.selected or ""
        if key.startswith(GROUP):
            return next(iter(self._of_rule(key.removeprefix(GROUP))), None)
        found = self._signals.get(key)
        return found[0] if found is not None else None

    def choose(self, key: str) -> None:
        """Show the signals of a rule."""
        self._grouped = False
        self.filter_by("rule", key)

    def action_change_acknowledge(self) -> None:
        signal = self._chosen
        if (self.selected or "").startswith(GROUP):
            self.betrace.notify("Open the rule first, and choose one of its signals.")
        elif signal is not None:
            acknowledge(self.betrace, signal, partial(self._acknowledged, signal))

    def _acknowledged(self, signal: Json, acknowledgement: Json) -> None:
        self._keep({**signal, "acknowledged": acknowledgement})

    def action_change_mute(self) -> None:
        if self._chosen is not None:
            mute_or_unmute(self.betrace, str(self._chosen.get("rule_id")))

    def action_group(self) -> None:
        self._grouped, self._ordered = not self._grouped, None
        self.from_top()
        self.show(self.betrace.state)

    def action_alerts(self) -> None:
        show_alerts(self.betrace)

    def action_web(self) -> None:
        if self._chosen is not None:
            open_page(self.betrace, f"/signals/{segment(str(self._chosen.get('id')))}")

    # Filters

    def action_pick(self, name: str) -> None:
        async def ask() -> None:
            if name == "rule":
                values = await self._rules()
            elif name == "service":
                values = sorted({str(s["service"]) for s, _ in self._newest() if s.get("service")})
            else:
                values = list(SEVERITIES if name == "severity" else _STATUSES)
            options = [(_ALL, _ALL), *((value, value) for value in values)]
            check = _any if name in ("rule", "service") else None
            chosen = await self.betrace.push_screen_wait(
                Pick(f"Show signals of which {name}?", options, check)
            )
            if chosen is not None:
                self.filter_by(name, None if chosen == _ALL else chosen)

        self.betrace.start(ask, "ask")

    async def _rules(self) -> list[str]:
        """The rules of the tenant, and the rules of the signals shown."""
        seen = {str(signal.get("rule_id")) for signal, _ in self._signals.values()}
        try:
            answer = await self.betrace.client.get("/api/v1/rules")
        except ClientError:
            return sorted(seen)
        return sorted(seen | {str(rule.get("id")) for rule in objects(answer.get("rules"))})

    def filter_by(self, name: str, value: str | None) -> None:
        """Show only signals of this rule, severity, status or service; None for all."""
        self._of[name] = value
        self._again()

    def action_clear(self) -> None:
        self._of = dict.fromkeys(self._of)
        self._again()

    def _again(self) -> None:
        self.betrace.workers.cancel_group(self.app, "tail")
        self._live = ""
        self.betrace.post_message(ReloadPanel())

    def action_older(self) -> None:
        async def read() -> None:
            self._most = min(self._most + PAGE, MOST_KEPT)
            if self._next is not None and len(self._signals) < MOST_KEPT:
                await self._read_page(self._next)
            self.show(self.betrace.state)

        self.betrace.start(self.betrace.reporting(read), "older")


_IDENTITY = ("rule_id", "rule_version", "trace_id", "episode")


def _any(text: str) -> str:
    return "" if text else "type a name"


def _age(signal: tuple[Json, Row]) -> tuple[str, str]:
    return str(signal[0].get("detected_at")), str(signal[0].get("id"))
