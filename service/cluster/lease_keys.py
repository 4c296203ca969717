"""The keys of leases. The owner of a partition's lease owns the partition; the owner of a duty's
lease has the duty."""

from __future__ import annotations

from collections.abc import Mapping

_PREFIX = "partition."
_DUTY = "duty."


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


def duty_key(name: str) -> str:
    """The key of a duty's lease."""
    return _DUTY + name


def owners_by_duty(owners: Mapping[str, str]) -> dict[str, str]:
    """The nodes that have a duty, by its name, from the owners by key."""
    return {
        key.removeprefix(_DUTY): owner
        for key, owner in sorted(owners.items())
        if key.startswith(_DUTY)
    }
