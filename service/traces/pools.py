"""Kernels for the pools of open traces: the hash table of slots, free lists, and the rings of span
ids. The arrays are described in :mod:`betrace.service.traces.layout`."""

from __future__ import annotations

from betrace.service.jit import lean_kernel
from betrace.service.otlp.columns import SPAN_ID, TRACE_HI, TRACE_LO, Rows
from betrace.service.traces.layout import (
    CHAINS,
    FREE,
    HI,
    IDS_USED,
    LARGE_FREE,
    LARGE_RING,
    LARGE_USED,
    LO,
    MIDDLE_FREE,
    MIDDLE_RING,
    MIDDLE_USED,
    RING,
    RING_CLASS,
    SET_AT,
    SET_SIZE,
    SLOT_COLUMNS,
    SLOTS_USED,
    SMALL_RING,
    SPANS,
    STATE,
    BatchArrays,
    TraceArrays,
)

_SLOT = 0xFFFFFFFF  # mask of an entry of the hash table: the slot number + 1


@lean_kernel
def hashed(secret: Rows, hi: int, lo: int) -> int:
    """The hash of a trace id. Clients choose the ids; without the secret they could choose ids that
    all collide, which makes lookups slow."""
    mixed = (hi ^ secret[0]) * secret[1]
    mixed = (mixed ^ (mixed >> 32) ^ lo) * secret[2]
    mixed = (mixed ^ (mixed >> 32)) * secret[1]
    return mixed ^ (mixed >> 32)


@lean_kernel
def probe(traces: TraceArrays, hash_: int, hi: int, lo: int) -> int:
    """The slot of a trace with this hash, or -1."""
    table = traces.table
    mask = len(table) - 1
    i = hash_ & mask
    while table[i] != 0:
        entry = table[i]
        if entry >> 32 == hash_ << 32 >> 32:  # otherwise its row need not be read
            slot = (entry & _SLOT) - 1
            if traces.slots[slot, LO] == lo and traces.slots[slot, HI] == hi:
                return slot
        i = (i + 1) & mask
    return -1


@lean_kernel
def find_slot(traces: TraceArrays, hi: int, lo: int) -> int:
    """The slot of a trace, or -1."""
    return probe(traces, hashed(traces.secret, hi, lo), hi, lo)


@lean_kernel
def enter(table: Rows, hash_: int, slot: int) -> None:
    """Add a slot to the hash table; its trace must not be in it yet."""
    mask = len(table) - 1
    i = hash_ & mask
    while table[i] != 0:
        i = (i + 1) & mask
    table[i] = hash_ << 32 | (slot + 1)


@lean_kernel
def rebuild(table: Rows, secret: Rows, slots: Rows, used: int) -> None:
    """Fill an empty hash table with all slots in use."""
    for slot in range(used):
        if slots[slot, STATE] != FREE:
            enter(table, hashed(secret, slots[slot, HI], slots[slot, LO]), slot)


@lean_kernel
def leave(traces: TraceArrays, slot: int) -> None:
    """Remove a slot from the hash table and move back the entries that probed past it (Knuth, The
    Art of Computer Programming, 6.4, algorithm R)."""
    table = traces.table
    mask = len(table) - 1
    i = hashed(traces.secret, traces.slots[slot, HI], traces.slots[slot, LO]) & mask
    while (table[i] & _SLOT) - 1 != slot:
        i = (i + 1) & mask
    hole = i
    i = (i + 1) & mask
    while table[i] != 0:
        home = table[i] >> 32
        if ((i - home) & mask) >= ((i - hole) & mask):
            table[hole] = table[i]
            hole = i
        i = (i + 1) & mask
    table[hole] = 0


@lean_kernel
def same_trace(a: Rows, b: Rows) -> bool:
    """Whether two spans belong to the same trace."""
    return a[TRACE_LO] == b[TRACE_LO] and a[TRACE_HI] == b[TRACE_HI]


@lean_kernel
def _touch(traces: TraceArrays, slot: int, span_id: int) -> int:
    """Read the parts of a trace that folding a span will read."""
    row = traces.slots[slot]
    touched = row[8] ^ row[16] ^ row[24] ^ row[SLOT_COLUMNS - 1]  # each cache line
    touched ^= traces.ring_small[slot, 0] ^ traces.ring_small[slot, SMALL_RING // 2]
    touched ^= traces.activity[slot]
    if row[RING_CLASS] == 2:
        ids, links = traces.ring_large[row[RING]], traces.chains[row[RING]]
        at = row[SPANS] % LARGE_RING
        size = traces.sets[row[RING], SET_SIZE]
        if size > 0:
            first = traces.sets[row[RING], SET_AT]
            touched ^= traces.ids[first + (_mixed(traces.secret, span_id) & (size - 1))]
            return touched ^ ids[at]
        newest = links[_chain(traces.secret, span_id)] - 1
        touched ^= ids[at] ^ links[CHAINS + at]
        if newest >= 0:
            touched ^= ids[newest] ^ links[CHAINS + newest]
    return touched


@lean_kernel
def look_ahead(
    traces: TraceArrays, batch: BatchArrays, first: int, end: int, hashes: Rows, slots: Rows
) -> int:
    """Write the slots of the rows ``first`` to ``end``, or -1, to ``slots``, and read the memory
    that folding them will read; ``hashes`` is scratch.

    These reads do not depend on each other, so the processor fetches the memory of many rows at
    once; a fold, which changes what it reads, would wait for one row after another ("group
    prefetching": Chen et al., Improving Hash Join Performance through Prefetching, 2004). The
    result only keeps the reads from being optimised away.
    """
    touched = 0
    mask = len(traces.table) - 1
    for r in range(first, end):
        span = batch.spans[r]
        if r == first or not same_trace(span, batch.spans[r - 1]):
            hash_ = hashed(traces.secret, span[TRACE_HI], span[TRACE_LO])
            hashes[r - first] = hash_
            touched ^= traces.table[hash_ & mask]
    slot = -1
    for r in range(first, end):
        span = batch.spans[r]
        if r == first or not same_trace(span, batch.spans[r - 1]):
            slot = probe(traces, hashes[r - first], span[TRACE_HI], span[TRACE_LO])
            if slot >= 0:
                touched ^= _touch(traces, slot, span[SPAN_ID])
        slots[r - first] = slot
    return touched


@lean_kernel
def take(fill: Rows, free: int, used: int, links: Rows, column: int) -> int:
    """Take a row of a pool: from its free list, else the next unused one."""
    row = fill[free]
    if row >= 0:
        fill[free] = links[row, column]
        return row
    fill[used] += 1
    return fill[used] - 1


@lean_kernel
def give(fill: Rows, free: int, links: Rows, column: int, row: int) -> None:
    """Return a row to the free list of its pool."""
    links[row, column] = fill[free]
    fill[free] = row


@lean_kernel
def has_rows(fill: Rows, free: int, used: int, capacity: int, wanted: int) -> bool:
    """Whether a pool has ``wanted`` rows left; a free list counts as one row."""
    return capacity - fill[used] >= wanted or (wanted <= 1 and fill[free] >= 0)


@lean_kernel
def holds(ring: Rows, count: int, span_id: int) -> bool:
    """Whether the id is among the first ``count`` of a ring."""
    found = False
    for x in ring[:count]:  # without an early exit the loop is vectorised
        found |= x == span_id
    return found


@lean_kernel
def _mixed(secret: Rows, span_id: int) -> int:
    """24 bits from a span id, by multiplicative hashing (Knuth, The Art of Computer Programming,
    6.4) with an odd multiplier; it is secret, because clients choose the ids."""
    mixed = (span_id ^ secret[0]) * secret[1]
    return (mixed ^ (mixed >> 32)) * secret[2] >> 40 & 0xFFFFFF


@lean_kernel
def _chain(secret: Rows, span_id: int) -> int:
    """The chain of a span id."""
    return _mixed(secret, span_id) & (CHAINS - 1)


@lean_kernel
def _find_id(traces: TraceArrays, at: int, size: int, span_id: int) -> int:
    """The place of an id in a set, or the empty place where it belongs. No id is 0."""
    i = _mixed(traces.secret, span_id) & (size - 1)
    while traces.ids[at + i] != 0 and traces.ids[at + i] != span_id:
        i = (i + 1) & (size - 1)
    return at + i


@lean_kernel
def release_set(traces: TraceArrays, ring: int) -> None:
    """Free the set of a large ring, if it has one."""
    size = traces.sets[ring, SET_SIZE]
    if size > 0:
        at = traces.sets[ring, SET_AT]
        k = 0
        while 1 << k < size:
            k += 1
        traces.ids[at] = traces.free_ids[k]
        traces.free_ids[k] = at + 1
    traces.sets[ring, SET_SIZE] = 0


@lean_kernel
def build_set(traces: TraceArrays, ring: int, count: int, size: int) -> None:
    """Give a large ring, to which ``count`` ids were added, a set of ``size`` (a power of two) with
    the ids of its old set; without one, with those of the ring. There must be room for it."""
    k = 0
    while 1 << k < size:
        k += 1
    at = traces.free_ids[k] - 1
    if at >= 0:
        traces.free_ids[k] = traces.ids[at]
    else:
        at = traces.free_ids[IDS_USED]
        traces.free_ids[IDS_USED] += size
    traces.ids[at : at + size] = 0
    old = traces.sets[ring, SET_SIZE]
    if old > 0:
        first = traces.sets[ring, SET_AT]
        for i in range(first, first + old):
            if traces.ids[i] != 0:
                traces.ids[_find_id(traces, at, size, traces.ids[i])] = traces.ids[i]
    else:
        for i in range(min(count, LARGE_RING)):
            span_id = traces.ring_large[ring, i]
            traces.ids[_find_id(traces, at, size, span_id)] = span_id
    release_set(traces, ring)
    traces.sets[ring, SET_AT] = at
    traces.sets[ring, SET_SIZE] = size


@lean_kernel
def fill_set(traces: TraceArrays, ring: int, span_ids: Rows) -> None:
    """Add ids to the set of a large ring, which must have room for them."""
    at, size = traces.sets[ring, SET_AT], traces.sets[ring, SET_SIZE]
    for span_id in span_ids:
        traces.ids[_find_id(traces, at, size, span_id)] = span_id


@lean_kernel
def chained(traces: TraceArrays, ring: int, count: int, span_id: int) -> bool:
    """Whether a large ring, to which ``count`` ids were added, still contains this one.

    A chain leads from its newest id to older ones, as in deflate (RFC 1951, section 4). Ids are
    never removed from it: a link to a place that was overwritten by a newer id is its end.
    """
    ids = traces.ring_large[ring]
    links = traces.chains[ring]
    newest = (count - 1) % LARGE_RING
    at = links[_chain(traces.secret, span_id)] - 1
    age = -1
    while at >= 0:
        older = newest - at
        if older < 0:
            older += LARGE_RING
        if older <= age:
            return False
        if ids[at] == span_id:
            return True
        age = older
        at = links[CHAINS + at] - 1
    return False


@lean_kernel
def link(traces: TraceArrays, ring: int, at: int) -> None:
    """Add the newest id of a large ring, which is at ``at``, to its chain."""
    links = traces.chains[ring]
    chain = _chain(traces.secret, traces.ring_large[ring, at])
    links[CHAINS + at] = links[chain]
    links[chain] = at + 1


@lean_kernel
def link_all(traces: TraceArrays, ring: int, count: int) -> None:
    """Build the chains of a large ring to which ``count`` ids were added."""
    traces.chains[ring, :CHAINS] = 0
    for n in range(max(0, count - LARGE_RING), count):
        link(traces, ring, n % LARGE_RING)


@lean_kernel
def relink(traces: TraceArrays) -> None:
    """Build the chains of all large rings in use."""
    for slot in range(traces.fill[SLOTS_USED]):
        row = traces.slots[slot]
        if row[STATE] != FREE and row[RING_CLASS] == 2 and traces.sets[row[RING], SET_SIZE] <= 0:
            link_all(traces, row[RING], row[SPANS])


@lean_kernel
def seen(traces: TraceArrays, slot: int, span_id: int) -> bool:
    """Whether the span id is among the trace's last ones, or, if it has a set, among all. Adds it
    to the set; :func:`remember` adds it to the ring."""
    row = traces.slots[slot]
    n = row[SPANS]
    if row[RING_CLASS] == 0:
        return holds(traces.ring_small[slot], min(n, SMALL_RING), span_id)
    if row[RING_CLASS] == 1:
        return holds(traces.ring_middle[row[RING]], min(n, MIDDLE_RING), span_id)
    size = traces.sets[row[RING], SET_SIZE]
    if size > 0:
        place = _find_id(traces, traces.sets[row[RING], SET_AT], size, span_id)
        if traces.ids[place] == span_id:
            return True
        traces.ids[place] = span_id
        return False
    return chained(traces, row[RING], n, span_id)


@lean_kernel
def copy(source: Rows, target: Rows, length: int) -> None:
    """Copy the first ``length`` values."""
    for i in range(length):  # a slice assignment might allocate
        target[i] = source[i]


@lean_kernel
def remember(traces: TraceArrays, slot: int, span_id: int) -> None:
    """Add a span id to the trace's ring; when the ring is full, the trace moves to a larger one."""
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
        link_all(traces, ring, MIDDLE_RING)
    if row[RING_CLASS] == 0:
        traces.ring_small[slot, n] = span_id
    elif row[RING_CLASS] == 1:
        traces.ring_middle[row[RING], n] = span_id
    else:
        traces.ring_large[row[RING], n % LARGE_RING] = span_id
        if traces.sets[row[RING], SET_SIZE] <= 0:
            link(traces, row[RING], n % LARGE_RING)
