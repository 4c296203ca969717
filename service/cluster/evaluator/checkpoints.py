"""The checkpoints of a partition in the object store.

A name is ``{partition}/{applied}-{epoch}``, so the names sort by what a checkpoint covers. The two
that cover most are kept: the older one is used when the newer is damaged or contradicts the log.
A former owner can do no harm: what it saves is covered by the output, and it deletes only what
covers less than its own.
"""

from __future__ import annotations

from betrace.service.storage.jetstream.blobs import Blobs

KEPT = 2


def name_of(partition: int, applied: int, epoch: int) -> str:
    """The name of a checkpoint that covers the log up to ``applied``."""
    return f"{partition}/{applied:020d}-{epoch:010d}"


def applied_of(name: str) -> int:
    """The sequence up to which a checkpoint covers the log."""
    return int(name.partition("/")[2].partition("-")[0])


async def newest_first(blobs: Blobs, partition: int) -> list[str]:
    """The names of a partition's checkpoints."""
    return sorted(await blobs.names(f"{partition}/"), reverse=True)


async def save(blobs: Blobs, partition: int, applied: int, epoch: int, data: bytes) -> None:
    """Store a checkpoint, then delete those that are no longer needed."""
    name = name_of(partition, applied, epoch)
    await blobs.put(name, data)
    older = [each for each in await newest_first(blobs, partition) if each < name]
    for each in older[KEPT - 1 :]:
        await blobs.delete(each)
