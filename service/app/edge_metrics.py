"""Metrics of an edge. Those that a process without a cluster has too have the same names there."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from betrace.service.api.metrics.flow import DECLARED
from betrace.service.cluster.edge.group_commit import GroupCommit
from betrace.service.pipeline.scanning import IngestCounts
from betrace.service.receiver.admission import Admission

_SHARED = {each.name: each for each in DECLARED}


def read(counts: IngestCounts, admission: Admission, commit: GroupCommit) -> Iterator[Metric]:
    """All of them, with their current values."""
    yield _counter("betrace_span_ingestion", "", counts.accepted)
    yield _counter("betrace_spans_rejected", "", counts.rejected)
    for name, refused in (
        ("betrace_spans_refused", admission.refusals.spans),
        ("betrace_requests_refused", admission.refusals.requests),
    ):
        family = CounterMetricFamily(name, _SHARED[name].text, labels=_SHARED[name].labels)
        for reason, number in refused.items():
            family.add_metric([reason], number)
        yield family
    sent = commit.counts
    yield _counter(
        "betrace_edge_messages", "Messages that the partitions' logs acknowledged.", sent.messages
    )
    yield _counter(
        "betrace_edge_log_bytes", "Compressed size of acknowledged messages.", sent.bytes
    )
    yield _counter("betrace_edge_log_spans", "Spans in acknowledged messages.", sent.spans)
    failures = CounterMetricFamily(
        "betrace_edge_failed_messages",
        "Messages that were not acknowledged: no_quorum (not in time), full (the stream is full), "
        "or error.",
        labels=("reason",),
    )
    failures.add_metric(["no_quorum"], sent.no_quorum)
    failures.add_metric(["full"], sent.full)
    failures.add_metric(["error"], sent.failed)
    yield failures
    yield GaugeMetricFamily(
        "betrace_edge_buffered_bytes",
        "Uncompressed bytes that wait for an acknowledgement.",
        commit.buffered_bytes,
    )
    yield GaugeMetricFamily(
        "betrace_edge_messages_in_flight",
        "Messages that are sent and not acknowledged.",
        commit.in_flight,
    )
    yield GaugeMetricFamily(
        "betrace_edge_unavailable_partitions",
        "Partitions that take no spans now.",
        len(commit.unavailable()),
    )


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text or _SHARED[name].text, value)
