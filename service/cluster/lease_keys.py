"""The keys of the partitions' leases. The owner of a partition's lease owns the partition."""

from __future__ import annotations

from collections.abc import Mapping

_PREFIX = "partition."


def lease_key(partition: int) -> str:
    """The key of a partition's lease."""
    return f"{_PREFIX}{partition}"


def owners_by_partition(owners: Mapping[str, str]) -> dict[int, str]:
    """The owned partitions with their owners, from the owners by key."""
    found = {
        int(key.removeprefix(_PREFIX)): owner
        for key, owner in owners.items()
        if key.startswith(_PREFIX)
    }
    return dict(sorted(found.items()))
