"""The open traces of one tenant under one version of its rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.otlp.columns import Rows, SpanBatch
from service.rules.compile import CompiledRules
from service.rules.decide import broken
from service.rules.match import evaluate
from service.traces import fold as kernels
from service.traces import pools, upkeep
from service.traces.checkpoint import TableSnapshot
from service.traces.closed import ClosedTraces
from service.traces.due import Context, DueTraces
from service.traces.layout import (
    ASKED,
    CLOSED,
    CLOSED_AT,
    CLOSED_COUNT,
    COMPLETIONS,
    COUNTS_SIZE,
    DIRTIED,
    DONE,
    ENTRIES_USED,
    ENTRY_COLUMNS,
    FIRST_SEEN,
    FLAGS,
    FREE,
    HI,
    LAST_SEEN,
    LATE,
    LATENESS,
    LO,
    MATCHED,
    NAMES_FULL,
    NEED_ASK,
    NEED_ENTRIES,
    NEED_SPILL,
    NEVER,
    OPEN_COUNT,
    OPENED,
    PARTIAL,
    POSITIONS,
    REOPENED,
    REPEATS,
    RING,
    RING_CLASS,
    SLOT_COLUMNS,
    SLOTS_USED,
    SPANS,
    SPILLS,
    STATE,
    STOPPED_SLOT,
    BatchArrays,
    FoldOutputs,
    RuleArrays,
    TraceArrays,
)
from service.traces.limits import SWEEP_BATCH, Held
from service.traces.raised import Told, listed, merged, next_steps, unlisted
from service.traces.room import (
    LEAST_SLOTS,
    doubled,
    empty_arrays,
    grown,
    restored_arrays,
    saved_arrays,
)
from service.traces.window import Windows

_NO_FILTER = np.zeros((2, 0), np.int64)
_MASK = 2**64 - 1


@dataclass(slots=True, eq=False)
class Folded:
    """What came of folding a batch.

    ``early`` are traces for which a rule may have become certain, ``completed`` slots that said
    so themselves, ``spilled`` rows (hi, lo, log positions) of long traces, ``late`` the rows of the
    batch that were left because their trace may have been closed and forgotten.
    """

    early: DueTraces | None
    completed: Rows
    spilled: Rows
    late: Rows
    opened: int
    repeated: int
    matched: int
    reopened: int


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
    _rule_arrays: RuleArrays = field(init=False)
    _ask: Rows = field(init=False)

    def __post_init__(self) -> None:
        self.arrays = empty_arrays(LEAST_SLOTS)
        thresholds, threshold_starts = self.rules.thresholds
        self._rule_arrays = RuleArrays(
            self.rules.predicates,
            self.rules.code,
            self.rules.leaves,
            self.rules.text,
            thresholds,
            threshold_starts,
        )
        self._ask = np.zeros((64, 3), np.int64)

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
        skip: npt.NDArray[np.uint8] | None = None,
        *,
        known_only: bool = False,
        closed: ClosedTraces | None = None,
    ) -> Folded:
        """Add the spans of a batch to their traces.

        ``services`` numbers the service of each resource row, ``now`` is the time of receipt in
        nanoseconds. Rows with ``skip`` set are passed over; with ``known_only`` only spans of
        traces that are here are taken, and marked in ``skip``. With ``closed``, new traces that
        it may hold are not opened but reported as late.
        """
        n = len(batch)
        positions = batch.positions
        arrays = BatchArrays(
            batch.buf,
            batch.spans,
            batch.resources,
            batch.scopes,
            services,
            positions if len(positions) else np.zeros(len(batch.bodies), np.int64),
            np.zeros(n, np.uint8) if skip is None else skip,
        )
        outputs = FoldOutputs(
            self._ask,
            np.empty(n, np.int64),
            np.empty(n, np.int64),
            np.empty((16, 2 + POSITIONS), np.int64),
            np.empty(n if closed is not None else 0, np.int64),
            np.zeros(COUNTS_SIZE, np.int64),
        )
        counts = outputs.counts
        filters = _NO_FILTER if closed is None else closed.filters
        salt = 0 if closed is None else closed.salt(self.tenant)
        scratch = np.zeros(4, np.int64)
        self._touch(now, now)  # first: a fold that fails may have opened traces
        ahead = np.empty((2, kernels.AHEAD), np.int64)
        names = self.rules.names
        reopened, row = 0, 0
        with np.errstate(over="ignore"):
            while True:
                row, reason = kernels.fold(
                    arrays,
                    row,
                    known_only,
                    filters,
                    salt,
                    now,
                    names.arrays,
                    self._rule_arrays,
                    self.arrays,
                    outputs,
                    scratch,
                    ahead,
                )
                if reason == DONE:
                    break
                if reason == LATE:
                    self._reopen(int(counts[STOPPED_SLOT]), now)
                    reopened += 1
                elif reason == NAMES_FULL:
                    names.forget()
                elif reason == NEED_ASK:
                    outputs = outputs._replace(ask=doubled(outputs.ask, len(self.rules.checks)))
                    self._ask = outputs.ask
                elif reason == NEED_SPILL:
                    outputs = outputs._replace(spilled=doubled(outputs.spilled))
                else:
                    self._grow(reason)
            if counts[ASKED]:
                self._answer(batch, arrays, outputs)
        dirty = outputs.dirty[: counts[DIRTIED]]
        early = None
        if len(dirty):
            upkeep.clear_dirty(self.arrays, dirty)
            self._learn(dirty)
            early = self.copy(dirty, closed=False, now=now)
        self._count()
        return Folded(
            early,
            outputs.completed[: counts[COMPLETIONS]],
            outputs.spilled[: counts[SPILLS]],
            outputs.late[: counts[LATENESS]],
            opened=int(counts[OPENED]),
            repeated=int(counts[REPEATS]),
            matched=int(counts[MATCHED]),
            reopened=reopened,
        )

    def close_idle(self, last_seen_before: int, now: int) -> list[DueTraces]:
        """Close the open traces without a span since then, up to ``SWEEP_BATCH`` in each piece."""
        if self.seen_from >= last_seen_before:
            return []
        due = self._close_found(upkeep.find_idle, last_seen_before, now)
        activity = self.arrays.activity[: self.arrays.fill[SLOTS_USED]]
        self.seen_from = int(activity.min(initial=NEVER))
        return due

    def close_old(self, first_seen_before: int, now: int) -> list[DueTraces]:
        """The same with those that began before then."""
        if self.begun_from >= first_seen_before:
            return []
        due = self._close_found(upkeep.find_old, first_seen_before, now)
        self.begun_from = self.survey().oldest_ns
        return due

    def _close_found(
        self, find: Callable[[TraceArrays, int, Rows], int], before: int, now: int
    ) -> list[DueTraces]:
        due = []
        out = np.empty(SWEEP_BATCH, np.int64)
        found = len(out)
        while found == len(out):
            found = find(self.arrays, before, out)
            if found:
                due.append(self.close(out[:found].copy(), now))
        return due

    def close(self, slots: Rows, now: int) -> DueTraces:
        """Close open traces; they are kept until :meth:`evict`."""
        self._learn(slots)
        due = self.copy(slots, closed=True, now=now)
        upkeep.close(self.arrays, slots, now)
        if self._closed and self._closed[-1][0] == now:
            slots = np.concatenate([self._closed.pop()[1], slots])
        self._closed.append((now, np.sort(slots)))  # as a restart finds them
        self._count()
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
            self._count()
        return freed

    def leave(self) -> None:
        """Be counted no longer: the table is dropped with all that it holds."""
        self.arrays.fill[[OPEN_COUNT, CLOSED_COUNT]] = 0
        self._count()

    def _touch(self, seen: int, begun: int) -> None:
        """Note that a trace may be open from now on with these times."""
        self.seen_from = min(self.seen_from, seen)
        self.begun_from = min(self.begun_from, begun)

    def _count(self) -> None:
        """Bring the running totals up to date."""
        opened, closed = self.open_count, self.closed_count
        self.held.open += opened - self._counted[0]
        self.held.closed += closed - self._counted[1]
        self._counted = opened, closed
        self._survey = None

    def snapshot(self) -> TableSnapshot:
        """Copies of everything, for a checkpoint."""
        definitions = [rule.definition() for rule in self.rules.rules]
        told = [(slot, listed(each)) for slot, each in self.told.items()]
        names = list(self.rules.check_names)
        return TableSnapshot(
            self.rules.version, definitions, names, saved_arrays(self.arrays), told
        )

    def restore(self, saved: TableSnapshot) -> None:
        """Become what a snapshot of a table with the same rules holds."""
        self.arrays = restored_arrays(saved.arrays)
        closed = np.flatnonzero(self.arrays.slots[:, STATE] == CLOSED).astype(np.int64)
        when = self.arrays.slots[closed, CLOSED_AT]
        for time in np.unique(when).tolist():
            self._closed.append((time, closed[when == time]))
        self.told = {slot: unlisted(rows) for slot, rows in saved.told}
        self._count()
        self._touch(int(self.arrays.activity.min()), self.survey().oldest_ns)

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

    def _reopen(self, slot: int, now: int) -> None:
        slots = np.array([slot], np.int64)
        at_close = self.copy(slots, closed=True, now=now)
        told = at_close.told.get(0, {})
        self._tell(slot, next_steps(told, broken(at_close)[0], self.rules.identities))
        upkeep.reopen(self.arrays, slot, now, REOPENED)
        self._touch(now, int(self.arrays.slots[slot, FIRST_SEEN]))
        self._learn(slots)

    def _learn(self, slots: Rows) -> None:
        """Take over what is known of open traces from before a restart."""
        if self.before:
            for slot in slots.tolist():
                told = self.before.pop(self.trace_id(slot), None)
                if told is not None:
                    self._tell(slot, told)

    def _tell(self, slot: int, told: Told) -> None:
        if told:
            self.told[slot] = merged(self.told.get(slot, {}), told)

    def trace_id(self, slot: int) -> str:
        """The trace id in a slot, 32 hex digits."""
        hi, lo = self.arrays.slots[slot, [HI, LO]].tolist()
        return f"{hi & _MASK:016x}{lo & _MASK:016x}"

    def _answer(self, batch: SpanBatch, arrays: BatchArrays, outputs: FoldOutputs) -> None:
        """Evaluate in Python what the kernel asked for, and count what matched."""
        matched = []
        checks = self.rules.checks
        for row, check, slot in outputs.ask[: outputs.counts[ASKED]].tolist():
            if check >= 0:
                wanted: Sequence[int] = (check,)
            else:
                wanted = self.rules.names.glob_checks(batch.name(row).encode())
            for c in wanted:
                predicate = checks[c].where
                if predicate is None or evaluate(predicate, batch, row):
                    matched.append((row, c, slot))
        while self._spare_entries() < len(matched):
            self._grow(NEED_ENTRIES)
        if matched:
            rows = np.array(matched, np.int64)
            kernels.add_asked(arrays, rows, self._rule_arrays, self.arrays, outputs)

    def _spare_entries(self) -> int:
        return len(self.arrays.entries) - int(self.arrays.fill[ENTRIES_USED])

    def _grow(self, reason: int) -> None:
        """Double the pool that a kernel found full."""
        self.arrays = grown(self.arrays, reason, len(self.rules.checks))
