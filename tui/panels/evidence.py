"""A signal, or the verdict of a rule on a trace, with the trace as a waterfall."""

from __future__ import annotations

from textual.content import Content

from betrace.tui.client import ApiClient, ClientError
from betrace.tui.format import NONE, count, date, many, millis, moment
from betrace.tui.json_values import Json, mapping, objects
from betrace.tui.panels.triage import acknowledged_text
from betrace.tui.state import ServiceState
from betrace.tui.tones import marked, severity, signal_tone, toned
from betrace.tui.traces import ShownSpan, in_tree_order, spans_of
from betrace.tui.widgets.detail import CachedText
from betrace.tui.widgets.fields import fields
from betrace.tui.widgets.waterfall import MATCH, letters, marks, waterfall


class SignalText:
    """A signal, with its trace once that is loaded."""

    def __init__(self, signal: Json) -> None:
        self.signal = signal
        self.lines: list[tuple[int, ShownSpan]] = []
        """The spans of the trace with their depths, in the order shown."""
        self._trace: Json | None = None
        self._problem = ""
        self._drawn: tuple[object, Content] | None = None
        """The text of the trace, with what it was made for."""

    @property
    def begun(self) -> int:
        """The start of the trace in nanoseconds since 1970."""
        return min((span.start for _, span in self.lines), default=0)

    async def load(self, client: ApiClient) -> None:
        """Read the signal and its trace."""
        self._problem = ""
        try:
            self.signal = await client.signal(str(self.signal.get("id")))
        except ClientError as error:
            if error.status != 404:  # a signal from the stream may not be stored yet
                self._problem = str(error)
        try:
            self._trace = await client.trace(str(self.signal.get("trace_id")))
            self.lines = in_tree_order(spans_of(self._trace))
        except ClientError as error:
            self._problem = str(error)

    def acknowledged(self, acknowledgement: Json) -> None:
        """Someone acknowledged the signal just now."""
        self.signal = {**self.signal, "acknowledged": acknowledgement}

    def draw(self, _: ServiceState, width: int) -> Content:
        return Content.assemble(self.facts(), "\n", self.trace_text(width))

    def facts(self) -> Content:
        """Everything but the trace."""
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
                    "  muted" if signal.get("muted") else "",
                    "  shadow" if signal.get("mode") == "shadow" else "",
                ),
            ),
            ("message", str(signal.get("message", ""))),
        ]
        if signal.get("reason"):
            facts.append(("reason", str(signal["reason"])))
        if signal.get("service"):
            facts.append(("service", str(signal["service"])))
        facts.append(("detected", date(moment(signal.get("detected_at")))))
        if acknowledged := acknowledged_text(signal):
            facts.append(("handled", Content.assemble(marked(acknowledged, "good"))))
        if labels:
            facts.append(("labels", ", ".join(f"{k}={v}" for k, v in labels.items())))
        facts.append(("tenant", str(signal.get("tenant", ""))))
        lines = [
            fields(*facts),
            Content(""),
            counts_text(mapping(signal.get("counts")), mapping(signal.get("evidence"))),
            *groups_text(mapping(mapping(signal.get("context")).get("groups"))),
            Content(""),
        ]
        return Content("\n").join(lines)

    def trace_text(self, width: int, selected: int = -1) -> Content:
        """The trace as a title and a waterfall, with the span at ``selected`` highlighted."""
        named = f"trace {self.signal.get('trace_id')}"
        if self._trace is None:
            status = marked(f"not loaded: {self._problem}", "bad") if self._problem else "loading …"
            return Content.assemble((named, "bold"), "\n", status)
        made_for = width, selected, id(self._trace)
        if self._drawn is None or self._drawn[0] != made_for:
            found = marks(mapping(self.signal.get("evidence")))
            title = Content.assemble((named, "bold"), f"  {trace_text(self._trace)}")
            tree = waterfall(self.lines, found, width, selected)
            self._drawn = made_for, Content("\n").join([title, tree])
        return self._drawn[1]


class VerdictText(CachedText):
    """The verdict of a condition on a trace."""

    def __init__(self, trace: Json, verdict: Json) -> None:
        super().__init__()
        self._trace = trace
        self._lines = in_tree_order(spans_of(trace))
        self._verdict = verdict

    def make(self, width: int) -> Content:
        verdict = self._verdict
        evidence = mapping(verdict.get("evidence"))
        breach = bool(verdict.get("breach"))
        result = marked("violated", "bad") if breach else marked("not violated", "good")
        if verdict.get("undecided"):
            result = marked(f"undecided: {verdict['undecided']}", "busy")
        lines = [
            fields(("verdict", result), ("reason", str(verdict.get("message") or NONE))),
            Content(""),
            counts_text(mapping(verdict.get("counts")), evidence),
            *groups_text(mapping(verdict.get("groups"))),
            Content(""),
            Content.assemble(
                (f"trace {self._trace.get('trace_id')}", "bold"), f"  {trace_text(self._trace)}"
            ),
            waterfall(self._lines, marks(evidence), width),
        ]
        return Content("\n").join(lines)


def counts_text(counts: Json, evidence: Json) -> Content:
    """The number of spans that each selector matched, and the letter of its spans."""
    named = letters(evidence)
    if not counts:
        return Content("no counts")
    lines = [Content.assemble(("spans matched by", "$text-muted"))]
    for selector, number in counts.items():
        sign = f"{MATCH}{named[selector]}" if selector in named else "  "
        style = "bold $warning" if selector in named else ""
        lines.append(Content.assemble((f"{sign} {number!s:>5}  {selector}", style)))
    return Content("\n").join(lines)


def groups_text(groups: Json) -> list[Content]:
    """The groups that broke a rule with ``for each``, and the spans of each, after an empty line;
    nothing for other rules."""
    if not groups:
        return []
    title = f"broken by {count(groups.get('broken'))} of {many(groups.get('of'), 'group')}"
    lines = [Content(""), Content.assemble((title, "bold"))]
    for group in objects(groups.get("examples")):
        key = ", ".join(f"{name} {value}" for name, value in mapping(group.get("key")).items())
        spans = ", ".join(str(each) for each in group.get("spans") or ())
        lines.append(
            Content.assemble(
                marked(key or "the whole trace", "bad"),
                toned(f"  {group.get('clause')}", "quiet"),
                f"  spans {spans}" if spans else "  no spans",
            )
        )
    return lines


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
