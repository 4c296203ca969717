"""The numbers of a cluster's partitions, which grow when it is resized.

Partitions have global numbers that are never used again. A *generation* is a range of them that
spans are divided among: first 0 to 15, and after a change to 32 partitions 16 to 47. Every
generation has a multiple of the partitions of the one before, so each partition has one *parent*:
all traces of partition 16 + k or 32 + k were in partition k before.

The configuration bucket has the generations under :data:`PARTITIONS_KEY`. A partition of a former
generation is *finished* once its owner has applied its log up to the seal and stored its final
state; an entry under :data:`FINISHED_PREFIX` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from betrace.service.otlp.partition import partition_of

PARTITIONS_KEY = "cluster.partitions"
FINISHED_PREFIX = "cluster.finished."

MOST_PARTITIONS = 1 << 15
"""Numbers of partitions that a position has bits for."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Partitions ``first`` to ``first + count - 1``."""

    first: int
    count: int

    @property
    def partitions(self) -> range:
        """The numbers of its partitions."""
        return range(self.first, self.first + self.count)

    def partition_of(self, tenant: str, trace_id: bytes) -> int:
        """The partition of the trace with this id of 16 bytes."""
        return self.first + partition_of(tenant, trace_id, self.count)


@dataclass(frozen=True, slots=True)
class Generations:
    """All generations of a cluster, oldest first."""

    listed: tuple[Generation, ...]

    @classmethod
    def of(cls, partitions: int) -> Generations:
        """Those of a cluster that was never resized."""
        return cls((Generation(0, partitions),))

    @property
    def current(self) -> Generation:
        """The generation that new spans go to."""
        return self.listed[-1]

    @property
    def total(self) -> int:
        """The number of partitions of all generations."""
        return self.current.first + self.current.count

    def __iter__(self) -> Iterator[Generation]:
        return iter(self.listed)

    def grown(self, partitions: int) -> Generations:
        """With a further generation of this many partitions. Raises ValueError if that is not a
        multiple, or if the numbers run out."""
        before = self.current.count
        if partitions <= before or partitions % before:
            raise ValueError(
                f"the number of partitions can only be multiplied: {partitions} is not 2, 3, ... "
                f"times {before}"
            )
        if self.total + partitions > MOST_PARTITIONS:
            raise ValueError(
                f"there are no numbers left for {partitions} more partitions; at most "
                f"{MOST_PARTITIONS} are possible, former ones included"
            )
        return Generations((*self.listed, Generation(self.total, partitions)))

    def of_partition(self, partition: int) -> Generation:
        """The generation of a partition. Raises ValueError for one that does not exist."""
        for generation in self.listed:
            if partition in generation.partitions:
                return generation
        raise ValueError(f"there is no partition {partition}")

    def is_retired(self, partition: int) -> bool:
        """Whether the partition is of a former generation."""
        return partition < self.current.first

    def parent(self, partition: int) -> int | None:
        """The partition that this one continues; None in the first generation."""
        own = self.of_partition(partition)
        number = self.listed.index(own)
        if not number:
            return None
        before = self.listed[number - 1]
        return before.first + (partition - own.first) % before.count

    def former(self, partition: int) -> list[int]:
        """The partitions of former generations that a current one looks after: one in each, if it
        has one of the same place in its generation."""
        at = partition - self.current.first
        if at < 0:
            return []
        return [each.first + at for each in self.listed[:-1] if at < each.count]

    def to_json(self) -> bytes:
        """The value in the bucket: a number, or pairs (first, count) after a change."""
        if len(self.listed) == 1:
            return orjson.dumps(self.current.count)
        return orjson.dumps({"generations": [[each.first, each.count] for each in self.listed]})

    @classmethod
    def from_json(cls, value: bytes) -> Generations:
        """The inverse of :meth:`to_json`. Raises ValueError."""
        found: Any = orjson.loads(value)
        if isinstance(found, int):
            return cls.of(found)
        try:
            pairs = [(int(first), int(count)) for first, count in found["generations"]]
        except (TypeError, LookupError) as error:
            raise ValueError(f"{PARTITIONS_KEY} has an unknown value") from error
        return cls(tuple(Generation(*each) for each in pairs))


@dataclass(frozen=True, slots=True)
class Finished:
    """A partition whose successors may begin: its log ends with message ``sealed``, and its output
    with ``output``. What comes later in the log is forwarded to the current partitions."""

    sealed: int
    output: int

    def to_json(self) -> bytes:
        """The value in the bucket."""
        return orjson.dumps([self.sealed, self.output])

    @classmethod
    def from_json(cls, value: bytes) -> Finished:
        """The inverse of :meth:`to_json`."""
        sealed, output = orjson.loads(value)
        return cls(int(sealed), int(output))


def finished_key(partition: int) -> str:
    """The key that says that a partition is finished."""
    return f"{FINISHED_PREFIX}{partition}"
