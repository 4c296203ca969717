"""Metrics of an edge. Those that a process without a cluster has too have the same names there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import Metric

from betrace.service.api.metrics import flow
from betrace.service.api.metrics.declared import Declared, Samples, one
from betrace.service.cluster.edge.group_commit import GroupCommit
from betrace.service.pipeline.scanning import IngestCounts
from betrace.service.receiver.admission import Admission


@dataclass(frozen=True, slots=True)
class EdgeState:
    """What is read."""

    counts: IngestCounts
    admission: Admission
    commit: GroupCommit


def _failures(edge: EdgeState) -> Samples:
    sent = edge.commit.counts
    yield ("no_quorum",), sent.no_quorum
    yield ("full",), sent.full
    yield ("error",), sent.failed


def _unavailable(edge: EdgeState) -> Samples:
    unavailable = set(edge.commit.unavailable())
    for partition in range(len(edge.commit.partition_spans)):
        yield (str(partition),), partition in unavailable


DECLARED: tuple[Declared[EdgeState], ...] = (
    Declared(
        "betrace_edge_messages",
        "counter",
        "Messages that the partitions' logs acknowledged.",
        (),
        lambda edge: one(edge.commit.counts.messages),
    ),
    Declared(
        "betrace_edge_log_bytes",
        "counter",
        "Compressed size of acknowledged messages.",
        (),
        lambda edge: one(edge.commit.counts.bytes),
    ),
    Declared(
        "betrace_edge_log_spans",
        "counter",
        "Spans in acknowledged messages.",
        (),
        lambda edge: one(edge.commit.counts.spans),
    ),
    Declared(
        "betrace_edge_failed_messages",
        "counter",
        "Messages that were not acknowledged: no_quorum (not in time), full (the stream is full), "
        "or error.",
        ("reason",),
        _failures,
    ),
    Declared(
        "betrace_edge_buffered_bytes",
        "gauge",
        "Uncompressed bytes that wait for an acknowledgement.",
        (),
        lambda edge: one(edge.commit.buffered_bytes),
    ),
    Declared(
        "betrace_edge_messages_in_flight",
        "gauge",
        "Messages that are sent and not acknowledged.",
        (),
        lambda edge: one(edge.commit.in_flight),
    ),
    Declared(
        "betrace_edge_unavailable_partitions",
        "gauge",
        "Partitions that take no spans now.",
        (),
        lambda edge: one(len(edge.commit.unavailable())),
    ),
    Declared(
        "betrace_edge_partition_unavailable",
        "gauge",
        "1 if the partition takes no spans now, else 0.",
        ("partition",),
        _unavailable,
    ),
    Declared(
        "betrace_edge_partition_spans",
        "counter",
        "Spans in messages that the partition's log acknowledged.",
        ("partition",),
        lambda edge: (
            ((str(partition),), spans)
            for partition, spans in enumerate(edge.commit.partition_spans)
        ),
    ),
)


def read(edge: EdgeState) -> Iterator[Metric]:
    """All of them, with their current values. Call it on Trio's thread."""
    arrivals = flow.Arrivals(edge.counts, edge.admission)
    for shared in flow.ARRIVING:
        yield shared.family(arrivals)
    for each in DECLARED:
        yield each.family(edge)
