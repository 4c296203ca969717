"""The partitions of a cluster as the configuration bucket has them; one map for each process."""

from __future__ import annotations

import logging

import trio

from betrace.channels import TransientError
from betrace.service.storage.jetstream.bucket import ConfigBucket, Entry
from betrace.service.storage.jetstream.generations import (
    FINISHED_PREFIX,
    PARTITIONS_KEY,
    Finished,
    Generation,
    Generations,
)

_log = logging.getLogger("service.cluster.partitions")

_PREFIX = "cluster."
_RETRY_SECONDS = 0.5


class PartitionMap:
    """Follows the generations of partitions, and which partitions of former ones are finished.

    May be read from any thread; changes on Trio's.
    """

    def __init__(self, bucket: ConfigBucket, generations: Generations) -> None:
        self._bucket = bucket
        self.generations = generations
        self.finished: dict[int, Finished] = {}
        self.changed = trio.Event()
        """Set, and replaced by a new one, at every change."""

    async def load(self) -> None:
        """Read the present state; waits while the servers are unavailable."""
        while True:
            try:
                for entry in await self._bucket.entries(_PREFIX):
                    self.note(entry)
                return
            except TransientError as error:
                _log.debug("the partitions cannot be read: %s", error)
                await trio.sleep(_RETRY_SECONDS)

    async def run(self) -> None:
        """Follow changes until cancelled."""
        async for entry in self._bucket.watch(_PREFIX):
            self.note(entry)

    def note(self, entry: Entry) -> None:
        """Take an entry of the bucket into account."""
        if entry.key == PARTITIONS_KEY and entry.value is not None:
            found = Generations.from_json(entry.value)
            if found.total < self.generations.total:
                return
            if len(found.listed) > len(self.generations.listed):
                _log.info("spans are divided among %d partitions now", found.current.count)
            self.generations = found
        elif entry.key.startswith(FINISHED_PREFIX):
            partition = int(entry.key.removeprefix(FINISHED_PREFIX))
            if entry.value is None:
                self.finished.pop(partition, None)
            else:
                self.finished[partition] = Finished.from_json(entry.value)
        self.changed.set()
        self.changed = trio.Event()

    @property
    def current(self) -> Generation:
        """The generation that new spans go to."""
        return self.generations.current

    def by_generation(self) -> list[tuple[range, list[int]]]:
        """The partitions of each generation, and those of them that need an owner."""
        return [
            (each.partitions, [p for p in each.partitions if p not in self.finished])
            for each in self.generations
        ]

    def active(self) -> list[int]:
        """The partitions that need an owner."""
        return [partition for _, active in self.by_generation() for partition in active]

    def may_begin(self, partition: int) -> bool:
        """Whether the partition's parent is finished, or it has none."""
        parent = self.generations.parent(partition)
        return parent is None or parent in self.finished

    def holder_of(self, tenant: str, trace_id: bytes) -> int:
        """The partition whose owner has the trace with this id of 16 bytes in memory, if it is
        open: that of the newest generation in which it may begin."""
        found = self.current.partition_of(tenant, trace_id)
        while not self.may_begin(found):
            parent = self.generations.parent(found)
            assert parent is not None
            found = parent
        return found
