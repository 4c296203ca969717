"""Kernels for the pools that open traces are made of: the hash table of slots, free lists, and the
rings of span ids; the arrays are described in :mod:`service.traces.layout`."""

from __future__ import annotations

from service.jit import lean_kernel
from service.otlp.columns import Rows
from service.traces.layout import (
    FREE,
    HI,
    LARGE_FREE,
    LARGE_RING,
    LARGE_USED,
    LO,
    MIDDLE_FREE,
    MIDDLE_RING,
    MIDDLE_USED,
    RING,
    RING_CLASS,
    SMALL_RING,
    SPANS,
    STATE,
    TraceArrays,
)


@lean_kernel
def bucket(secret: Rows, hi: int, lo: int, mask: int) -> int:
    """Where a trace belongs. Clients choose the ids: without the secret they could choose them
    so that all fall into one place, which makes looking them up slow."""
    mixed = (hi ^ secret[0]) * secret[1]
    mixed = (mixed ^ (mixed >> 32) ^ lo) * secret[2]
    mixed = (mixed ^ (mixed >> 32)) * secret[1]
    return (mixed ^ (mixed >> 32)) & mask


@lean_kernel
def find_slot(traces: TraceArrays, hi: int, lo: int) -> int:
    """The slot of a trace, -1 without one."""
    table = traces.table
    mask = len(table) - 1
    i = bucket(traces.secret, hi, lo, mask)
    while table[i] > 0:
        slot = table[i] - 1
        if traces.slots[slot, LO] == lo and traces.slots[slot, HI] == hi:
            return slot
        i = (i + 1) & mask
    return -1


@lean_kernel
def enter(table: Rows, secret: Rows, hi: int, lo: int, slot: int) -> None:
    """Put a slot into the hash table, where its trace must not be yet."""
    mask = len(table) - 1
    i = bucket(secret, hi, lo, mask)
    while table[i] > 0:
        i = (i + 1) & mask
    table[i] = slot + 1


@lean_kernel
def rebuild(table: Rows, secret: Rows, slots: Rows, used: int) -> None:
    """Fill an empty hash table with all slots in use."""
    for slot in range(used):
        if slots[slot, STATE] != FREE:
            enter(table, secret, slots[slot, HI], slots[slot, LO], slot)


@lean_kernel
def leave(traces: TraceArrays, hi: int, lo: int) -> None:
    """Take a trace out of the hash table, moving back what probed past it (Knuth 6.4, R)."""
    table = traces.table
    mask = len(table) - 1
    i = bucket(traces.secret, hi, lo, mask)
    while True:
        slot = table[i] - 1
        if traces.slots[slot, LO] == lo and traces.slots[slot, HI] == hi:
            break
        i = (i + 1) & mask
    hole = i
    i = (i + 1) & mask
    while table[i] > 0:
        slot = table[i] - 1
        home = bucket(traces.secret, traces.slots[slot, HI], traces.slots[slot, LO], mask)
        if ((i - home) & mask) >= ((i - hole) & mask):
            table[hole] = table[i]
            hole = i
        i = (i + 1) & mask
    table[hole] = 0


@lean_kernel
def take(fill: Rows, free: int, used: int, links: Rows, column: int) -> int:
    """A row of a pool: from its free list, else the next unused one."""
    row = fill[free]
    if row >= 0:
        fill[free] = links[row, column]
        return row
    fill[used] += 1
    return fill[used] - 1


@lean_kernel
def give(fill: Rows, free: int, links: Rows, column: int, row: int) -> None:
    links[row, column] = fill[free]
    fill[free] = row


@lean_kernel
def room(fill: Rows, free: int, used: int, capacity: int, wanted: int) -> bool:
    """Whether a pool has ``wanted`` rows; a free list counts as one."""
    return capacity - fill[used] >= wanted or (wanted <= 1 and fill[free] >= 0)


@lean_kernel
def holds(ring: Rows, count: int, span_id: int) -> bool:
    found = False
    for x in ring[:count]:  # no early exit: this way it is vectorised
        found |= x == span_id
    return found


@lean_kernel
def seen(traces: TraceArrays, slot: int, span_id: int) -> bool:
    """Whether the span id is among the last ones of the trace."""
    row = traces.slots[slot]
    n = row[SPANS]
    if row[RING_CLASS] == 0:
        return holds(traces.ring_small[slot], min(n, SMALL_RING), span_id)
    if row[RING_CLASS] == 1:
        return holds(traces.ring_middle[row[RING]], min(n, MIDDLE_RING), span_id)
    return holds(traces.ring_large[row[RING]], min(n, LARGE_RING), span_id)


@lean_kernel
def copy(source: Rows, target: Rows, length: int) -> None:
    for i in range(length):  # a slice assignment might allocate
        target[i] = source[i]


@lean_kernel
def remember(traces: TraceArrays, slot: int, span_id: int) -> None:
    """Add a span id to the ring of the trace, moving to a larger ring when it is full."""
    row = traces.slots[slot]
    n = row[SPANS]
    if row[RING_CLASS] == 0 and n == SMALL_RING:
        ring = take(traces.fill, MIDDLE_FREE, MIDDLE_USED, traces.ring_middle, 0)
        copy(traces.ring_small[slot], traces.ring_middle[ring], SMALL_RING)
        row[RING_CLASS] = 1
        row[RING] = ring
    elif row[RING_CLASS] == 1 and n == MIDDLE_RING:
        ring = take(traces.fill, LARGE_FREE, LARGE_USED, traces.ring_large, 0)
        copy(traces.ring_middle[row[RING]], traces.ring_large[ring], MIDDLE_RING)
        give(traces.fill, MIDDLE_FREE, traces.ring_middle, 0, row[RING])
        row[RING_CLASS] = 2
        row[RING] = ring
    if row[RING_CLASS] == 0:
        traces.ring_small[slot, n] = span_id
    elif row[RING_CLASS] == 1:
        traces.ring_middle[row[RING], n] = span_id
    else:
        traces.ring_large[row[RING], n % LARGE_RING] = span_id
