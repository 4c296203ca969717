"""Builds the role *evaluator* of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.evaluator.evaluator import Evaluator
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.cluster.evaluator.rule_feed import RuleFeed
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.cluster.membership import Membership
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query.index import index_subject
from betrace.service.cluster.query.remote_index import RemoteTraceIndex
from betrace.service.config.settings import Settings
from betrace.service.storage.jetstream.blobs import Blobs
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.process_leases import ProcessLeases
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.partition_log import PartitionLog
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing
from betrace.service.storage.spanlog.frames import Frame

INDEX_SECONDS = 10.0
TAKEOVERS = 8  # partitions at the same time
HANDOVERS = 2


@dataclass(frozen=True, slots=True)
class EvaluatorNode:
    """Where an evaluator runs."""

    name: str
    client: NatsClient
    layout: Layout
    partitions: PartitionMap
    membership: Membership
    threads: ThreadRunner


@dataclass(frozen=True, slots=True)
class _WaitingLog:
    """A log whose readers let other calls of their threads run meanwhile."""

    log: PartitionLog
    threads: ThreadRunner

    def read_many(
        self, tenant: str, positions: Sequence[int]
    ) -> list[Frame | FrameMissing | FrameCorrupt]:
        with self.threads.waiting():
            return self.log.read_many(tenant, positions)


def open_evaluator(settings: Settings, node: EvaluatorNode) -> Evaluator:
    """The evaluator of a process. Its partitions ask a query node about traces of late spans."""
    assert settings.cluster is not None
    cluster, client, layout = settings.cluster, node.client, node.layout
    spans, subject = SpanStreams(client, layout), index_subject(layout.prefix)
    config = ConfigBucket(client, layout.config_bucket)
    log = _WaitingLog(spans, node.threads)

    def ask(data: bytes) -> bytes:
        with node.threads.waiting():
            return client.ask_blocking(subject, data, INDEX_SECONDS)

    def new_state(partition: int) -> PartitionState:
        index = RemoteTraceIndex(
            partition, ask, lambda: state.index_sequence, lambda: state.inherited_output
        )
        count = node.partitions.generations.of_partition(partition).count
        state = PartitionState(partition, count, settings, log, index)
        return state

    parts = OwnerParts(
        settings=cluster,
        node=node.name,
        spans=spans,
        outputs=lambda partition: FencedLog(client, layout, partition),
        leases=ProcessLeases(ConfigBucket(client, layout.leases_bucket), cluster.lease_seconds),
        blobs=Blobs(client, layout.checkpoints_store),
        rules=RuleFeed(config),
        threads=node.threads,
        config=config,
        partitions=node.partitions,
        new_state=new_state,
        checkpoint_seconds=settings.checkpoint.interval_seconds,
        log_days=settings.retention.log_days,
        archive=settings.archive.enabled,
        takeovers=trio.CapacityLimiter(TAKEOVERS),
        handovers=trio.CapacityLimiter(HANDOVERS),
    )
    return Evaluator(parts, node.membership, settings.shutdown.grace_seconds)
