"""Metrics of a query node of a cluster; without a cluster they have no samples."""

from __future__ import annotations

from betrace.service.api.metrics.declared import Declared, Samples
from betrace.service.api.sources import Sources


def _info(sources: Sources) -> Samples:
    if sources.node is not None:
        yield (sources.node.name, ",".join(sources.node.roles)), 1


def _applied(sources: Sources) -> Samples:
    if sources.node is not None:
        for each in sources.node.partitions():
            yield (str(each["partition"]),), each["applied"]


def _lag(sources: Sources) -> Samples:
    if sources.node is not None:
        for each in sources.node.partitions():
            if each["lag"] is not None:
                yield (str(each["partition"]),), each["lag"]


def _items(sources: Sources) -> Samples:
    if sources.node is not None:
        for partition, items in sources.node.items().items():
            yield (str(partition),), items


def _index(sources: Sources) -> Samples:
    if sources.node is not None:
        index = sources.node.index
        yield ("answered",), index.requests - index.behind
        yield ("behind",), index.behind


def _duties(sources: Sources) -> Samples:
    if sources.node is not None:
        for name, held in sources.node.cluster.duties.held().items():
            yield (name,), int(held)


DECLARED: tuple[Declared[Sources], ...] = (
    Declared(
        "betrace_cluster_node_info",
        "gauge",
        "1; the labels are the node's name in the cluster and its roles.",
        ("node", "roles"),
        _info,
    ),
    Declared(
        "betrace_cluster_applied_sequence",
        "gauge",
        "The last message of a partition's OUT stream that is stored at this query node.",
        ("partition",),
        _applied,
    ),
    Declared(
        "betrace_cluster_apply_lag_messages",
        "gauge",
        "Messages of a partition's OUT stream that are not stored at this query node yet.",
        ("partition",),
        _lag,
    ),
    Declared(
        "betrace_cluster_applied_items",
        "counter",
        "Items of OUT sent to the stores of this query node.",
        ("partition",),
        _items,
    ),
    Declared(
        "betrace_cluster_duty_held",
        "gauge",
        "Whether this query node has a duty that one node at a time has, such as sending to a "
        "destination: 1 or 0.",
        ("duty",),
        _duties,
    ),
    Declared(
        "betrace_cluster_index_requests",
        "counter",
        "Requests of evaluators for stored traces, by outcome: answered, or behind if not enough "
        "was applied.",
        ("outcome",),
        _index,
    ),
)
