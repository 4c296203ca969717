"""The open traces of one tenant under one version of its rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from betrace.service.otlp.columns import Bytes, Rows, SpanBatch
from betrace.service.rules.compile import CompiledRules
from betrace.service.traces import pools
from betrace.service.traces import sweep_kernels as upkeep
from betrace.service.traces.arrays import (
    LEAST_SLOTS,
    empty_arrays,
    grown,
    restored_arrays,
    saved_arrays,
)
from betrace.service.traces.checkpoint import TableSnapshot
from betrace.service.traces.decide import broken
from betrace.service.traces.due import Context, DueTraces
from betrace.service.traces.eviction import SWEEP_BATCH, Held
from betrace.service.traces.folding import Folded, FoldRun
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
    SLOT_COLUMNS,
    SLOTS_USED,
    SPANS,
    STATE,
    RuleArrays,
    TraceArrays,
)
from betrace.service.traces.partial_folds import Ask
from betrace.service.traces.signal_history import Told, listed, merged, next_steps, unlisted
from betrace.service.traces.window import Windows

_MASK = 2**64 - 1


class Survey(NamedTuple):
    """What a table holds: open traces that are long, span ids held for open traces, when the oldest
    began (nanoseconds; ``NEVER`` without one), and bytes."""

    long_lived: int
    spans: int
    oldest_ns: int
    nbytes: int


@dataclass(slots=True, eq=False)
class TraceTable:
    """Open and recently closed traces. Not thread-safe: one thread at a time.

    A clock looks at each table often; three bounds say when there is nothing for it to do.
    """

    tenant: str
    rules: CompiledRules
    services: list[str]
    windows: Windows = field(default_factory=Windows)
    before: dict[str, Told] = field(default_factory=dict)  # by trace id, from before a restart
    held: Held = field(default_factory=Held)
    arrays: TraceArrays = field(init=False)
    told: dict[int, Told] = field(default_factory=dict)  # by slot, before it was closed last
    # No open trace had its last span, or began, before (nanoseconds; NEVER: none is open).
    seen_from: int = NEVER
    begun_from: int = NEVER
    _counted: tuple[int, int] = (0, 0)  # open and closed traces, as ``held`` counts them
    _survey: Survey | None = None  # None when something changed since
    _closed: deque[tuple[int, Rows]] = field(default_factory=deque)  # (when, slots), in order
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
        )
        self.ask = np.zeros((64, 3), np.int64)

    @property
    def open_count(self) -> int:
        """Open traces."""
        return int(self.arrays.fill[OPEN_COUNT])

    @property
    def closed_count(self) -> int:
        """Closed traces that are kept for late spans."""
        return int(self.arrays.fill[CLOSED_COUNT])

    @property
    def closed_from(self) -> int:
        """No closed trace was closed before (nanoseconds; ``NEVER``: none is kept)."""
        return self._closed[0][0] if self._closed else NEVER

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(array.nbytes for array in self.arrays)

    def fold(
        self,
        batch: SpanBatch,
        services: Rows,
        now: int,
        skip: Bytes,
        asks: list[Ask],
        *,
        known_only: bool = False,
        closed: ClosedTraces | None = None,
    ) -> Folded:
        """Add the spans of a batch to their traces; errors are in what is returned.

        ``services`` numbers the service of each resource row, ``now`` is the time of receipt in
        nanoseconds; for the others see :class:`~betrace.service.traces.folding.FoldRun`.
        """
        run = FoldRun(self, batch, services, now, skip, asks, known_only=known_only, closed=closed)
        return run.run()

    def early(self, dirty: Rows, now: int) -> DueTraces:
        """Copies of traces for which a rule may have become certain."""
        upkeep.clear_dirty(self.arrays, dirty)
        self._learn(dirty)
        return self.copy(dirty, closed=False, now=now)

    def close_idle(self, last_seen_before: int, now: int, due: list[DueTraces]) -> None:
        """Close the open traces without a span since then, and add them to ``due``, up to
        ``SWEEP_BATCH`` in each piece."""
        if self.seen_from >= last_seen_before:
            return
        self._close_found(upkeep.find_idle, last_seen_before, now, due)
        activity = self.arrays.activity[: self.arrays.fill[SLOTS_USED]]
        self.seen_from = int(activity.min(initial=NEVER))

    def close_old(self, first_seen_before: int, now: int, due: list[DueTraces]) -> None:
        """The same with those that began before then."""
        if self.begun_from >= first_seen_before:
            return
        self._close_found(upkeep.find_old, first_seen_before, now, due)
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
        """Close open traces; they are kept until :meth:`evict`. Where it fails, none is closed."""
        self._learn(slots)
        due = self.copy(slots, closed=True, now=now)
        again = bool(self._closed) and self._closed[-1][0] == now
        together = np.concatenate([self._closed[-1][1], slots]) if again else slots
        kept = now, np.sort(together)  # as a restart finds them
        upkeep.close(self.arrays, slots, now)
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
        entries = np.empty((upkeep.count_entries(self.arrays, slots), ENTRY_COLUMNS), np.int64)
        upkeep.copy_out(self.arrays, slots, rows, entries, starts)
        long = np.flatnonzero(rows[:, SPANS] > self.windows.long_lived).tolist()
        contexts = {k: self._context(rows[k], int(slots[k])) for k in long}
        told = {}
        if self.told:
            told = {k: self.told[s] for k, s in enumerate(slots.tolist()) if s in self.told}
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
            told=told,
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

    def never_told(self, slots: Rows) -> Rows:
        """Those of the slots of whose traces nothing was said before."""
        if not self.before and not self.told:
            return slots
        told = [s in self.told or self.trace_id(s) in self.before for s in slots.tolist()]
        never: Rows = slots[~np.array(told, bool)]
        return never

    def shift(self, by: int) -> None:
        """Count all times of receipt and closing as ``by`` nanoseconds later."""
        self._survey = None
        self.seen_from += by if self.seen_from != NEVER else 0
        self.begun_from += by if self.begun_from != NEVER else 0
        used = int(self.arrays.fill[SLOTS_USED])
        activity = self.arrays.activity[:used]
        activity[activity != NEVER] += by
        for column in (FIRST_SEEN, LAST_SEEN, CLOSED_AT):
            self.arrays.slots[:used, column] += by
        self._closed = deque((when + by, slots) for when, slots in self._closed)

    def survey(self) -> Survey:
        """What it holds; made again only when something changed."""
        if self._survey is None:
            out = np.zeros(3, np.int64)
            upkeep.survey(self.arrays, self.windows.long_lived, out)
            long_lived, spans, oldest = out.tolist()
            self._survey = Survey(long_lived, spans, oldest, self.nbytes)
        return self._survey

    def evict(self, closed_before: int, fresh_from: int, most: int, closed: ClosedTraces) -> int:
        """Free traces closed before a time, and of the oldest closed before ``fresh_from`` so many
        that ``most`` are freed; they are put into ``closed``. How many."""
        freed = 0
        while self._closed and (
            self._closed[0][0] < closed_before or (freed < most and self._closed[0][0] < fresh_from)
        ):
            when, slots = self._closed.popleft()
            if when >= closed_before and most - freed < len(slots):
                self._closed.appendleft((when, slots[most - freed :]))
                slots = slots[: most - freed]
            with np.errstate(over="ignore"):
                generation = closed.generation(len(slots))
                salt = closed.salt(self.tenant)
                freed += upkeep.free_closed(
                    self.arrays, slots, when, closed.filters, generation, salt
                )
            if self.told:
                for slot in slots[self.arrays.slots[slots, STATE] == FREE].tolist():
                    self.told.pop(slot, None)
        if freed:
            self.count()
        return freed

    def leave(self) -> None:
        """Be counted no longer: the table is dropped with all that it holds."""
        self.arrays.fill[[OPEN_COUNT, CLOSED_COUNT]] = 0
        self.count()

    def touch(self, seen: int, begun: int) -> None:
        """Note that a trace may be open from now on with these times."""
        self.seen_from = min(self.seen_from, seen)
        self.begun_from = min(self.begun_from, begun)

    def count(self) -> None:
        """Bring the running totals up to date."""
        opened, closed = self.open_count, self.closed_count
        self.held.open += opened - self._counted[0]
        self.held.closed += closed - self._counted[1]
        self._counted = opened, closed
        self._survey = None

    def snapshot(self) -> TableSnapshot:
        """Copies of everything, for a checkpoint."""
        told = [(slot, listed(each)) for slot, each in self.told.items()]
        names = list(self.rules.check_names)
        return TableSnapshot(
            self.rules.version, self.rules.definitions, names, saved_arrays(self.arrays), told
        )

    def restore(self, saved: TableSnapshot) -> None:
        """Become what a snapshot of a table with the same rules holds."""
        self.arrays = restored_arrays(saved.arrays)
        closed = np.flatnonzero(self.arrays.slots[:, STATE] == CLOSED).astype(np.int64)
        when = self.arrays.slots[closed, CLOSED_AT]
        for time in np.unique(when).tolist():
            self._closed.append((time, closed[when == time]))
        self.told = {slot: unlisted(rows) for slot, rows in saved.told}
        self.count()
        self.touch(int(self.arrays.activity.min()), self.survey().oldest_ns)

    def find(self, hi: int, lo: int) -> int:
        """The slot of a trace (the halves of its id as int64), -1 without one."""
        with np.errstate(over="ignore"):
            return int(pools.find_slot(self.arrays, hi, lo))

    def recall(self, ids: Rows, told: Sequence[Told]) -> None:
        """Note of traces (rows of hi, lo) that were folded again from the log that they had been
        closed, and what was told of them then."""
        for (hi, lo), each in zip(ids.tolist(), told, strict=True):
            slot = self.find(hi, lo)
            if slot >= 0:
                self.arrays.slots[slot, FLAGS] |= REOPENED
                self._tell(slot, each)

    def mark_partial(self, ids: Rows) -> None:
        """Note of traces that some of their spans were not counted."""
        for slot in self._slots(ids):
            self.arrays.slots[slot, FLAGS] |= REOPENED | PARTIAL

    def _slots(self, ids: Rows) -> list[int]:
        found = (self.find(hi, lo) for hi, lo in ids.tolist())
        return [slot for slot in found if slot >= 0]

    def reopen(self, slot: int, now: int) -> None:
        """Open a closed trace again. Where this fails, it stays closed."""
        slots = np.array([slot], np.int64)
        at_close = self.copy(slots, closed=True, now=now)
        before = at_close.told.get(0, {})
        told = merged(before, next_steps(before, broken(at_close)[0], self.rules.identities))
        upkeep.reopen(self.arrays, slot, now, REOPENED)
        if told:
            self.told[slot] = told
        self.touch(now, int(self.arrays.slots[slot, FIRST_SEEN]))
        self._learn(slots)

    def _learn(self, slots: Rows) -> None:
        """Take over what is known of open traces from before a restart."""
        if self.before:
            for slot in slots.tolist():
                trace_id = self.trace_id(slot)
                told = self.before.get(trace_id)
                if told is not None:
                    self._tell(slot, told)
                    del self.before[trace_id]

    def drop(self, ids: Rows) -> None:
        """Take traces (rows of hi, lo) out again, as if none of their spans had been folded."""
        for slot in self._slots(ids):
            if told := self.told.pop(slot, None):
                trace_id = self.trace_id(slot)
                self.before[trace_id] = merged(self.before.get(trace_id, {}), told)
            slots = np.array([slot], np.int64)
            with np.errstate(over="ignore"):
                upkeep.close(self.arrays, slots, 0)
                upkeep.free_closed(self.arrays, slots, 0, np.zeros((1, 8), np.int64), 0, 0)
        self.count()

    def _tell(self, slot: int, told: Told) -> None:
        if told:
            self.told[slot] = merged(self.told.get(slot, {}), told)

    def trace_id(self, slot: int) -> str:
        """The trace id in a slot, 32 hex digits."""
        hi, lo = self.arrays.slots[slot, [HI, LO]].tolist()
        return f"{hi & _MASK:016x}{lo & _MASK:016x}"

    def spare_entries(self) -> int:
        """Entries that can be taken without growing."""
        return len(self.arrays.entries) - int(self.arrays.fill[ENTRIES_USED])

    def grow(self, reason: int) -> None:
        """Double the pool that a kernel found full."""
        self.arrays = grown(self.arrays, reason, len(self.rules.checks))
