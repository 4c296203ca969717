"""Limits across the traces of all tenants: which open traces are closed when too many are open, and
which closed ones are forgotten."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from betrace.service.otlp.columns import Rows
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import SLOTS_USED, SWEEP_BATCH
from betrace.service.traces.table import TraceTable


def idle_longest(tables: Sequence[TraceTable], count: int) -> list[tuple[TraceTable, Rows]]:
    """The ``count`` open slots of all tables that have been idle longest, or all there are; at most
    ``SWEEP_BATCH`` in each piece. Of slots that have been idle equally long the first are taken, on
    every machine (``argpartition`` takes any)."""
    used = [table.arrays.activity[: table.arrays.fill[SLOTS_USED]] for table in tables]
    count = min(count, sum(table.open_count for table in tables))
    if not count:
        return []
    activity = np.concatenate(used)
    last = np.partition(activity, count - 1)[count - 1]
    before = np.flatnonzero(activity < last)
    same = np.flatnonzero(activity == last)[: count - len(before)]
    chosen = np.sort(np.concatenate([before, same]))
    found = []
    for table, slots in zip(tables, used, strict=True):
        own = chosen[(chosen >= 0) & (chosen < len(slots))]
        chosen = chosen - len(slots)
        found += [(table, own[at : at + SWEEP_BATCH]) for at in range(0, len(own), SWEEP_BATCH)]
    return found


def forget_closed(
    tables: Sequence[TraceTable],
    closed_before: int,
    fresh_from: int,
    excess: int,
    closed: ClosedTraces,
) -> int:
    """Free the traces closed before ``closed_before``. If those are fewer than ``excess``, also
    free those closed longest ago in all tables together, up to ``excess`` in total, but none closed
    at ``fresh_from`` or later. Freed traces are added to ``closed``. Returns how many were freed.

    Costs one comparison for each table; only tables with something to free do any work.
    """
    freed = 0
    for table in tables:
        if table.closed_from < closed_before:
            freed += table.evict(closed_before, fresh_from, 0, closed)
    if freed >= excess:
        return freed
    oldest = [(t.closed_from, i) for i, t in enumerate(tables) if t.closed_from < fresh_from]
    heapq.heapify(oldest)
    while oldest and freed < excess:
        _, i = heapq.heappop(oldest)
        table = tables[i]  # until the next table has older ones
        until = min(fresh_from, oldest[0][0] + 1) if oldest else fresh_from
        freed += table.evict(closed_before, until, excess - freed, closed)
        if table.closed_from < fresh_from:
            heapq.heappush(oldest, (table.closed_from, i))
    return freed
