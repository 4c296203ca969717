"""The tone of a state: good, busy, bad or quiet.

A state is always shown as a symbol and a word; the colour of its tone comes on top. Colours are
theme variables, so they follow the theme.
"""

from __future__ import annotations

from typing import Literal

Tone = Literal["good", "busy", "bad", "quiet"]

SYMBOLS: dict[Tone, str] = {"good": "●", "busy": "▲", "bad": "✖", "quiet": "○"}

STYLES: dict[Tone, str] = {
    "good": "$success",
    "busy": "$warning",
    "bad": "$error",
    "quiet": "$text-muted",
}
"""Styles of :class:`textual.content.Content`."""

STATUS_TONES: dict[str, Tone] = {
    "ok": "good",
    "working": "good",
    "active": "good",
    "deleting": "busy",
    "closed": "good",
    "open": "bad",
    "half_open": "busy",
    "forced_open": "bad",
    "disabled": "busy",
    "degraded": "busy",
    "paused": "busy",
    "starting": "busy",
    "stopping": "busy",
    "failed": "bad",
}
"""Tones of the words that the service uses for the states of its parts."""

SIGNAL_TONES: dict[str, Tone] = {"active": "bad", "retracted": "quiet"}
"""Tones of the statuses of a signal: an active one needs attention."""

SEVERITIES = ("critical", "high", "medium", "low", "info")
SEVERITY_MARKS: dict[str, tuple[str, Tone]] = {
    "critical": ("✖", "bad"),
    "high": ("▲", "bad"),
    "medium": ("▲", "busy"),
    "low": ("○", "quiet"),
    "info": ("○", "quiet"),
}
"""The symbol and tone of each severity."""


def toned(text: str, tone: Tone) -> tuple[str, str]:
    """Text in the tone's colour, as a part of :meth:`Content.assemble`."""
    return text, STYLES[tone]


def marked(text: str, tone: Tone) -> tuple[str, str]:
    """The same with the tone's symbol before it."""
    return f"{SYMBOLS[tone]} {text}", STYLES[tone]


def status_tone(word: str) -> Tone:
    """The tone of a part's state."""
    return STATUS_TONES.get(word, "quiet")


def signal_tone(status: str) -> Tone:
    """The tone of a signal's status."""
    return SIGNAL_TONES.get(status, "quiet")


def severity(word: str) -> tuple[str, Tone]:
    """A severity with its symbol, and its tone."""
    symbol, tone = SEVERITY_MARKS.get(word, ("○", "quiet"))
    return f"{symbol} {word or '–'}", tone


def fill_tone(percent_full: float, blocked: int = 0) -> Tone:
    """The tone of a channel: from 50 % it is filling; from 90 % the service refuses spans."""
    if blocked or percent_full >= 90:
        return "bad"
    return "busy" if percent_full >= 50 else "good"
