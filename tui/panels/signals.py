"""The signals, live; Enter opens one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Hide

from betrace.tui.base import ReloadPanel
from betrace.tui.client import ClientError
from betrace.tui.format import moment, short_date
from betrace.tui.json_values import Json, objects
from betrace.tui.panels.evidence import show_signal
from betrace.tui.state import ServiceState
from betrace.tui.tones import SEVERITIES, SYMBOLS, marked, severity, signal_tone
from betrace.tui.widgets.list_panel import Part, TenantListPanel
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.table_panel import Cell, Column, Row

PAGE = 200
"""Signals read at first, and kept while new ones arrive."""
MOST_KEPT = 1000
"""Maximum number kept when older signals are loaded."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds before a lost stream is opened again; they double up to the maximum."""

_ALL = "all"
_STATUSES = ("active", "retracted")


class SignalsPanel(TenantListPanel):
    TITLE = "Signals"
    EMPTY = "No signals yet. New signals appear here as they are raised."
    FOLLOWS_TOP = True

    COLUMNS = (
        Column("time", "time", 14),
        Column("severity", "severity", 10),
        Column("status", "status", 11, narrow=1),
        Column("rule", "rule", 28, narrow=18),
        Column("message", "message", 20, flex=True),
        Column("trace", "trace", 32, shown_from=160),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "pick('rule')", "Rule", tooltip="Show signals of one rule"),
        Binding("v", "pick('severity')", "Severity", tooltip="Show signals of one severity"),
        Binding(
            "a", "pick('status')", "Status", tooltip="Show only active or only retracted signals"
        ),
        Binding("c", "clear", "All", tooltip="Show all signals again"),
        Binding("m", "older", "Older", tooltip="Load older signals too"),
    ]

    RELOAD = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, str | None] = {"rule": None, "severity": None, "status": None}
        self._read_as: object = None
        self._signals: dict[str, tuple[Json, Row]] = {}
        self._ordered: list[Row] | None = None
        self._next: str | None = None
        self._most = PAGE
        self._live = ""

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
                        self._opened, rule=self._of["rule"], severity=self._of["severity"]
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
            self._signals[identity] = signal, _row(signal)
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
            self._ordered = [row for _, row in self._newest()[: self._most]]
        return self._ordered

    def head(self) -> Sequence[Part]:
        parts: list[Part] = [self.tenant_label]
        for name, value in self._of.items():
            chosen = f"{name} {value or _ALL}"
            parts += ["  ", (chosen, "bold $warning") if value else chosen]
        shown = min(len(self._signals), self._most)
        return [*parts, "  ", self._stream_status(), f"  {shown} newest"]

    def _stream_status(self) -> Part:
        if self.betrace.frozen_at is not None:
            return marked("frozen", "busy")
        if self._live == "live" and not self.betrace.state.stale:
            return marked("live", "good")
        if self._live == "lost" or self.betrace.state.stale:
            return marked("stream lost, reconnecting", "bad")
        return marked("connecting", "busy")

    def drill(self, key: str) -> None:
        found = self._signals.get(key)
        if found is not None:
            show_signal(self.betrace, found[0])

    # Filters

    def action_pick(self, name: str) -> None:
        async def ask() -> None:
            if name == "rule":
                values = await self._rules()
            else:
                values = list(SEVERITIES if name == "severity" else _STATUSES)
            options = [(_ALL, _ALL), *((value, value) for value in values)]
            check = _any if name == "rule" else None
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
        """Show only signals of this rule, severity or status; None for all."""
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
    return "" if text else "type the id of a rule"


def _age(signal: tuple[Json, Row]) -> tuple[str, str]:
    return str(signal[0].get("detected_at")), str(signal[0].get("id"))


def _row(signal: Json) -> Row:
    status = str(signal.get("status") or "active")
    tone = signal_tone(status)
    grade, toned = severity(str(signal.get("severity", "")))
    at = str(signal.get("detected_at", ""))
    return Row(
        str(signal.get("id")),
        (
            Cell(short_date(moment(at)), order=at),
            Cell(grade, toned, _rank(signal)),
            Cell(f"{SYMBOLS[tone]} {status}", tone),
            Cell(str(signal.get("rule_id", ""))),
            Cell(" ".join(str(signal.get("message", "")).split())),
            Cell(str(signal.get("trace_id", ""))),
        ),
    )


def _rank(signal: Json) -> float:
    word = signal.get("severity")
    return float(SEVERITIES.index(word)) if word in SEVERITIES else len(SEVERITIES)
