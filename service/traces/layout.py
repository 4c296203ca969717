"""The arrays that hold open traces.

A trace is a row of ``slots``. Its matches are a linked list of ``entries``, one for each check that
some span satisfied, in ascending order of checks. The memory of a trace therefore depends on the
rules it touches, not on its length. Its last span ids, which identify repeated spans, are in rings:
16 with every slot, 128 or 1000 in pools for longer traces. Short rings are searched from end to
end; next to a ring of 1000 are chains of the ids with the same hash.

A trace of more than 1000 spans has all its ids in a set, at most three quarters full, in ``ids``:
11 to 21 bytes a span. Only if the sets would be too large are repeated spans identified by the ring
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from betrace.service.otlp.columns import Bytes, Rows

# Columns of a slot. Times are nanoseconds since 1970: SEEN by this service, START and END as sent.
(
    HI,
    LO,
    STATE,
    FIRST_SEEN,
    LAST_SEEN,
    MIN_START,
    MAX_END,
    SPANS,  # distinct spans
    ERRORS,  # of them with status error
    REPEATED,  # spans that were received again
    ENTRIES,  # first entry, -1 without one
    RING,  # row in ring_middle or ring_large, depending on RING_CLASS
    RING_CLASS,
    FLAGS,
    ROOT_ID,  # the earliest span without a parent, by start, then id
    ROOT_START,
    ROOT_NAME_LEN,
    ROOT_SERVICE,  # number of a service name, 0 without one
    SERVICES_1,  # numbers of up to eight services, 16 bits each, lowest bits first, 0 for none
    SERVICES_2,
    CLOSED_AT,
    NEXT_FREE,
    POSITION_COUNT,
    POSITION_0,  # span-log positions of its frames, up to POSITIONS
) = range(24)
POSITIONS = 8
SLOT_COLUMNS = POSITION_0 + POSITIONS

FREE, OPEN, CLOSED = range(3)  # STATE

# FLAGS
DIRTY = 1  # a count crossed a threshold in this batch
COMPLETED = 2  # a span had the attribute trace.complete
ROOTED = 4  # a span without a parent was seen
SPILLED = 8  # log positions were moved to FoldOutputs.spilled before
REOPENED = 16  # spans arrived after it was closed
PARTIAL = 32  # reopened without some of its earlier spans
ONCE_DIRTY = 64  # a count crossed a threshold at some time: a signal may have been raised early
WATCHED = 128  # that was a threshold of a relational rule: each further span makes it dirty

SMALL_RING, MIDDLE_RING, LARGE_RING = 16, 128, 1000  # span ids; the last is the documented window
# Columns of ``sets``, whose rows are those of ``ring_large``: where the set begins in ``ids``, and
# its capacity; 0 before it is needed, -1 if it would be too large.
SET_AT, SET_SIZE = range(2)
SET_COLUMNS = 2
LEAST_SET = 2048  # ids
SET_CLASSES = 64  # entry k of ``free_ids``: the first free piece of 2**k ids, + 1
IDS_USED = 0  # in its place: how many of ``ids`` were ever used

CHAINS = 1024  # of a large ring: about one for each id
CHAIN_COLUMNS = CHAINS + LARGE_RING  # places in the ring + 1: each chain's newest id, then the next
NAME_BYTES = 96  # stored of a root span's name

# Columns of an entry.
E_CHECK, E_NEXT, E_COUNT, E_EVIDENCE = range(4)  # then EVIDENCE pairs (start, span id), ascending
EVIDENCE = 5
ENTRY_COLUMNS = E_EVIDENCE + 2 * EVIDENCE

# Entries of ``fill``: the rows used of each pool, and the head of its free list (-1: none).
(
    SLOTS_USED,
    SLOTS_FREE,
    ENTRIES_USED,
    ENTRIES_FREE,
    MIDDLE_USED,
    MIDDLE_FREE,
    LARGE_USED,
    LARGE_FREE,
    OPEN_COUNT,
    CLOSED_COUNT,
) = range(10)
FILL_SIZE = 10

NEVER = 2**63 - 1  # activity of a slot that is not open

SWEEP_BATCH = 4096  # most traces in one DueTraces


@dataclass(slots=True)
class TraceTotals:
    """Running totals of the traces in all tables that share this object; the tables update it."""

    open: int = 0
    closed: int = 0
    ids: int = 0
    """Capacity of the sets of span ids."""


class TraceArrays(NamedTuple):
    """All of a tenant's open and recently closed traces.

    ``table`` is a hash table with linear probing and a power of two as its length. An entry has the
    32 low bits of the hash above slot number + 1; 0 is empty. ``secret`` is three random odd
    numbers that go into the hashes. ``chains`` belong to ``ring_large``: see
    :func:`betrace.service.traces.pools.chained`; so do ``sets``, whose ids are in ``ids``, where a
    free piece begins with the next one of its size. ``activity[slot]`` is LAST_SEEN of an open
    trace, else ``NEVER``; it is not a column of the slots, so that finding idle traces reads little
    memory.
    """

    table: Rows
    secret: Rows
    slots: Rows
    activity: Rows
    names: Bytes
    ring_small: Rows
    ring_middle: Rows
    ring_large: Rows
    chains: npt.NDArray[np.int16]
    sets: Rows
    ids: Rows
    free_ids: Rows
    entries: Rows
    fill: Rows


class RuleArrays(NamedTuple):
    """The part of :class:`~betrace.service.rules.compile.CompiledRules` that the fold reads."""

    predicates: Rows
    code: Rows
    leaves: Rows
    text: Bytes
    thresholds: Rows
    threshold_starts: Rows
    watched: Rows


class BatchArrays(NamedTuple):
    """A :class:`~betrace.service.otlp.columns.SpanBatch`. ``services`` is the number of each
    resource's service, ``positions`` the log position of each body; rows with ``skip`` set are
    skipped."""

    buf: Bytes
    spans: Rows
    resources: Rows
    scopes: Rows
    services: Rows
    positions: Rows
    skip: Bytes


class FoldOutputs(NamedTuple):
    """The results of a fold; ``counts`` has the number of rows filled in each."""

    ask: Rows  # (row, check or -1 for all checks with a pattern, slot), for Python to evaluate
    dirty: Rows  # slots worth an early decision
    completed: Rows  # slots with a span that says trace.complete
    spilled: Rows  # (hi, lo, POSITIONS positions)
    late: Rows  # rows of the batch whose trace may have been closed and forgotten
    counts: Rows


# Entries of FoldOutputs.counts.
(ASKED, DIRTIED, COMPLETIONS, SPILLS, REPEATS, OPENED, MATCHED, STOPPED_SLOT, LATENESS) = range(9)
COUNTS_SIZE = 9

# Why a fold stopped.
(
    DONE,
    NEED_SLOTS,
    NEED_ENTRIES,
    NEED_MIDDLE,
    NEED_LARGE,
    NEED_ASK,
    NEED_SPILL,
    NAMES_FULL,
    LATE,  # the slot in STOPPED_SLOT is closed and must be reopened
    NEED_SET,  # the slot in STOPPED_SLOT needs a larger set of ids
) = range(10)
