"""Builds a query node's view of its cluster."""

from __future__ import annotations

from collections.abc import Sequence

from betrace.service.cluster.duty import Duties, DutyTimes
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query.index import index_subject
from betrace.service.cluster.query.node import ClusterConnection, OtherRoles
from betrace.service.cluster.query.open_traces import (
    ANSWER_SECONDS,
    RemoteOpenTraces,
    open_trace_subject,
)
from betrace.service.cluster.query.recent_output import RecentOutput
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases
from betrace.service.storage.jetstream.spans import SpanStreams

DUTY_LEASES = 3
"""The lease of a duty is this many times as long as that of a partition, because nobody waits for a
duty."""


def duty_times(settings: ClusterSettings) -> DutyTimes:
    """The times of duties. All nodes must use the same."""
    return DutyTimes(DUTY_LEASES * settings.lease_seconds, settings.lease_seconds)


def connect_query(
    settings: ClusterSettings,
    node: str,
    roles: Sequence[str],
    client: NatsClient,
    partitions: PartitionMap,
    tenants: TenantFeed,
    others: OtherRoles,
    identity: str,
) -> ClusterConnection:
    """The connection of the query node with the name ``node``. ``others`` are the process's other
    roles; ``partitions`` and ``tenants`` serve them all; ``identity`` is the cluster's id."""
    layout = Layout.of(settings, partitions.generations)
    logs: dict[int, FencedLog] = {}

    def out(partition: int) -> FencedLog:
        return logs.setdefault(partition, FencedLog(client, layout, partition))

    leases_bucket = ConfigBucket(client, layout.leases_bucket)
    leases = Leases(leases_bucket, settings.lease_seconds)

    def ask_owner(partition: int, data: bytes) -> bytes:
        subject = open_trace_subject(layout.prefix, partition)
        return client.ask_blocking(subject, data, ANSWER_SECONDS)

    return ClusterConnection(
        name=node,
        roles=tuple(roles),
        identity=identity,
        client=client,
        spans=SpanStreams(client, layout),
        partitions=partitions,
        out=out,
        last=lambda partition: out(partition).last(),
        epoch=lambda partition: out(partition).epoch(),
        owners=leases.owners,
        config=tenants.bucket,
        shared=ConfigBucket(client, layout.query_bucket),
        duties=Duties(leases_bucket, node, duty_times(settings)),
        recent=RecentOutput(partitions.current.count),
        index_subject=index_subject(layout.prefix),
        open_traces=RemoteOpenTraces(ask_owner, partitions.holder_of),
        others=others,
        tenants=tenants,
    )
