"""What an owner deletes once an hour."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.log_retention import forget_former, forget_old
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.storage.jetstream.archive_progress import read_progress

_log = logging.getLogger("service.cluster.owner")

EVERY_SECONDS = 3600.0
ORPHAN_SECONDS = 3600.0
"""Chunks of a checkpoint that was not completed for this long are deleted."""

_DAY_NS = 86_400 * 1_000_000_000


async def keep_house(parts: OwnerParts, partition: int, read_ns: Callable[[], int]) -> None:
    """Delete messages past retention, those of former partitions included. With the archive
    enabled, messages that are not archived stay. The owner of the first current partition also
    deletes what interrupted checkpoints have left. ``read_ns`` returns when the last message read
    was appended."""
    while True:
        await trio.sleep(EVERY_SECONDS)
        try:
            if parts.log_days:
                before_ns = read_ns() - parts.log_days * _DAY_NS
                keep_from = await _not_archived(parts, partition) if parts.archive else None
                await forget_old(parts.spans, parts.blobs, partition, before_ns, keep_from)
                for former in parts.partitions.generations.former(partition):
                    if (end := parts.partitions.finished.get(former)) is not None:
                        keep_from = await _not_archived(parts, former) if parts.archive else None
                        await forget_former(parts.spans, former, end.sealed, before_ns, keep_from)
            if partition == parts.partitions.current.first:
                await parts.blobs.delete_orphans(ORPHAN_SECONDS)
        except TransientError as error:
            _log.debug("partition %d: nothing is deleted now: %s", partition, error)


async def _not_archived(parts: OwnerParts, partition: int) -> int:
    """The first sequence of a partition that is not archived."""
    progress = await read_progress(parts.config)
    return 0 if progress is None else progress.next.get(partition, 0)
