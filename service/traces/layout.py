"""The arrays in which open traces live.

A trace is a row of ``slots``; its matches hang on it as a chain of ``entries``, one for each
check that some span satisfied, ascending by check. The memory of a trace therefore has the size
of the rules that it touches, whatever its length. The last span ids, for telling repeated spans,
lie in ``rings``: 16 with every slot, 128 or 1000 in pools for the longer traces. The short ones are
searched from end to end; a ring of 1000 has chains of ids with the same hash beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from betrace.service.otlp.columns import Bytes, Rows

# Columns of a slot. Times are nanoseconds since 1970: SEEN as received, START and END as sent.
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
    REPEATED,  # spans that came again
    ENTRIES,  # first entry, -1 without one
    RING,  # row in ring_middle or ring_large, by RING_CLASS
    RING_CLASS,
    FLAGS,
    ROOT_ID,  # the earliest span without a parent, by start and id
    ROOT_START,
    ROOT_NAME_LEN,
    ROOT_SERVICE,  # number of a service name, 0 without one
    SERVICES_1,  # numbers of up to eight services, 16 bits each, lowest first, 0 for none
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
COMPLETED = 2  # a span said trace.complete
ROOTED = 4  # a span without a parent was seen
SPILLED = 8  # log positions were handed out before
REOPENED = 16  # spans came after it was closed
PARTIAL = 32  # reopened without knowing what came before
ONCE_DIRTY = 64  # a count crossed a threshold at some time: it may have been signalled early

SMALL_RING, MIDDLE_RING, LARGE_RING = 16, 128, 1000  # span ids; the last is the promised window
CHAINS = 1024  # of a large ring, about one for each id
CHAIN_COLUMNS = CHAINS + LARGE_RING  # places in the ring + 1: of each chain's newest, of the next
NAME_BYTES = 96  # kept of a root span's name

# Columns of an entry.
E_CHECK, E_NEXT, E_COUNT, E_EVIDENCE = range(4)  # then EVIDENCE pairs (start, span id), ascending
EVIDENCE = 5
ENTRY_COLUMNS = E_EVIDENCE + 2 * EVIDENCE

# Entries of ``fill``: how far each pool is used, and the head of its free list (-1: none).
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


class TraceArrays(NamedTuple):
    """Everything a tenant's open and recently closed traces consist of.

    ``table`` is a hash table (linear probing, a power of two long) of slot number + 1 below the 32
    low bits of the hash, 0 for empty; ``secret`` are three random odd numbers that hashes are made
    with. ``chains`` are those of ``ring_large``: see :func:`betrace.service.traces.pools.chained`.
    ``activity[slot]`` is LAST_SEEN of an open trace, else ``NEVER``: apart from the slots, so that
    looking for idle traces reads little memory.
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


class BatchArrays(NamedTuple):
    """A :class:`~betrace.service.otlp.columns.SpanBatch`. ``services`` numbers the service of each
    resource; ``positions`` are the log positions of each body; rows with ``skip`` set are passed
    over."""

    buf: Bytes
    spans: Rows
    resources: Rows
    scopes: Rows
    services: Rows
    positions: Rows
    skip: Bytes


class FoldOutputs(NamedTuple):
    """What a fold reports, each with its fill in ``counts``."""

    ask: Rows  # (row, check or -1 for every check of a pattern, slot) to be evaluated in Python
    dirty: Rows  # slots worth an early decision
    completed: Rows  # slots that named themselves complete
    spilled: Rows  # (hi, lo, POSITIONS positions)
    late: Rows  # rows of the batch whose trace may have been closed and forgotten
    counts: Rows


# Entries of FoldOutputs.counts.
(ASKED, DIRTIED, COMPLETIONS, SPILLS, REPEATS, OPENED, MATCHED, STOPPED_SLOT, LATENESS) = range(9)
COUNTS_SIZE = 9

# Why a fold stopped before the end.
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
) = range(9)
