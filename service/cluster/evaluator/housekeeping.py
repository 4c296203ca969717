"""What an owner deletes once an hour."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.log_retention import forget_former, forget_old
from betrace.service.cluster.evaluator.parts import OwnerParts

_log = logging.getLogger("service.cluster.owner")

EVERY_SECONDS = 3600.0
ORPHAN_SECONDS = 3600.0
"""Chunks of a checkpoint that was not completed for so long are deleted."""

_DAY_NS = 86_400 * 1_000_000_000


async def keep_house(parts: OwnerParts, partition: int, read_ns: Callable[[], int]) -> None:
    """Delete messages past retention, those of former partitions included; the owner of the first
    current partition also deletes what interrupted checkpoints have left. ``read_ns`` returns when
    the last message read was appended."""
    while True:
        await trio.sleep(EVERY_SECONDS)
        try:
            if parts.log_days:
                before_ns = read_ns() - parts.log_days * _DAY_NS
                await forget_old(parts.spans, parts.blobs, partition, before_ns)
                for former in parts.partitions.generations.former(partition):
                    if (end := parts.partitions.finished.get(former)) is not None:
                        await forget_former(parts.spans, former, end.sealed, before_ns)
            if partition == parts.partitions.current.first:
                await parts.blobs.delete_orphans(ORPHAN_SECONDS)
        except TransientError as error:
            _log.debug("partition %d: nothing is deleted now: %s", partition, error)
