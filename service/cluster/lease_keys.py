"""The keys of the partitions' leases. The owner of a partition's lease owns the partition."""

from __future__ import annotations

from collections.abc import Mapping


def lease_key(partition: int) -> str:
    """The key of a partition's lease."""
    return f"partition.{partition}"


def owners_by_partition(owners: Mapping[str, str], partitions: int) -> dict[int, str]:
    """The owned partitions with their owners, from the owners by key."""
    return {
        partition: owners[key]
        for partition in range(partitions)
        if (key := lease_key(partition)) in owners
    }
