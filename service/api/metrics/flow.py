"""Metrics of spans, signals and traces."""

from __future__ import annotations

from dataclasses import dataclass

from betrace.service.api.metrics.declared import Declared, Samples, one
from betrace.service.api.signals_by_rule import LABELS as RULE_LABELS
from betrace.service.api.sources import Sources
from betrace.service.pipeline.scanning import IngestCounts
from betrace.service.receiver.admission import Admission
from betrace.service.rules.definition import SEVERITIES


def _signals(sources: Sources) -> Samples:
    seen = sources.pipeline.evaluate.counts.by_severity
    for severity in SEVERITIES:
        for kind in ("raised", "retracted"):
            yield (severity, kind), seen.get((severity, kind), 0)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What takes spans in."""

    counts: IngestCounts
    admission: Admission


ARRIVING: tuple[Declared[Arrivals], ...] = (
    Declared(
        "betrace_span_ingestion",
        "counter",
        "Spans accepted: written to the span log and acknowledged.",
        (),
        lambda a: one(a.counts.accepted),
    ),
    Declared(
        "betrace_spans_rejected",
        "counter",
        "Spans left out of accepted requests because of an invalid trace or span id.",
        (),
        lambda a: one(a.counts.rejected),
    ),
    Declared(
        "betrace_spans_refused",
        "counter",
        "Spans (estimated) of refused requests, by reason.",
        ("reason",),
        lambda a: [((reason,), n) for reason, n in a.admission.refusals.spans.items()],
    ),
    Declared(
        "betrace_requests_refused",
        "counter",
        "Refused export requests, by reason.",
        ("reason",),
        lambda a: [((reason,), n) for reason, n in a.admission.refusals.requests.items()],
    ),
    Declared(
        "betrace_request_bodies_bytes",
        "gauge",
        "Bytes of request bodies in memory; at ingest.max_buffered_bytes requests are refused.",
        (),
        lambda a: one(a.admission.buffered_bytes),
    ),
)
"""What comes in; an edge has these too."""


def _arrivals(sources: Sources) -> Arrivals:
    return Arrivals(sources.pipeline.ingest.counts, sources.admission)


DECLARED: tuple[Declared[Sources], ...] = (
    *(each.of(_arrivals) for each in ARRIVING),
    Declared(
        "betrace_spans_evaluated",
        "counter",
        "Spans folded into their traces, including repeated and replayed ones.",
        (),
        lambda s: one(s.account().evaluated),
    ),
    Declared(
        "betrace_spans_replayed",
        "counter",
        "Spans read back from the span log at startup.",
        (),
        lambda s: one(s.account().replayed),
    ),
    Declared(
        "betrace_spans_dead_lettered",
        "gauge",
        "Spans in dead letters and not folded into their traces.",
        (),
        lambda s: one(s.account().dead_lettered),
    ),
    Declared(
        "betrace_spans_discarded",
        "counter",
        "Spans in dead letters that were discarded or moved to files.",
        (),
        lambda s: one(s.account().discarded),
    ),
    Declared(
        "betrace_spans_repeated",
        "counter",
        "Spans received again and not counted twice.",
        (),
        lambda s: one(s.pipeline.open_traces.counts.repeated),
    ),
    Declared(
        "betrace_spans_in_flight",
        "gauge",
        "Spans accepted but not evaluated yet.",
        (),
        lambda s: one(s.account().in_flight),
    ),
    Declared(
        "betrace_signals",
        "counter",
        "Signals, by severity and kind.",
        ("severity", "kind"),
        _signals,
    ),
    Declared(
        "betrace_rule_signals",
        "counter",
        "Signals new in the ledger, by rule; rules beyond metrics.max_rule_series are (other).",
        RULE_LABELS,
        lambda s: s.rule_signals.counts(),
        blocks=True,
        exemplars=lambda s: s.rule_signals.exemplars(),
    ),
    Declared(
        "betrace_rule_evaluations",
        "counter",
        "Closed traces by what a rule said of them: not_applicable (its `when` did not hold), "
        "kept, broken, or undecided. Rules beyond metrics.max_rule_series are (other).",
        ("tenant", "rule", "outcome"),
        lambda s: s.pipeline.evaluate.evaluations.counts(s.rules.all_rules()),
        blocks=True,
    ),
    Declared(
        "betrace_signals_early",
        "counter",
        "Signals raised before their trace was closed.",
        (),
        lambda s: one(s.pipeline.evaluate.counts.early),
    ),
    Declared(
        "betrace_traces_undecided",
        "counter",
        "Traces that a rule could not judge, once for each rule: too large to be read back, no "
        "longer in the span log, or with a text that is too long to be searched.",
        (),
        lambda s: one(s.pipeline.evaluate.counts.undecided),
    ),
    Declared(
        "betrace_open_traces",
        "gauge",
        "Traces that may still receive spans.",
        (),
        lambda s: one(s.pipeline.correlate.clock.survey.open),
    ),
    Declared(
        "betrace_traces_closed",
        "counter",
        "Traces closed.",
        (),
        lambda s: one(s.closed_traces()),
    ),
    Declared(
        "betrace_traces_reopened",
        "counter",
        "Closed traces reopened by late spans.",
        (),
        lambda s: one(s.pipeline.open_traces.counts.reopened),
    ),
    Declared(
        "betrace_traces_recalled",
        "counter",
        "Traces no longer in memory that were reopened from the index and the log.",
        (),
        lambda s: one(s.pipeline.history.recalled),
    ),
    Declared(
        "betrace_traces_partial",
        "counter",
        "Traces reopened without all of their earlier spans.",
        (),
        lambda s: one(s.pipeline.history.partial),
    ),
    Declared(
        "betrace_traces_closed_for_room",
        "counter",
        "Traces closed early because more than traces.max_open were open.",
        (),
        lambda s: one(s.pipeline.open_traces.counts.closed_for_room),
    ),
    Declared(
        "betrace_long_lived_traces",
        "gauge",
        "Open traces with more than traces.long_lived_spans spans.",
        (),
        lambda s: one(s.pipeline.correlate.clock.survey.long_lived),
    ),
    Declared(
        "betrace_trace_window_bytes",
        "gauge",
        "Memory of open and recently closed traces.",
        (),
        lambda s: one(s.pipeline.correlate.clock.survey.nbytes),
    ),
    Declared(
        "betrace_active_tenants",
        "gauge",
        "Tenants with open or recently closed traces.",
        (),
        lambda s: one(len(s.pipeline.open_traces.tenants)),
    ),
)
