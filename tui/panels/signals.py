"""The signals as they come, and the one that Enter opens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Hide

from betrace.tui.client import ClientError, Json
from betrace.tui.panels.evidence import show_signal
from betrace.tui.state import State
from betrace.tui.widgets.basic import marked
from betrace.tui.widgets.listing import Part, TenantListing, objects
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.table import Cell, Column, Row
from betrace.tui.widgets.text import NONE, SEVERITIES, SYMBOLS, clock, moment, severity, status_tone

PAGE = 200
"""Signals that are read first, and kept while they come."""
MOST_KEPT = 1000
"""Kept when older ones are asked for."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds before a stream that ended is opened again; they grow."""

_ALL = "all"
_STATUSES = ("active", "retracted")


class SignalsPanel(TenantListing):
    TITLE = "Signals"
    EMPTY = "no signals yet: they are shown here as they are raised"
    FOLLOWS_TOP = True

    COLUMNS = (
        Column("time", "time", 8),
        Column("severity", "severity", 10),
        Column("rule", "rule", 23),
        Column("status", "status", 11),
        Column("message", "what"),
        Column("clause", "clause", 7),
        Column("trace", "trace", 32),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "pick('rule')", "Rule", tooltip="Only signals of a rule"),
        Binding("v", "pick('severity')", "Severity", tooltip="Only signals of a severity"),
        Binding("a", "pick('status')", "Status", tooltip="Only signals that stand, or do not"),
        Binding("c", "clear", "All", tooltip="Signals of all rules, severities and statuses"),
        Binding("m", "older", "Older", show=False, tooltip="Read older signals too"),
    ]

    RELOAD = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, str | None] = {"rule": None, "severity": None, "status": None}
        self._read_as: object = None
        self._held: dict[str, tuple[Json, Row]] = {}
        self._ordered: list[Row] | None = None
        self._next: str | None = None
        self._most = PAGE
        self._live = ""

    # Reading

    async def read(self) -> None:
        """Read the newest, then follow the stream."""
        read_as = (self.betrace.client.tenant, *self._of.values())
        if read_as != self._read_as:
            self._held.clear()
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
        """Signals as they come, until cancelled. What came between the list and the stream is read
        when the stream is open."""
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
                            self._came(signal)
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

    def _came(self, signal: Json) -> None:
        if signal.get("kind") == "retracted":
            for held, _ in list(self._held.values()):
                if all(held.get(name) == signal.get(name) for name in _IDENTITY):
                    self._keep({**held, "status": "retracted"})
            signal = {**signal, "status": "retracted"}
        if self._of["status"] in (None, signal.get("status") or "active"):
            self._keep(signal)
            self._forget()

    def _keep(self, signal: Json) -> None:
        identity = str(signal.get("id"))
        before = self._held.get(identity)
        if before is None or before[0] != signal:
            if before is not None and "status" not in signal:
                return  # the list has said more of it already
            self._held[identity] = signal, _row(signal)
            self._ordered = None

    def _forget(self) -> None:
        if len(self._held) > self._most + PAGE:
            for signal, _ in self._newest()[self._most :]:
                del self._held[str(signal.get("id"))]
            self._ordered = None

    def _newest(self) -> list[tuple[Json, Row]]:
        return sorted(self._held.values(), key=_age, reverse=True)

    def on_hide(self, event: Hide) -> None:
        """Nobody looks: the service has no more streams than it must."""
        self.betrace.workers.cancel_group(self.app, "tail")

    # Showing

    def rows(self, state: State) -> Iterable[Row]:
        if self._ordered is None:
            self._ordered = [row for _, row in self._newest()[: self._most]]
        return self._ordered

    def head(self) -> Sequence[Part]:
        parts: list[Part] = [self.whose]
        for name, value in self._of.items():
            chosen = f"{name} {value or _ALL}"
            parts += ["  ", (chosen, "bold $warning") if value else chosen]
        tail = {
            "live": marked("live", "good"),
            "lost": marked("the stream is lost, tried again", "bad"),
        }
        shown = min(len(self._held), self._most)
        return [
            *parts,
            "  ",
            tail.get(self._live, marked("connecting", "busy")),
            f"  {shown} newest",
        ]

    def drill(self, key: str) -> None:
        held = self._held.get(key)
        if held is not None:
            show_signal(self.betrace, held[0])

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
                Pick(f"Signals of which {name}?", options, check)
            )
            if chosen is not None:
                self.filter_by(name, None if chosen == _ALL else chosen)

        self.betrace.start(ask, "ask")

    async def _rules(self) -> list[str]:
        """Rules that there are, and that have signals here."""
        seen = {str(signal.get("rule_id")) for signal, _ in self._held.values()}
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
        self.betrace.load(self)

    def action_older(self) -> None:
        async def read() -> None:
            self._most = min(self._most + PAGE, MOST_KEPT)
            if self._next is not None and len(self._held) < MOST_KEPT:
                await self._read_page(self._next)
            self.show(self.betrace.state)

        self.betrace.start(self.betrace.telling(read), "older")


_IDENTITY = ("rule_id", "rule_version", "trace_id", "episode")


def _any(text: str) -> str:
    return "" if text else "name a rule by its id"


def _age(held: tuple[Json, Row]) -> tuple[str, str]:
    return str(held[0].get("detected_at")), str(held[0].get("id"))


def _row(signal: Json) -> Row:
    status = str(signal.get("status") or "active")
    tone = status_tone(status)
    grade, toned = severity(str(signal.get("severity", "")))
    at = str(signal.get("detected_at", ""))
    return Row(
        str(signal.get("id")),
        (
            Cell(clock(moment(at)), order=at),
            Cell(grade, toned, _rank(signal)),
            Cell(str(signal.get("rule_id", ""))),
            Cell(f"{SYMBOLS[tone]} {status}", None if status == "active" else tone),
            Cell(" ".join(str(signal.get("message", "")).split())),
            Cell(str(signal.get("clause") or NONE)),
            Cell(str(signal.get("trace_id", ""))),
        ),
    )


def _rank(signal: Json) -> float:
    word = signal.get("severity")
    return float(SEVERITIES.index(word)) if word in SEVERITIES else len(SEVERITIES)
