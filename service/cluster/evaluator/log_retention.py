"""Deletes old messages of a partition's log.

Only messages that both kept checkpoints cover are deleted, so a successor can always replay. The
last message that a checkpoint covers stays, because it is compared with the checkpoint.
"""

from __future__ import annotations

from betrace.service.cluster.evaluator import checkpoints
from betrace.service.storage.jetstream.blobs import Blobs
from betrace.service.storage.jetstream.spans import SpanStreams


async def forget_old(spans: SpanStreams, blobs: Blobs, partition: int, before_ns: int) -> int:
    """Delete the messages of a partition that servers stored before a time; returns the first
    sequence that stays. Raises :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    first = await spans.first(partition)
    names = await checkpoints.newest_first(blobs, partition)
    if len(names) < checkpoints.KEPT:
        return first
    most = min(checkpoints.applied_of(name) for name in names)
    keep = await _first_since(spans, partition, first, most, before_ns)
    if keep > first:
        await spans.forget_before(partition, keep)
    return max(first, keep)


async def forget_former(spans: SpanStreams, partition: int, sealed: int, before_ns: int) -> None:
    """Delete the messages of a finished partition that servers stored before a time; its seal
    stays. Raises :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    first = await spans.first(partition)
    keep = await _first_since(spans, partition, first, sealed, before_ns)
    if keep > first:
        await spans.forget_before(partition, keep)


async def _first_since(
    spans: SpanStreams, partition: int, first: int, last: int, time_ns: int
) -> int:
    """The first sequence from ``first`` to ``last`` that was stored at ``time_ns`` or later;
    ``last`` if no message is that new. Timestamps grow, apart from jumps of servers' clocks."""
    while first < last:
        middle = (first + last) // 2
        found = await spans.get(partition, middle)
        if found is not None and found.time_ns >= time_ns:
            last = middle
        else:
            first = middle + 1
    return last
