"""Kernels that fold spans into open traces; the arrays are described in
:mod:`betrace.service.traces.layout`. The caller, :class:`betrace.service.traces.folding.FoldRun`,
grows arrays and handles everything rare: a kernel stops before a row it cannot fold and returns the
reason.
"""

from __future__ import annotations

from betrace.service.jit import lean_kernel
from betrace.service.otlp.columns import (
    BODY,
    COMPLETE,
    HAS_PARENT,
    NAME_HASH,
    NAME_LEN,
    NAME_OFF,
    RESOURCE,
    SCOPE,
    SPAN_ID,
    START,
    STATUS,
    TRACE_HI,
    TRACE_LO,
    Rows,
)
from betrace.service.otlp.columns import END as SPAN_END
from betrace.service.otlp.columns import FLAGS as SPAN_FLAGS
from betrace.service.rules.match import ASK, YES, satisfies
from betrace.service.rules.names import FULL, N_COUNT, N_FIRST, TOO_LONG, NameArrays, find_name
from betrace.service.traces.late_filter import may_hold
from betrace.service.traces.layout import (
    ASKED,
    CLOSED,
    COMPLETED,
    COMPLETIONS,
    DIRTIED,
    DIRTY,
    DONE,
    E_CHECK,
    E_COUNT,
    E_EVIDENCE,
    E_NEXT,
    ENTRIES,
    ENTRIES_FREE,
    ENTRIES_USED,
    ERRORS,
    EVIDENCE,
    FIRST_SEEN,
    FLAGS,
    HI,
    LARGE_FREE,
    LARGE_RING,
    LARGE_USED,
    LAST_SEEN,
    LATE,
    LATENESS,
    LO,
    MATCHED,
    MAX_END,
    MIDDLE_FREE,
    MIDDLE_RING,
    MIDDLE_USED,
    MIN_START,
    NAME_BYTES,
    NAMES_FULL,
    NEED_ASK,
    NEED_ENTRIES,
    NEED_LARGE,
    NEED_MIDDLE,
    NEED_SET,
    NEED_SLOTS,
    NEED_SPILL,
    NEVER,
    NEXT_FREE,
    ONCE_DIRTY,
    OPEN,
    OPEN_COUNT,
    OPENED,
    POSITION_0,
    POSITION_COUNT,
    POSITIONS,
    REPEATED,
    REPEATS,
    RING,
    RING_CLASS,
    ROOT_ID,
    ROOT_NAME_LEN,
    ROOT_SERVICE,
    ROOT_START,
    ROOTED,
    SERVICES_1,
    SERVICES_2,
    SET_SIZE,
    SLOTS_FREE,
    SLOTS_USED,
    SMALL_RING,
    SPANS,
    SPILLED,
    SPILLS,
    STATE,
    STOPPED_SLOT,
    WATCHED,
    BatchArrays,
    FoldOutputs,
    RuleArrays,
    TraceArrays,
)
from betrace.service.traces.pools import (
    copy,
    enter,
    find_slot,
    has_rows,
    hashed,
    look_ahead,
    remember,
    same_trace,
    seen,
    take,
)

AHEAD = 64  # spans whose traces are read together


@lean_kernel
def _open(traces: TraceArrays, hi: int, lo: int, now: int) -> int:
    slot = take(traces.fill, SLOTS_FREE, SLOTS_USED, traces.slots, NEXT_FREE)
    row = traces.slots[slot]
    row[:] = 0
    row[HI] = hi
    row[LO] = lo
    row[STATE] = OPEN
    row[FIRST_SEEN] = now
    row[ENTRIES] = -1
    row[MIN_START] = NEVER
    traces.fill[OPEN_COUNT] += 1
    enter(traces.table, hashed(traces.secret, hi, lo), slot)
    return slot


@lean_kernel
def add_match(traces: TraceArrays, slot: int, check: int, start: int, span_id: int) -> int:
    """Count a span for a check of a trace and keep the earliest spans as evidence; returns the new
    count."""
    entries = traces.entries
    before = -1
    at = traces.slots[slot, ENTRIES]
    while at >= 0 and entries[at, E_CHECK] < check:
        before = at
        at = entries[at, E_NEXT]
    if at < 0 or entries[at, E_CHECK] != check:
        new = take(traces.fill, ENTRIES_FREE, ENTRIES_USED, entries, E_NEXT)
        entries[new, E_CHECK] = check
        entries[new, E_NEXT] = at
        entries[new, E_COUNT] = 0
        if before < 0:
            traces.slots[slot, ENTRIES] = new
        else:
            entries[before, E_NEXT] = new
        at = new
    entry = entries[at]
    entry[E_COUNT] += 1
    i = min(entry[E_COUNT] - 1, EVIDENCE)
    while i > 0:
        e = E_EVIDENCE + 2 * (i - 1)
        if entry[e] < start or (entry[e] == start and entry[e + 1] <= span_id):
            break
        if i < EVIDENCE:
            entry[e + 2] = entry[e]
            entry[e + 3] = entry[e + 1]
        i -= 1
    if i < EVIDENCE:
        entry[E_EVIDENCE + 2 * i] = start
        entry[E_EVIDENCE + 2 * i + 1] = span_id
    return entry[E_COUNT]


@lean_kernel
def crosses(rules: RuleArrays, check: int, count: int) -> bool:
    """Whether a rule can become certain at ``count`` while the trace is open."""
    for i in range(rules.threshold_starts[check], rules.threshold_starts[check + 1]):
        if rules.thresholds[i] == count:
            return True
    return False


@lean_kernel
def mark_dirty(traces: TraceArrays, slot: int, outputs: FoldOutputs, watched: int) -> None:
    """Mark a trace for an early decision, once in each batch; with ``watched`` not 0 for one
    whenever spans arrive."""
    if watched:
        traces.slots[slot, FLAGS] |= WATCHED
    if not traces.slots[slot, FLAGS] & DIRTY:
        traces.slots[slot, FLAGS] |= DIRTY | ONCE_DIRTY
        outputs.dirty[outputs.counts[DIRTIED]] = slot
        outputs.counts[DIRTIED] += 1


@lean_kernel
def _add_service(row: Rows, service: int) -> None:
    for column in (SERVICES_1, SERVICES_2):
        packed = row[column]
        for shift in (0, 16, 32, 48):
            known = packed >> shift & 0xFFFF
            if known == service:
                return
            if known == 0:
                row[column] = packed | service << shift
                return


@lean_kernel
def _new_position(row: Rows, position: int) -> bool:
    """Whether the frame is not among the trace's positions yet (0 stands for no frame)."""
    for k in range(row[POSITION_COUNT]):
        if row[POSITION_0 + k] == position:
            return False
    return position != 0


@lean_kernel
def _add_span(traces: TraceArrays, slot: int, batch: BatchArrays, span: Rows, now: int) -> None:
    """Add everything about a new span except its matches."""
    row = traces.slots[slot]
    remember(traces, slot, span[SPAN_ID])
    row[SPANS] += 1
    row[ERRORS] += span[STATUS] == 2
    row[MIN_START] = min(row[MIN_START], span[START])
    row[MAX_END] = max(row[MAX_END], span[SPAN_END])
    service = batch.services[span[RESOURCE]]
    if service > 0:
        _add_service(row, service)
    if not span[SPAN_FLAGS] & HAS_PARENT:
        first = not row[FLAGS] & ROOTED
        if (
            first
            or span[START] < row[ROOT_START]
            or (span[START] == row[ROOT_START] and span[SPAN_ID] < row[ROOT_ID])
        ):
            length = min(span[NAME_LEN], NAME_BYTES)
            while (
                length < span[NAME_LEN]
                and length > 0
                and batch.buf[span[NAME_OFF] + length] & 0xC0 == 0x80
            ):
                length -= 1  # do not cut inside a character
            row[FLAGS] |= ROOTED
            row[ROOT_ID] = span[SPAN_ID]
            row[ROOT_START] = span[START]
            row[ROOT_NAME_LEN] = length
            row[ROOT_SERVICE] = service
            for k in range(length):
                traces.names[slot, k] = batch.buf[span[NAME_OFF] + k]


@lean_kernel
def fold(
    batch: BatchArrays,
    first_row: int,
    known_only: bool,
    filters: Rows,
    salt: int,
    now: int,
    names: NameArrays,
    rules: RuleArrays,
    traces: TraceArrays,
    outputs: FoldOutputs,
    scratch: Rows,
    ahead: Rows,
) -> tuple[int, int]:
    """Fold the rows of a batch from ``first_row`` on.

    Returns ``(row, reason)``: the row to continue with, and why the kernel stopped there (``DONE``
    at the end). With ``known_only``, rows of traces without a slot are skipped, and folded rows are
    marked in ``batch.skip``. Rows of new traces that ``filters`` may contain
    (:mod:`betrace.service.traces.late_filter`; none if it has no columns) are not folded but listed
    in ``outputs.late``. ``now`` is in nanoseconds since 1970, ``scratch`` int64[4], ``ahead``
    int64[2, AHEAD].
    """
    counts = outputs.counts
    fill = traces.fill
    block = first_row
    block_end = first_row
    for r in range(first_row, len(batch.spans)):
        if r == block_end:
            block = r
            block_end = min(r + AHEAD, len(batch.spans))
            scratch[0] = look_ahead(traces, batch, block, block_end, ahead[0], ahead[1])
        if batch.skip[r]:
            continue
        span = batch.spans[r]
        hi = span[TRACE_HI]
        lo = span[TRACE_LO]
        slot = ahead[1, r - block]
        if slot < 0:  # it may have been opened since look_ahead
            slot = find_slot(traces, hi, lo)
        if slot < 0 and known_only:
            continue
        if slot < 0 and filters.shape[1] > 0 and may_hold(filters, salt, hi, lo):
            outputs.late[counts[LATENESS]] = r
            counts[LATENESS] += 1
            continue

        # Everything that can stop the kernel comes before the first change.
        if slot >= 0 and traces.slots[slot, STATE] == CLOSED:
            counts[STOPPED_SLOT] = slot
            return r, LATE
        if slot < 0 and not has_rows(fill, SLOTS_FREE, SLOTS_USED, len(traces.slots), 1):
            return r, NEED_SLOTS
        position = batch.positions[span[BODY]]
        if slot >= 0:
            row = traces.slots[slot]
            n = row[SPANS]
            if n == SMALL_RING and not has_rows(
                fill, MIDDLE_FREE, MIDDLE_USED, len(traces.ring_middle), 1
            ):
                return r, NEED_MIDDLE
            if n == MIDDLE_RING and not has_rows(
                fill, LARGE_FREE, LARGE_USED, len(traces.ring_large), 1
            ):
                return r, NEED_LARGE
            if n >= LARGE_RING and row[RING_CLASS] == 2:
                size = traces.sets[row[RING], SET_SIZE]
                if size >= 0 and 4 * n >= 3 * size:
                    counts[STOPPED_SLOT] = slot
                    return r, NEED_SET
            if row[POSITION_COUNT] == POSITIONS and counts[SPILLS] == len(outputs.spilled):
                return r, NEED_SPILL
        name = find_name(names, span[NAME_HASH], batch.buf, span[NAME_OFF], span[NAME_LEN])
        interested = 0
        if name == FULL:
            return r, NAMES_FULL
        if name >= 0:
            interested = names.slots[name, N_COUNT]
            if not has_rows(fill, ENTRIES_FREE, ENTRIES_USED, len(traces.entries), interested):
                return r, NEED_ENTRIES
        if counts[ASKED] + max(1, interested) > len(outputs.ask):
            return r, NEED_ASK

        if known_only:
            batch.skip[r] = 1
        if slot < 0:
            slot = _open(traces, hi, lo, now)
            counts[OPENED] += 1
            after = r + 1
            while after < block_end and same_trace(span, batch.spans[after]):
                ahead[1, after - block] = slot
                after += 1
        row = traces.slots[slot]
        row[LAST_SEEN] = max(row[LAST_SEEN], now)  # the clock may have been set back
        traces.activity[slot] = now
        if _new_position(row, position):
            if row[POSITION_COUNT] == POSITIONS:
                spill = outputs.spilled[counts[SPILLS]]
                spill[0] = hi
                spill[1] = lo
                copy(row[POSITION_0:], spill[2:], POSITIONS)
                counts[SPILLS] += 1
                row[POSITION_COUNT] = 0
                row[FLAGS] |= SPILLED
            row[POSITION_0 + row[POSITION_COUNT]] = position
            row[POSITION_COUNT] += 1
        if span[SPAN_FLAGS] & COMPLETE and not row[FLAGS] & COMPLETED:
            row[FLAGS] |= COMPLETED
            outputs.completed[counts[COMPLETIONS]] = slot
            counts[COMPLETIONS] += 1
        if seen(traces, slot, span[SPAN_ID]):
            row[REPEATED] += 1
            counts[REPEATS] += 1
            continue
        _add_span(traces, slot, batch, span, now)
        if row[FLAGS] & WATCHED:
            mark_dirty(traces, slot, outputs, 0)

        if name == TOO_LONG:
            ask = outputs.ask[counts[ASKED]]
            ask[0] = r
            ask[1] = -1
            ask[2] = slot
            counts[ASKED] += 1
        for k in range(interested):
            check = names.lists[names.slots[name, N_FIRST] + k]
            program = rules.predicates[check]
            verdict = YES
            if program >= 0:
                verdict = satisfies(
                    program,
                    rules.code,
                    rules.leaves,
                    rules.text,
                    batch.buf,
                    span,
                    batch.resources[span[RESOURCE]],
                    batch.scopes[span[SCOPE]],
                    scratch,
                )
            if verdict == YES:
                counts[MATCHED] += 1
                count = add_match(traces, slot, check, span[START], span[SPAN_ID])
                if crosses(rules, check, count):
                    mark_dirty(traces, slot, outputs, rules.watched[check])
            elif verdict == ASK:
                ask = outputs.ask[counts[ASKED]]
                ask[0] = r
                ask[1] = check
                ask[2] = slot
                counts[ASKED] += 1
    return len(batch.spans), DONE


@lean_kernel
def add_asked(
    batch: BatchArrays,
    matched: Rows,
    rules: RuleArrays,
    traces: TraceArrays,
    outputs: FoldOutputs,
) -> None:
    """Count the matches found in Python: rows ``(row, check, slot)``. The caller must first make
    sure that there are enough entries."""
    for m in range(len(matched)):
        span = batch.spans[matched[m, 0]]
        slot = matched[m, 2]
        check = matched[m, 1]
        outputs.counts[MATCHED] += 1
        count = add_match(traces, slot, check, span[START], span[SPAN_ID])
        if crosses(rules, check, count):
            mark_dirty(traces, slot, outputs, rules.watched[check])
