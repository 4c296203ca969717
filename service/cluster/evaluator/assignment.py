"""Which evaluator should own which partition: a pure function, so that all of them agree.

The assignment is balanced (the evaluators' numbers of partitions differ by at most 1), moves no
more partitions than balance requires, and does not change while the moves that it demands are under
way: whatever part of them is done, the result is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def assign(
    partitions: Sequence[int], members: Collection[str], owners: Mapping[int, str]
) -> dict[int, str]:
    """The owner that each partition should have; empty if there are no members.

    Args:
      partitions: their numbers, ascending.
      members: the names of the evaluators that may own partitions: alive and not draining.
      owners: the present owners; a partition without one is absent. Owners that are not members
        keep nothing.
    """
    if not members:
        return {}
    names = sorted(set(members))
    owned: dict[str, list[int]] = {name: [] for name in names}
    free: list[int] = []
    for partition in partitions:
        owned.get(owners.get(partition, ""), free).append(partition)
    quota = _quotas(len(partitions), owned)
    assigned: dict[int, str] = {}
    for name in names:
        kept = owned[name][: quota[name]]
        free += owned[name][quota[name] :]
        assigned |= dict.fromkeys(kept, name)
        quota[name] -= len(kept)
    free.sort(reverse=True)
    for name in names:
        for _ in range(quota[name]):
            assigned[free.pop()] = name
    return assigned


def _quotas(partitions: int, owned: Mapping[str, list[int]]) -> dict[str, int]:
    """How many partitions each member should have. If the number is not divisible, those that have
    more than the quotient already get one more, and then others by name: never by who has most,
    because that changes while partitions move."""
    quotient, more = divmod(partitions, len(owned))
    large = [name for name in owned if len(owned[name]) > quotient]
    others = [name for name in owned if len(owned[name]) <= quotient]
    chosen = set([*large, *others][:more])
    return {name: quotient + (name in chosen) for name in owned}
