"""A signal, or the verdict of a rule on a trace, with the trace as a waterfall."""

from __future__ import annotations

from textual.content import Content

from betrace.tui.base import BaseApp
from betrace.tui.client import ClientError
from betrace.tui.format import NONE, date, many, millis, moment
from betrace.tui.json_values import Json, mapping
from betrace.tui.tones import marked, severity, signal_tone, toned
from betrace.tui.traces import TreeSpan, spans_of
from betrace.tui.widgets.detail import CachedText, Detail
from betrace.tui.widgets.fields import fields
from betrace.tui.widgets.waterfall import MATCH, letters, marks, waterfall


class SignalText(CachedText):
    """A signal, with its trace once that is loaded."""

    def __init__(self, signal: Json) -> None:
        super().__init__()
        self.signal = signal
        self.trace: Json | None = None
        self.spans: list[TreeSpan] = []
        self.problem = ""

    def make(self, width: int) -> Content:
        signal = self.signal
        status = str(signal.get("status") or "active")
        labels = mapping(signal.get("labels"))
        facts: list[tuple[str, str | Content]] = [
            ("rule", f"{signal.get('rule_id')} (version {signal.get('rule_version')})"),
            (
                "severity",
                Content.assemble(
                    toned(*severity(str(signal.get("severity", "")))),
                    "  ",
                    marked(status, signal_tone(status)),
                ),
            ),
            ("message", str(signal.get("message", ""))),
        ]
        if signal.get("reason"):
            facts.append(("reason", str(signal["reason"])))
        facts.append(("detected", date(moment(signal.get("detected_at")))))
        if labels:
            facts.append(("labels", ", ".join(f"{k}={v}" for k, v in labels.items())))
        facts.append(("tenant", str(signal.get("tenant", ""))))
        lines = [
            fields(*facts),
            Content(""),
            counts_text(mapping(signal.get("counts")), mapping(signal.get("evidence"))),
            Content(""),
            self._trace(width),
        ]
        return Content("\n").join(lines)

    def _trace(self, width: int) -> Content:
        named = f"trace {self.signal.get('trace_id')}"
        if self.trace is None:
            status = marked(f"not loaded: {self.problem}", "bad") if self.problem else "loading …"
            return Content.assemble((named, "bold"), "\n", status)
        found = marks(mapping(self.signal.get("evidence")))
        return Content("\n").join(
            [
                Content.assemble((named, "bold"), f"  {trace_text(self.trace)}"),
                waterfall(self.spans, found, width),
            ]
        )


class VerdictText(CachedText):
    """The verdict of a condition on a trace."""

    def __init__(self, trace: Json, verdict: Json) -> None:
        super().__init__()
        self._trace = trace
        self._spans = spans_of(trace)
        self._verdict = verdict

    def make(self, width: int) -> Content:
        verdict = self._verdict
        evidence = mapping(verdict.get("evidence"))
        breach = bool(verdict.get("breach"))
        result = marked("violated", "bad") if breach else marked("not violated", "good")
        lines = [
            fields(("verdict", result), ("reason", str(verdict.get("message") or NONE))),
            Content(""),
            counts_text(mapping(verdict.get("counts")), evidence),
            Content(""),
            Content.assemble(
                (f"trace {self._trace.get('trace_id')}", "bold"), f"  {trace_text(self._trace)}"
            ),
            waterfall(self._spans, marks(evidence), width),
        ]
        return Content("\n").join(lines)


def show_signal(app: BaseApp, signal: Json) -> None:
    """Open a signal, and load it and its trace."""
    shown = SignalText(signal)
    detail = Detail(f"Signal {signal.get('id')}", shown.draw)
    app.push_screen(detail)

    async def read() -> None:
        try:
            shown.signal = await app.client.signal(str(signal.get("id")))
        except ClientError as error:
            if error.status != 404:  # a signal from the stream may not be stored yet
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


def counts_text(counts: Json, evidence: Json) -> Content:
    """The number of spans that each selector matched, and the letter of its spans."""
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
    """A trace on one line."""
    parts = [
        str(trace.get("state", "")),
        many(trace.get("spans", 0), "span"),
        millis(float(trace.get("duration_ns") or 0) / 1e6),
    ]
    if trace.get("errors"):
        parts.append(many(trace["errors"], "error"))
    for name, noun, state in (("missing", "request", "missing"), ("omitted", "span", "left out")):
        if trace.get(name):
            parts.append(f"✖ {many(trace[name], noun)} {state}")
    return ", ".join(part for part in parts if part)
