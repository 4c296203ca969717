"""The open traces of one tenant under one version of its rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from betrace.service.otlp.columns import Rows
from betrace.service.rules.compile import CompiledRules
from betrace.service.traces import pools, sweep_kernels
from betrace.service.traces.arrays import (
    LEAST_SLOTS,
    empty_arrays,
    grown,
    ids_in_use,
    restored_arrays,
    saved_arrays,
    set_size,
    with_set,
    without_free_sets,
)
from betrace.service.traces.checkpoint import TableSnapshot
from betrace.service.traces.decide import broken
from betrace.service.traces.due import Context, DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import (
    CLOSED,
    CLOSED_AT,
    CLOSED_COUNT,
    ENTRIES_USED,
    ENTRY_COLUMNS,
    FIRST_SEEN,
    FLAGS,
    FREE,
    HI,
    LAST_SEEN,
    LO,
    NEVER,
    OPEN_COUNT,
    PARTIAL,
    REOPENED,
    RING,
    RING_CLASS,
    SET_SIZE,
    SLOT_COLUMNS,
    SLOTS_USED,
    SPANS,
    STATE,
    SWEEP_BATCH,
    RuleArrays,
    TraceArrays,
    TraceTotals,
)
from betrace.service.traces.signal_history import (
    SignalHistory,
    history_from_json,
    history_to_json,
    merged,
    next_signals,
)
from betrace.service.traces.window import Windows

MOST_SET = 1 << 21
"""Capacity of the largest set of span ids: 1.5 million spans. In longer traces, and beyond
``MOST_IDS`` of all sets of a table or ``MOST_IDS_AT_ALL`` of all tables, a repeated span is known
among the last 1000 only."""
MOST_IDS = 1 << 22  # 32 MiB
MOST_IDS_AT_ALL = 1 << 25
_MASK = 2**64 - 1


class TableSurvey(NamedTuple):
    """A table's contents: open traces that are long, span ids stored for open traces, when the
    oldest open trace began (nanoseconds; ``NEVER`` without one), and memory in bytes."""

    long_lived: int
    spans: int
    oldest_ns: int
    nbytes: int


@dataclass(slots=True, eq=False)
class TraceTable:
    """Open and recently closed traces. Not thread-safe: use one thread at a time.

    A timer checks each table often; three bounds tell it when there is nothing to do.
    """

    tenant: str
    rules: CompiledRules
    services: list[str]
    windows: Windows = field(default_factory=Windows)
    ledger_history: dict[str, SignalHistory] = field(default_factory=dict)
    """Signals from before a restart, by trace id."""
    totals: TraceTotals = field(default_factory=TraceTotals)
    arrays: TraceArrays = field(init=False)
    signal_history: dict[int, SignalHistory] = field(default_factory=dict)
    """Signals of traces that were closed before, by slot."""
    # No open trace received its last span, or its first, before these (nanoseconds; NEVER: none
    # is open).
    seen_from: int = NEVER
    begun_from: int = NEVER
    # Open and closed traces, and ids, as included in ``totals``.
    _counted: tuple[int, int, int] = (0, 0, 0)
    _survey: TableSurvey | None = None  # None after a change
    _closed: deque[tuple[int, Rows]] = field(default_factory=deque)  # (time, slots), ascending
    rule_arrays: RuleArrays = field(init=False)
    ask: Rows = field(init=False)

    def __post_init__(self) -> None:
        self.arrays = empty_arrays(LEAST_SLOTS)
        thresholds, threshold_starts = self.rules.thresholds
        self.rule_arrays = RuleArrays(
            self.rules.predicates,
            self.rules.code,
            self.rules.leaves,
            self.rules.text,
            thresholds,
            threshold_starts,
            self.rules.watched,
        )
        self.ask = np.zeros((64, 3), np.int64)

    @property
    def open_count(self) -> int:
        """Open traces."""
        return int(self.arrays.fill[OPEN_COUNT])

    @property
    def closed_count(self) -> int:
        """Closed traces kept for late spans."""
        return int(self.arrays.fill[CLOSED_COUNT])

    @property
    def closed_from(self) -> int:
        """A lower bound of when the closed traces closed (nanoseconds); ``NEVER`` if there are
        none."""
        return self._closed[0][0] if self._closed else NEVER

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(array.nbytes for array in self.arrays)

    def early(self, dirty: Rows, now: int) -> DueTraces:
        """Copies of open traces for which a rule may have become certain."""
        sweep_kernels.clear_dirty(self.arrays, dirty)
        self._take_history(dirty)
        return self.copy(dirty, closed=False, now=now)

    def close_idle(self, last_seen_before: int, now: int, due: list[DueTraces]) -> None:
        """Close the open traces that received no span since then, and add them to ``due``, at most
        ``SWEEP_BATCH`` in each piece."""
        if self.seen_from >= last_seen_before:
            return
        self._close_found(sweep_kernels.find_idle, last_seen_before, now, due)
        activity = self.arrays.activity[: self.arrays.fill[SLOTS_USED]]
        self.seen_from = int(activity.min(initial=NEVER))

    def close_old(self, first_seen_before: int, now: int, due: list[DueTraces]) -> None:
        """Close the open traces that began before then, in the same way."""
        if self.begun_from >= first_seen_before:
            return
        self._close_found(sweep_kernels.find_old, first_seen_before, now, due)
        self.begun_from = self.survey().oldest_ns

    def _close_found(
        self,
        find: Callable[[TraceArrays, int, Rows], int],
        before: int,
        now: int,
        due: list[DueTraces],
    ) -> None:
        out = np.empty(SWEEP_BATCH, np.int64)
        found = len(out)
        while found == len(out):
            found = find(self.arrays, before, out)
            if found:
                due.append(self.close(out[:found].copy(), now))

    def close(self, slots: Rows, now: int) -> DueTraces:
        """Close open traces; they are kept until :meth:`evict`. If it fails, none is closed."""
        self._take_history(slots)
        due = self.copy(slots, closed=True, now=now)
        again = bool(self._closed) and self._closed[-1][0] == now
        together = np.concatenate([self._closed[-1][1], slots]) if again else slots
        kept = now, np.sort(together)  # the order in which restore() finds them
        sweep_kernels.close(self.arrays, slots, now)
        if again:
            self._closed[-1] = kept
        else:
            self._closed.append(kept)
        self.count()
        return due

    def copy(self, slots: Rows, *, closed: bool, now: int) -> DueTraces:
        """Copies of the given traces."""
        rows = np.empty((len(slots), SLOT_COLUMNS), np.int64)
        starts = np.empty(len(slots) + 1, np.int64)
        count = sweep_kernels.count_entries(self.arrays, slots)
        entries = np.empty((count, ENTRY_COLUMNS), np.int64)
        sweep_kernels.copy_out(self.arrays, slots, rows, entries, starts)
        long = np.flatnonzero(rows[:, SPANS] > self.windows.long_lived).tolist()
        contexts = {k: self._context(rows[k], int(slots[k])) for k in long}
        history = {}
        if known := self.signal_history:
            history = {k: known[slot] for k, slot in enumerate(slots.tolist()) if slot in known}
        return DueTraces(
            self.tenant,
            self.rules,
            closed,
            rows,
            self.arrays.names[slots],
            entries,
            starts,
            self.services,
            contexts=contexts,
            signal_history=history,
            received_ns=now,
            spans=int(rows[:, SPANS].sum()),
        )

    def _context(self, row: Rows, slot: int) -> Context:
        spans = int(row[SPANS])
        window, first = self.windows.at(spans)
        rings = (self.arrays.ring_small, self.arrays.ring_middle, self.arrays.ring_large)
        ring = rings[row[RING_CLASS]][row[RING] if row[RING_CLASS] else slot]
        first = max(first, spans - len(ring) + 1)
        numbers = np.arange(first - 1, spans) % len(ring)
        return Context(window, first, tuple(ring[numbers].tolist()))

    def without_history(self, slots: Rows) -> Rows:
        """Those of the slots whose traces have no earlier signals."""
        if not self.ledger_history and not self.signal_history:
            return slots
        known = [
            slot in self.signal_history or self.trace_id(slot) in self.ledger_history
            for slot in slots.tolist()
        ]
        found: Rows = slots[~np.array(known, bool)]
        return found

    def shift(self, by: int) -> None:
        """Move all times of receipt and closing ``by`` nanoseconds later."""
        self._survey = None
        self.seen_from += by if self.seen_from != NEVER else 0
        self.begun_from += by if self.begun_from != NEVER else 0
        used = int(self.arrays.fill[SLOTS_USED])
        activity = self.arrays.activity[:used]
        activity[activity != NEVER] += by
        for column in (FIRST_SEEN, LAST_SEEN, CLOSED_AT):
            self.arrays.slots[:used, column] += by
        self._closed = deque((when + by, slots) for when, slots in self._closed)

    def survey(self) -> TableSurvey:
        """The table's contents; computed again only after a change."""
        if self._survey is None:
            out = np.zeros(3, np.int64)
            sweep_kernels.survey(self.arrays, self.windows.long_lived, out)
            long_lived, spans, oldest = out.tolist()
            self._survey = TableSurvey(long_lived, spans, oldest, self.nbytes)
        return self._survey

    def evict(self, closed_before: int, fresh_from: int, most: int, closed: ClosedTraces) -> int:
        """Free the traces closed before ``closed_before``. If those are fewer than ``most``, free
        more of the oldest, up to ``most`` in total, but none closed at ``fresh_from`` or later.
        Freed traces are added to ``closed``. Returns how many were freed."""
        freed = 0
        while self._closed and (
            self._closed[0][0] < closed_before or (freed < most and self._closed[0][0] < fresh_from)
        ):
            when, slots = self._closed.popleft()
            rows = self.arrays.slots  # some may have been reopened, and have another place here
            slots = slots[(rows[slots, STATE] == CLOSED) & (rows[slots, CLOSED_AT] == when)]
            if when >= closed_before and most - freed < len(slots):
                self._closed.appendleft((when, slots[most - freed :]))
                slots = slots[: most - freed]
            with np.errstate(over="ignore"):
                generation = closed.generation(len(slots))
                salt = closed.salt(self.tenant)
                freed += sweep_kernels.free_closed(
                    self.arrays, slots, when, closed.filters, generation, salt
                )
            if self.signal_history:
                for slot in slots[self.arrays.slots[slots, STATE] == FREE].tolist():
                    self.signal_history.pop(slot, None)
        if freed:
            self.arrays = without_free_sets(self.arrays)
            self.count()
        return freed

    def leave(self) -> None:
        """Subtract this table from the totals: it is dropped with all its traces."""
        self.arrays.fill[[OPEN_COUNT, CLOSED_COUNT]] = 0
        self.arrays.sets[:, SET_SIZE] = 0
        self.count()

    def touch(self, seen: int, begun: int) -> None:
        """Note that a trace may be open with these times."""
        self.seen_from = min(self.seen_from, seen)
        self.begun_from = min(self.begun_from, begun)

    def count(self) -> None:
        """Update the running totals."""
        opened, closed, ids = self.open_count, self.closed_count, ids_in_use(self.arrays)
        self.totals.open += opened - self._counted[0]
        self.totals.closed += closed - self._counted[1]
        self.totals.ids += ids - self._counted[2]
        self._counted = opened, closed, ids
        self._survey = None

    def snapshot(self) -> TableSnapshot:
        """A copy of the table, for a checkpoint."""
        history = [(slot, history_to_json(each)) for slot, each in self.signal_history.items()]
        names = list(self.rules.check_names)
        return TableSnapshot(
            self.rules.version, self.rules.definitions, names, saved_arrays(self.arrays), history
        )

    def restore(self, saved: TableSnapshot) -> None:
        """Replace the contents by a snapshot of a table with the same rules."""
        self.arrays = restored_arrays(saved.arrays)
        self._find_closed()
        self.signal_history = {slot: history_from_json(rows) for slot, rows in saved.signal_history}
        self.count()
        self.touch(int(self.arrays.activity.min()), self.survey().oldest_ns)

    def _find_closed(self) -> None:
        self._closed.clear()
        closed = np.flatnonzero(self.arrays.slots[:, STATE] == CLOSED).astype(np.int64)
        when = self.arrays.slots[closed, CLOSED_AT]
        for time in np.unique(when).tolist():
            self._closed.append((time, closed[when == time]))

    def keep(self, wanted: Callable[[Rows], npt.NDArray[np.bool_]]) -> None:
        """Remove all traces but those that are wanted: ``wanted`` returns for rows (hi, lo) which
        of them are."""
        rows = self.arrays.slots[: self.arrays.fill[SLOTS_USED]]
        slots = np.flatnonzero(rows[:, STATE] != FREE).astype(np.int64)
        dropped = slots[~wanted(np.ascontiguousarray(rows[slots][:, [HI, LO]]))]
        is_open = rows[dropped, STATE] != CLOSED
        sweep_kernels.close(self.arrays, dropped[is_open], 0)
        rows[dropped, CLOSED_AT] = 0
        with np.errstate(over="ignore"):
            no_filter = np.zeros((1, 8), np.int64)
            sweep_kernels.free_closed(self.arrays, dropped, 0, no_filter, 0, 0)
        for slot in dropped.tolist():
            self.signal_history.pop(slot, None)
        self._find_closed()
        self.count()

    def find(self, hi: int, lo: int) -> int:
        """The slot of a trace (the halves of its id as int64), or -1."""
        with np.errstate(over="ignore"):
            return int(pools.find_slot(self.arrays, hi, lo))

    def recall(self, ids: Rows, histories: Sequence[SignalHistory]) -> None:
        """Mark traces (rows of hi, lo) that were folded again from the log as reopened, and add the
        signals they had."""
        for (hi, lo), history in zip(ids.tolist(), histories, strict=True):
            slot = self.find(hi, lo)
            if slot >= 0:
                self.arrays.slots[slot, FLAGS] |= REOPENED
                self._add_history(slot, history)

    def mark_partial(self, ids: Rows) -> None:
        """Mark traces (rows of hi, lo) of which some spans were not counted."""
        for slot in self._slots(ids):
            self.arrays.slots[slot, FLAGS] |= REOPENED | PARTIAL

    def _slots(self, ids: Rows) -> list[int]:
        found = (self.find(hi, lo) for hi, lo in ids.tolist())
        return [slot for slot in found if slot >= 0]

    def reopen(self, slot: int, now: int) -> None:
        """Open a closed trace again. If this fails, it stays closed."""
        slots = np.array([slot], np.int64)
        at_close = self.copy(slots, closed=True, now=now)
        before = at_close.signal_history.get(0, {})
        # What a relational rule signalled is known to the evaluation, not to the fold.
        (found,), (unknown,) = broken(at_close)
        history = merged(before, next_signals(before, found, self.rules.folded - unknown))
        sweep_kernels.reopen(self.arrays, slot, now, REOPENED)
        if history:
            self.signal_history[slot] = history
        self.touch(now, int(self.arrays.slots[slot, FIRST_SEEN]))
        self._take_history(slots)

    def _take_history(self, slots: Rows) -> None:
        """Move the signals of these open traces from the ledger history into the table."""
        if self.ledger_history:
            for slot in slots.tolist():
                trace_id = self.trace_id(slot)
                history = self.ledger_history.get(trace_id)
                if history is not None:
                    self._add_history(slot, history)
                    del self.ledger_history[trace_id]

    def drop(self, ids: Rows) -> None:
        """Remove traces (rows of hi, lo), as if none of their spans had been folded."""
        for slot in self._slots(ids):
            if history := self.signal_history.pop(slot, None):
                trace_id = self.trace_id(slot)
                before = self.ledger_history.get(trace_id, {})
                self.ledger_history[trace_id] = merged(before, history)
            slots = np.array([slot], np.int64)
            with np.errstate(over="ignore"):
                sweep_kernels.close(self.arrays, slots, 0)
                no_filter = np.zeros((1, 8), np.int64)
                sweep_kernels.free_closed(self.arrays, slots, 0, no_filter, 0, 0)
        self.count()

    def _add_history(self, slot: int, history: SignalHistory) -> None:
        if history:
            self.signal_history[slot] = merged(self.signal_history.get(slot, {}), history)

    def trace_id(self, slot: int) -> str:
        """The id of the trace in a slot, 32 hex digits."""
        hi, lo = self.arrays.slots[slot, [HI, LO]].tolist()
        return f"{hi & _MASK:016x}{lo & _MASK:016x}"

    def spare_entries(self) -> int:
        """Entries that are available without growing the pool."""
        return len(self.arrays.entries) - int(self.arrays.fill[ENTRIES_USED])

    def grow_set(self, slot: int) -> None:
        """Give a long trace a larger set of its span ids, or none if the sets take too much
        memory."""
        ring, spans = self.arrays.slots[slot, [RING, SPANS]].tolist()
        sizes = self.arrays.sets[:, SET_SIZE]
        size = set_size(spans + 1)
        more = size - max(0, int(sizes[ring]))
        own, all_tables = ids_in_use(self.arrays) + more, self.totals.ids + more
        with np.errstate(over="ignore"):
            if size <= MOST_SET and own <= MOST_IDS and all_tables <= MOST_IDS_AT_ALL:
                self.arrays = with_set(self.arrays, ring, spans, size)
            else:
                pools.release_set(self.arrays, ring)
                sizes[ring] = -1
                pools.link_all(self.arrays, ring, spans)
        self.count()

    def grow(self, reason: int) -> None:
        """Double the pool that a kernel found full (``reason``)."""
        self.arrays = grown(self.arrays, reason, len(self.rules.checks))
