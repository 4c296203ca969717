"""What the partitions of an evaluator share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.evaluator.rule_feed import RuleFeed
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.blobs import Blobs
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.process_leases import ProcessLeases
from betrace.service.storage.jetstream.spans import SpanStreams


@dataclass(frozen=True, slots=True)
class OwnerParts:
    """Stores, settings and limits; the same for all partitions."""

    settings: ClusterSettings
    node: str
    spans: SpanStreams
    outputs: Callable[[int], FencedLog]
    leases: ProcessLeases
    blobs: Blobs
    rules: RuleFeed
    threads: ThreadRunner
    config: ConfigBucket
    """The cluster's configuration."""
    partitions: PartitionMap
    """The caller runs it."""
    new_state: Callable[[int], PartitionState]
    """Makes an empty state of a partition."""
    checkpoint_seconds: float
    log_days: int
    """Days to keep the messages of the log; 0 keeps all."""
    archive: bool
    """Whether messages are archived before they are deleted."""
    takeovers: trio.CapacityLimiter
    """How many partitions are taken over at a time."""
    handovers: trio.CapacityLimiter
