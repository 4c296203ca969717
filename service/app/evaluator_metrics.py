"""Metrics of an evaluator, by partition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from betrace.service.cluster.evaluator.status import PartitionStatus, Phase


@dataclass(frozen=True, slots=True)
class _Declared:
    name: str
    text: str
    read: Callable[[PartitionStatus], float]
    counter: bool = False
    owned_only: bool = True
    """Whether a partition that another evaluator owns has no sample."""


def _checkpoint_age(status: PartitionStatus) -> float:
    at = status.checkpoint_at
    return -1 if at is None else trio.current_time() - at


_DECLARED = (
    _Declared(
        "betrace_partition_owned",
        "1 if this evaluator has the partition's lease, else 0.",
        lambda s: s.owned,
        owned_only=False,
    ),
    _Declared(
        "betrace_partition_current",
        "1 if everything that was in the log when the partition was taken over is applied.",
        lambda s: s.phase in (Phase.CURRENT, Phase.HANDING_OVER),
    ),
    _Declared("betrace_partition_epoch", "The epoch of this owner.", lambda s: s.epoch),
    _Declared(
        "betrace_partition_applied_sequence",
        "The last message of the partition's log that is applied.",
        lambda s: s.applied,
    ),
    _Declared(
        "betrace_partition_stored_sequence",
        "The message of the partition's log up to which results are stored.",
        lambda s: s.stored,
    ),
    _Declared(
        "betrace_partition_lag_messages",
        "Messages in the partition's log that were not read yet.",
        lambda s: s.lag_messages,
    ),
    _Declared(
        "betrace_partition_lag_seconds",
        "Age of the last message that was read, while there are others; else 0.",
        lambda s: s.lag_seconds,
    ),
    _Declared(
        "betrace_partition_log_time_seconds",
        "Log time, by which traces are closed, in seconds since 1970.",
        lambda s: s.log_time_ns / 1e9,
    ),
    _Declared(
        "betrace_partition_waiting",
        "1 while the partition waits for a query node or for the log, else 0.",
        lambda s: s.waiting is not None,
    ),
    _Declared(
        "betrace_partition_checkpoint_age_seconds",
        "Time since a checkpoint of the partition was saved or loaded; -1 if none was.",
        _checkpoint_age,
    ),
    _Declared(
        "betrace_partition_checkpoint_bytes",
        "Size of the last checkpoint that was saved or loaded.",
        lambda s: s.checkpoint_bytes,
    ),
    _Declared(
        "betrace_partition_takeover_seconds",
        "Duration of the last takeover, from the lease to being current.",
        lambda s: s.takeover_seconds,
    ),
    _Declared(
        "betrace_partition_takeovers",
        "Epochs opened by this evaluator.",
        lambda s: s.takeovers,
        counter=True,
        owned_only=False,
    ),
    _Declared(
        "betrace_partition_fenced",
        "Times that another evaluator had taken the partition over before this one noticed.",
        lambda s: s.fenced,
        counter=True,
        owned_only=False,
    ),
    _Declared(
        "betrace_partition_gaps",
        "Places of the logs where acknowledged messages are missing or damaged.",
        lambda s: s.gaps,
        counter=True,
        owned_only=False,
    ),
    _Declared(
        "betrace_partition_unusable_checkpoints",
        "Checkpoints that were damaged, missing, or contradicted the log.",
        lambda s: s.unusable_checkpoints,
        counter=True,
        owned_only=False,
    ),
    _Declared(
        "betrace_partition_checkpoint_failures",
        "Checkpoints that could not be saved.",
        lambda s: s.checkpoint_failures,
        counter=True,
        owned_only=False,
    ),
    _Declared(
        "betrace_partition_failures",
        "Times that the partition was dropped because of an error.",
        lambda s: s.failures,
        counter=True,
        owned_only=False,
    ),
)


def read(statuses: Sequence[PartitionStatus]) -> Iterator[Metric]:
    """All of them, with their current values. Call it on Trio's thread."""
    for each in _DECLARED:
        make = CounterMetricFamily if each.counter else GaugeMetricFamily
        family = make(each.name, each.text, labels=("partition",))
        for status in statuses:
            if status.owned or not each.owned_only:
                family.add_metric([str(status.partition)], float(each.read(status)))
        yield family
