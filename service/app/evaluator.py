"""Builds the role *evaluator* of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.evaluator.evaluator import Evaluator
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.cluster.evaluator.rule_feed import RuleFeed
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.cluster.membership import Membership
from betrace.service.cluster.query.index import index_subject
from betrace.service.cluster.query.remote_index import RemoteTraceIndex
from betrace.service.config.settings import Settings
from betrace.service.storage.jetstream.blobs import Blobs
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases
from betrace.service.storage.jetstream.spans import SpanStreams

INDEX_SECONDS = 10.0
TAKEOVERS = 8  # partitions at the same time
HANDOVERS = 2


@dataclass(frozen=True, slots=True)
class EvaluatorNode:
    """Where an evaluator runs."""

    name: str
    client: NatsClient
    layout: Layout
    membership: Membership
    threads: ThreadRunner


def open_evaluator(settings: Settings, node: EvaluatorNode) -> Evaluator:
    """The evaluator of a process. Its partitions ask a query node about traces of late spans."""
    assert settings.cluster is not None
    cluster, client, layout = settings.cluster, node.client, node.layout
    config = ConfigBucket(client, layout.config_bucket)
    spans, subject = SpanStreams(client, layout), index_subject(layout.prefix)

    def ask(data: bytes) -> bytes:
        return client.ask_blocking(subject, data, INDEX_SECONDS)

    def new_state(partition: int) -> PartitionState:
        index = RemoteTraceIndex(partition, ask, lambda: state.index_sequence)
        state = PartitionState(partition, cluster.partitions, settings, spans, index)
        return state

    parts = OwnerParts(
        settings=cluster,
        node=node.name,
        spans=spans,
        outputs=lambda partition: FencedLog(client, layout, partition),
        leases=Leases(ConfigBucket(client, layout.leases_bucket), cluster.lease_seconds),
        blobs=Blobs(client, layout.checkpoints_store),
        rules=RuleFeed(config),
        threads=node.threads,
        new_state=new_state,
        checkpoint_seconds=settings.checkpoint.interval_seconds,
        log_days=settings.retention.log_days,
        archive=settings.archive.enabled,
        config=config,
        takeovers=trio.CapacityLimiter(TAKEOVERS),
        handovers=trio.CapacityLimiter(HANDOVERS),
    )
    return Evaluator(parts, node.membership, settings.shutdown.grace_seconds)
