"""Kernels for the traces in a table: they find idle and old traces, copy those that are due, and
close, reopen and free traces."""

from __future__ import annotations

from betrace.service.jit import lean_kernel
from betrace.service.otlp.columns import Rows
from betrace.service.traces.late_filter import add
from betrace.service.traces.layout import (
    CLOSED,
    CLOSED_AT,
    CLOSED_COUNT,
    COMPLETED,
    DIRTY,
    E_NEXT,
    ENTRIES,
    ENTRIES_FREE,
    ENTRY_COLUMNS,
    FIRST_SEEN,
    FLAGS,
    FREE,
    HI,
    LARGE_FREE,
    LARGE_RING,
    LAST_SEEN,
    LO,
    MIDDLE_FREE,
    NEVER,
    NEXT_FREE,
    OPEN,
    OPEN_COUNT,
    RING,
    RING_CLASS,
    SET_SIZE,
    SLOT_COLUMNS,
    SLOTS_FREE,
    SLOTS_USED,
    SPANS,
    STATE,
    TraceArrays,
)
from betrace.service.traces.pools import copy, give, leave, release_set


@lean_kernel
def count_entries(traces: TraceArrays, slots: Rows) -> int:
    """The number of entries of the given slots together."""
    total = 0
    for slot in slots:
        at = traces.slots[slot, ENTRIES]
        while at >= 0:
            total += 1
            at = traces.entries[at, E_NEXT]
    return total


@lean_kernel
def copy_out(traces: TraceArrays, slots: Rows, rows: Rows, entries: Rows, starts: Rows) -> None:
    """Copy slots, and their entries one after another: the entries of slot k are
    ``entries[starts[k]:starts[k + 1]]``."""
    n = 0
    for k in range(len(slots)):
        slot = slots[k]
        copy(traces.slots[slot], rows[k], SLOT_COLUMNS)
        starts[k] = n
        at = traces.slots[slot, ENTRIES]
        while at >= 0:
            copy(traces.entries[at], entries[n], ENTRY_COLUMNS)
            n += 1
            at = traces.entries[at, E_NEXT]
    starts[len(slots)] = n


@lean_kernel
def close(traces: TraceArrays, slots: Rows, now: int) -> None:
    """Mark open traces as closed. They stay for late spans until they are freed."""
    for slot in slots:
        traces.slots[slot, STATE] = CLOSED
        traces.slots[slot, CLOSED_AT] = now
        traces.activity[slot] = NEVER
    traces.fill[OPEN_COUNT] -= len(slots)
    traces.fill[CLOSED_COUNT] += len(slots)


@lean_kernel
def reopen(traces: TraceArrays, slot: int, now: int, flags: int) -> None:
    """Open a closed trace again; ``flags`` are added to it."""
    row = traces.slots[slot]
    row[STATE] = OPEN
    row[FLAGS] = (row[FLAGS] & ~(COMPLETED | DIRTY)) | flags
    row[LAST_SEEN] = max(row[LAST_SEEN], now)
    traces.activity[slot] = now
    traces.fill[OPEN_COUNT] += 1
    traces.fill[CLOSED_COUNT] -= 1


@lean_kernel
def free_closed(
    traces: TraceArrays, slots: Rows, closed_at: int, filters: Rows, generation: int, salt: int
) -> int:
    """Free the slots whose traces closed at ``closed_at`` and were not reopened, and add the traces
    to a generation of ``filters``. Returns how many were freed."""
    freed = 0
    for slot in slots:
        row = traces.slots[slot]
        if row[STATE] != CLOSED or row[CLOSED_AT] != closed_at:
            continue
        add(filters, generation, salt, row[HI], row[LO])
        leave(traces, slot)
        at = row[ENTRIES]
        while at >= 0:
            after = traces.entries[at, E_NEXT]
            give(traces.fill, ENTRIES_FREE, traces.entries, E_NEXT, at)
            at = after
        if row[RING_CLASS] == 1:
            give(traces.fill, MIDDLE_FREE, traces.ring_middle, 0, row[RING])
        elif row[RING_CLASS] == 2:
            release_set(traces, row[RING])
            give(traces.fill, LARGE_FREE, traces.ring_large, 0, row[RING])
        row[STATE] = FREE
        give(traces.fill, SLOTS_FREE, traces.slots, NEXT_FREE, slot)
        freed += 1
    traces.fill[CLOSED_COUNT] -= freed
    return freed


@lean_kernel
def find_idle(traces: TraceArrays, last_seen_before: int, out: Rows) -> int:
    """Find up to ``len(out)`` open slots that received no span since ``last_seen_before``; returns
    how many."""
    found = 0
    used = traces.fill[SLOTS_USED]
    for slot, last in enumerate(traces.activity[:used]):
        if last < last_seen_before:
            out[found] = slot
            found += 1
            if found == len(out):
                break
    return found


@lean_kernel
def find_old(traces: TraceArrays, first_seen_before: int, out: Rows) -> int:
    """Find up to ``len(out)`` open slots that received their first span before
    ``first_seen_before``; returns how many."""
    found = 0
    for slot in range(traces.fill[SLOTS_USED]):
        row = traces.slots[slot]
        if row[STATE] == OPEN and row[FIRST_SEEN] < first_seen_before:
            out[found] = slot
            found += 1
            if found == len(out):
                break
    return found


@lean_kernel
def survey(traces: TraceArrays, long_lived: int, out: Rows) -> None:
    """Write to ``out``: open traces of more than ``long_lived`` spans, span ids stored for open
    traces, and when the oldest open trace received its first span (``NEVER`` without one)."""
    out[:] = 0
    out[2] = NEVER
    for slot in range(traces.fill[SLOTS_USED]):
        row = traces.slots[slot]
        if row[STATE] == OPEN:
            out[0] += row[SPANS] > long_lived
            in_set = row[RING_CLASS] == 2 and traces.sets[row[RING], SET_SIZE] > 0
            out[1] += row[SPANS] if in_set else min(row[SPANS], LARGE_RING)
            out[2] = min(out[2], row[FIRST_SEEN])


@lean_kernel
def clear_dirty(traces: TraceArrays, slots: Rows) -> None:
    """Clear the mark for an early decision."""
    for slot in slots:
        traces.slots[slot, FLAGS] &= ~DIRTY
