"""Deletes old messages of a partition's log.

Only messages that both kept checkpoints cover are deleted, so a successor can always replay. The
last message that a checkpoint covers stays, because it is compared with the checkpoint.
"""

from __future__ import annotations

from betrace.service.cluster.evaluator import checkpoints
from betrace.service.storage.jetstream.blobs import Blobs
from betrace.service.storage.jetstream.spans import SpanStreams


async def forget_old(
    spans: SpanStreams, blobs: Blobs, partition: int, before_ns: int, keep_from: int | None = None
) -> int:
    """Delete the messages of a partition that servers stored before a time, except those from
    sequence ``keep_from`` on; returns the first sequence that stays. Raises
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    first = await spans.first(partition)
    names = await checkpoints.newest_first(blobs, partition)
    if len(names) < checkpoints.KEPT:
        return first
    most = min(checkpoints.applied_of(name) for name in names)
    if keep_from is not None:
        most = max(first, min(most, keep_from))
    keep = await spans.first_since(partition, first, most, before_ns)
    if keep > first:
        await spans.forget_before(partition, keep)
    return max(first, keep)


async def forget_former(
    spans: SpanStreams, partition: int, sealed: int, before_ns: int, keep_from: int | None = None
) -> None:
    """As :func:`forget_old`, of a finished partition; its seal stays."""
    first = await spans.first(partition)
    most = sealed if keep_from is None else max(first, min(sealed, keep_from))
    keep = await spans.first_since(partition, first, most, before_ns)
    if keep > first:
        await spans.forget_before(partition, keep)
