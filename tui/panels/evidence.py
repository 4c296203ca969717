"""A signal, and what a rule says of a trace, with the trace as a waterfall."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from textual.content import Content

from betrace.tui.client import ClientError, Json
from betrace.tui.state import State
from betrace.tui.widgets.basic import Detail, fields, marked, toned
from betrace.tui.widgets.listing import mapping
from betrace.tui.widgets.text import NONE, date, many, millis, moment, severity, status_tone
from betrace.tui.widgets.waterfall import MATCH, Span, letters, marks, spans_of, waterfall

if TYPE_CHECKING:
    from betrace.tui.app import BetraceApp


class Shown(ABC):
    """Text that is made once for each width, since a trace does not change."""

    def __init__(self) -> None:
        self._drawn: tuple[int, Content] | None = None

    def draw(self, _: State, width: int) -> Content:
        if self._drawn is None or self._drawn[0] != width:
            self._drawn = width, self.make(width)
        return self._drawn[1]

    def changed(self) -> None:
        self._drawn = None

    @abstractmethod
    def make(self, width: int) -> Content:
        """The text in lines of this width."""


class SignalShown(Shown):
    """A signal; its trace when it was read."""

    def __init__(self, signal: Json) -> None:
        super().__init__()
        self.signal = signal
        self.trace: Json | None = None
        self.spans: list[Span] = []
        self.problem = ""

    def make(self, width: int) -> Content:
        signal = self.signal
        status = str(signal.get("status") or "active")
        labels = mapping(signal.get("labels"))
        lines = [
            fields(
                ("rule", f"{signal.get('rule_id')} (version {signal.get('rule_version')})"),
                ("severity", _toned(*severity(str(signal.get("severity", ""))))),
                ("status", marked(status, status_tone(status))),
                ("what", str(signal.get("message", ""))),
                ("clause", clause_text(signal.get("clause"))),
                ("reason", str(signal.get("reason") or NONE)),
                ("detected", date(moment(signal.get("detected_at")))),
                ("labels", ", ".join(f"{k}={v}" for k, v in labels.items()) or NONE),
                ("tenant", str(signal.get("tenant", ""))),
            ),
            Content(""),
            counts_text(mapping(signal.get("counts")), mapping(signal.get("evidence"))),
            Content(""),
            self._trace(width),
        ]
        return Content("\n").join(lines)

    def _trace(self, width: int) -> Content:
        named = f"trace {self.signal.get('trace_id')}"
        if self.trace is None:
            told = marked(f"not read: {self.problem}", "bad") if self.problem else "is read …"
            return Content.assemble((named, "bold"), "\n", told)
        found = marks(mapping(self.signal.get("evidence")))
        return Content("\n").join(
            [
                Content.assemble((named, "bold"), f"  {trace_text(self.trace)}"),
                waterfall(self.spans, found, width),
            ]
        )


class VerdictShown(Shown):
    """What a condition says of a trace."""

    def __init__(self, trace: Json, verdict: Json) -> None:
        super().__init__()
        self._trace = trace
        self._spans = spans_of(trace)
        self._verdict = verdict

    def make(self, width: int) -> Content:
        verdict = self._verdict
        evidence = mapping(verdict.get("evidence"))
        breach = bool(verdict.get("breach"))
        told = marked("the trace breaks the rule", "bad") if breach else marked("kept", "good")
        lines = [
            fields(("verdict", told), ("clause", clause_text(verdict.get("clause")))),
            Content(""),
            counts_text(mapping(verdict.get("counts")), evidence),
            Content(""),
            Content.assemble(
                (f"trace {self._trace.get('trace_id')}", "bold"), f"  {trace_text(self._trace)}"
            ),
            waterfall(self._spans, marks(evidence), width),
        ]
        return Content("\n").join(lines)


def show_signal(app: BetraceApp, signal: Json) -> None:
    """Open a signal, and read it and its trace."""
    shown = SignalShown(signal)
    detail = Detail(f"Signal {signal.get('id')}", shown.draw)
    app.push_screen(detail)

    async def read() -> None:
        try:
            shown.signal = await app.client.signal(str(signal.get("id")))
        except ClientError as error:
            if error.status != 404:  # that of the stream may not be in the store yet
                shown.problem = str(error)
        try:
            shown.trace = await app.client.trace(str(signal.get("trace_id")))
            shown.spans = spans_of(shown.trace)
        except ClientError as error:
            shown.problem = str(error)
        shown.changed()
        if detail.is_attached:
            detail.show(app.state)

    app.start(read, "detail")


def clause_text(clause: Any) -> str:
    """Which part of a rule is broken."""
    return f"{clause} is broken" if clause else NONE


def counts_text(counts: Json, evidence: Json) -> Content:
    """How many spans each selector of a rule matched, and the letter of those that are marked."""
    named = letters(evidence)
    if not counts:
        return Content("no counts")
    lines = [Content.assemble(("spans matched by", "$text-muted"))]
    for selector, count in counts.items():
        sign = f"{MATCH}{named[selector]}" if selector in named else "  "
        style = "bold $warning" if selector in named else ""
        lines.append(Content.assemble((f"{sign} {count!s:>5}  {selector}", style)))
    return Content("\n").join(lines)


def trace_text(trace: Json) -> str:
    """A trace in a line."""
    parts = [
        str(trace.get("state", "")),
        many(trace.get("spans", 0), "span"),
        millis(float(trace.get("duration_ns") or 0) / 1e6),
    ]
    if trace.get("errors"):
        parts.append(many(trace["errors"], "error"))
    for name, noun, told in (("missing", "request", "missing"), ("omitted", "span", "left out")):
        if trace.get(name):
            parts.append(f"✖ {many(trace[name], noun)} {told}")
    return ", ".join(part for part in parts if part)


def _toned(text: str, tone: Any) -> tuple[str, str]:
    return toned(text, tone)
