"""Builds a query node's view of its cluster."""

from __future__ import annotations

from collections.abc import Sequence

from betrace.service.cluster.lease_keys import owners_by_partition
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query.index import index_subject
from betrace.service.cluster.query.node import ClusterConnection, OtherRoles
from betrace.service.cluster.query.open_traces import (
    ANSWER_SECONDS,
    RemoteOpenTraces,
    open_trace_subject,
)
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases
from betrace.service.storage.jetstream.spans import SpanStreams


def connect_query(
    settings: ClusterSettings,
    node: str,
    roles: Sequence[str],
    client: NatsClient,
    partitions: PartitionMap,
    others: OtherRoles,
) -> ClusterConnection:
    """The connection of the query node with the name ``node``. The caller runs ``partitions``.
    ``others`` are the process's other roles."""
    layout = Layout.of(settings, partitions.generations)
    logs: dict[int, FencedLog] = {}

    def out(partition: int) -> FencedLog:
        return logs.setdefault(partition, FencedLog(client, layout, partition))

    leases = Leases(ConfigBucket(client, layout.leases_bucket), settings.lease_seconds)

    async def owners() -> dict[int, str]:
        return owners_by_partition(await leases.owners())

    def ask_owner(partition: int, data: bytes) -> bytes:
        subject = open_trace_subject(layout.prefix, partition)
        return client.ask_blocking(subject, data, ANSWER_SECONDS)

    return ClusterConnection(
        name=node,
        roles=tuple(roles),
        client=client,
        spans=SpanStreams(client, layout),
        partitions=partitions,
        out=out,
        last=lambda partition: out(partition).last(),
        epoch=lambda partition: out(partition).epoch(),
        owners=owners,
        config=ConfigBucket(client, layout.config_bucket),
        index_subject=index_subject(layout.prefix),
        open_traces=RemoteOpenTraces(ask_owner, partitions.holder_of),
        others=others,
    )
