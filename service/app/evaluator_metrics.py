"""Metrics of an evaluator, by partition. Gauges have samples for the partitions that it owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import trio
from prometheus_client.core import Metric

from betrace.service.api.metrics.declared import Declared, Samples
from betrace.service.cluster.evaluator.status import PartitionStatus, Phase

Statuses = Sequence[PartitionStatus]


def _of(
    name: str,
    text: str,
    value: Callable[[PartitionStatus], float],
    kind: Literal["gauge", "counter"] = "gauge",
    *,
    owned_only: bool = True,
) -> Declared[Statuses]:
    """A metric with the label ``partition``. ``owned_only``: a partition that another evaluator
    owns has no sample."""

    def samples(statuses: Statuses) -> Samples:
        for status in statuses:
            if status.owned or not owned_only:
                yield (str(status.partition),), float(value(status))

    return Declared(name, kind, text, ("partition",), samples)


def _count(name: str, text: str, value: Callable[[PartitionStatus], float]) -> Declared[Statuses]:
    return _of(name, text, value, "counter", owned_only=False)


def _checkpoint_age(status: PartitionStatus) -> float:
    at = status.checkpoint_at
    return -1 if at is None else trio.current_time() - at


DECLARED: tuple[Declared[Statuses], ...] = (
    _of(
        "betrace_partition_owned",
        "1 if this evaluator has the partition's lease, else 0.",
        lambda s: s.owned,
        owned_only=False,
    ),
    _of(
        "betrace_partition_current",
        "1 if everything that was in the log when the partition was taken over is applied.",
        lambda s: s.phase in (Phase.CURRENT, Phase.HANDING_OVER),
    ),
    _of("betrace_partition_epoch", "The epoch of this owner.", lambda s: s.epoch),
    _of(
        "betrace_partition_applied_sequence",
        "The last message of the partition's log that is applied.",
        lambda s: s.applied,
    ),
    _of(
        "betrace_partition_stored_sequence",
        "The message of the partition's log up to which results are stored.",
        lambda s: s.stored,
    ),
    _of(
        "betrace_partition_lag_messages",
        "Messages in the partition's log that were not read yet.",
        lambda s: s.lag_messages,
    ),
    _of(
        "betrace_partition_lag_seconds",
        "Age of the last message that was read, while there are others; else 0.",
        lambda s: s.lag_seconds,
    ),
    _of(
        "betrace_partition_log_time_seconds",
        "Log time, by which traces are closed, in seconds since 1970.",
        lambda s: s.log_time_ns / 1e9,
    ),
    _of(
        "betrace_partition_waiting",
        "1 while the partition waits for a query node or for the log, else 0.",
        lambda s: s.waiting is not None,
    ),
    _of(
        "betrace_partition_checkpoint_age_seconds",
        "Time since a checkpoint of the partition was saved or loaded; -1 if none was.",
        _checkpoint_age,
    ),
    _of(
        "betrace_partition_checkpoint_bytes",
        "Size of the last checkpoint that was saved or loaded.",
        lambda s: s.checkpoint_bytes,
    ),
    _of(
        "betrace_partition_takeover_seconds",
        "Duration of the last takeover, from the lease to being current.",
        lambda s: s.takeover_seconds,
    ),
    _count(
        "betrace_partition_takeovers",
        "Epochs opened by this evaluator.",
        lambda s: s.takeovers,
    ),
    _count(
        "betrace_partition_fenced",
        "Times that another evaluator had taken the partition over before this one noticed.",
        lambda s: s.fenced,
    ),
    _count(
        "betrace_partition_gaps",
        "Places of the logs where acknowledged messages are missing or damaged.",
        lambda s: s.gaps,
    ),
    _count(
        "betrace_partition_unusable_checkpoints",
        "Checkpoints that were damaged, missing, or contradicted the log.",
        lambda s: s.unusable_checkpoints,
    ),
    _count(
        "betrace_partition_checkpoint_failures",
        "Checkpoints that could not be saved.",
        lambda s: s.checkpoint_failures,
    ),
    _count(
        "betrace_partition_failures",
        "Times that the partition was dropped because of an error.",
        lambda s: s.failures,
    ),
)


def read(statuses: Statuses) -> Iterator[Metric]:
    """All of them, with their current values. Call it on Trio's thread."""
    for each in DECLARED:
        yield each.family(statuses)
