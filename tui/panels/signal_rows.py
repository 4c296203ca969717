"""Signals as rows: one for each, or one for each rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from textual.content import Content

from betrace.tui.format import date, many, moment, short_date
from betrace.tui.json_values import Json
from betrace.tui.tones import SEVERITIES, SYMBOLS, Tone, marked, severity, signal_tone
from betrace.tui.widgets.table_panel import Cell, Column, Row

COLUMNS = (
    Column("time", "time", 14),
    Column("severity", "severity", 10),
    Column("mark", " ", 2),
    Column("status", "status", 9, narrow=0),
    Column("rule", "rule", 28, narrow=18),
    Column("service", "service", 16, narrow=9),
    Column("message", "message", 20, flex=True),
    Column("trace", "trace", 32, shown_from=160),
)

GROUP = "rule "
"""Keys of rows of a rule begin with this, those of signals are ids."""

_ACKNOWLEDGED, _MUTED = "✓", "m"


def signal_row(signal: Json) -> Row:
    """The row of one signal."""
    status = str(signal.get("status") or "active")
    tone = signal_tone(status)
    grade, toned = severity(str(signal.get("severity", "")))
    at = str(signal.get("detected_at", ""))
    mark = _MUTED if signal.get("muted") else ""
    if signal.get("acknowledged"):
        mark, tone = _ACKNOWLEDGED, "quiet"
    return Row(
        str(signal.get("id")),
        (
            Cell(short_date(moment(at)), order=at),
            Cell(grade, toned, _rank(signal)),
            Cell(f"{SYMBOLS[signal_tone(status)]}{mark}", tone),
            Cell(status, tone),
            Cell(str(signal.get("rule_id", ""))),
            Cell(str(signal.get("service") or "")),
            Cell(" ".join(str(signal.get("message", "")).split())),
            Cell(str(signal.get("trace_id", ""))),
        ),
    )


def by_rule(signals: Iterable[Json]) -> Mapping[str, Sequence[Json]]:
    """The signals of each rule in their order."""
    found: dict[str, list[Json]] = {}
    for signal in signals:
        found.setdefault(str(signal.get("rule_id")), []).append(signal)
    return found


def group_row(rule_id: str, signals: Sequence[Json]) -> Row:
    """The row of a rule with these signals, newest first."""
    newest = signals[0]
    active = sum((each.get("status") or "active") == "active" for each in signals)
    tone: Tone = "bad" if active else "quiet"
    grade, toned = severity(str(newest.get("severity", "")))
    at = str(newest.get("detected_at", ""))
    latest = " ".join(str(newest.get("message", "")).split())
    return Row(
        f"{GROUP}{rule_id}",
        (
            Cell(short_date(moment(at)), order=at),
            Cell(grade, toned, _rank(newest)),
            Cell(SYMBOLS[tone], tone),
            Cell(f"{active} active", tone, active),
            Cell(rule_id),
            Cell(_services(signals)),
            Cell(f"{many(len(signals), 'signal')}; {latest}", order=len(signals)),
            Cell(""),
        ),
    )


def _services(signals: Sequence[Json]) -> str:
    """The services of signals, in alphabetical order."""
    return ", ".join(sorted({str(each["service"]) for each in signals if each.get("service")}))


def group_text(rule_id: str, signals: Sequence[Json]) -> Content:
    """The newest signals of a rule."""
    lines = [Content.assemble((many(len(signals), "signal"), "bold"), f" of {rule_id} shown here")]
    for signal in signals[:_MOST_LINES]:
        status = str(signal.get("status") or "active")
        lines.append(
            Content.assemble(
                f"{date(moment(signal.get('detected_at')))}  ",
                marked(status, signal_tone(status)),
                f"  {signal.get('message')}",
            )
        )
    return Content("\n").join(lines)


_MOST_LINES = 100


def _rank(signal: Json) -> float:
    word = signal.get("severity")
    return float(SEVERITIES.index(word)) if word in SEVERITIES else len(SEVERITIES)
