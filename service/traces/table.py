"""The open traces of one tenant under one version of its rules."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    CHAIN_COLUMNS,
    CLOSED,
    CLOSED_AT,
    CLOSED_COUNT,
    COMPLETIONS,
    COUNTS_SIZE,
    DIRTIED,
    DONE,
    ENTRIES_FREE,
    ENTRIES_USED,
    ENTRY_COLUMNS,
    FILL_SIZE,
    FIRST_SEEN,
    FLAGS,
    FREE,
    HI,
    LARGE_FREE,
    LARGE_RING,
    LARGE_USED,
    LAST_SEEN,
    LATE,
    LATENESS,
    LO,
    MATCHED,
    MIDDLE_FREE,
    MIDDLE_RING,
    MIDDLE_USED,
    NAME_BYTES,
    NAMES_FULL,
    NEED_ASK,
    NEED_ENTRIES,
    NEED_LARGE,
    NEED_MIDDLE,
    NEED_SLOTS,
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
    SLOTS_FREE,
    SLOTS_USED,
    SMALL_RING,
    SPANS,
    SPILLS,
    STATE,
    STOPPED_SLOT,
    BatchArrays,
    FoldOutputs,
    RuleArrays,
    TraceArrays,
)
from service.traces.raised import Told, listed, merged, next_steps, unlisted
from service.traces.window import Windows

_NO_FILTER = np.zeros((2, 0), np.int64)
_MASK = 2**64 - 1
SWEEP_BATCH = 4096  # traces that one DueTraces holds at most


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


@dataclass(slots=True, eq=False)
class TraceTable:
    """Open and recently closed traces. Not thread-safe: one thread at a time."""

    tenant: str
    rules: CompiledRules
    services: list[str]
    windows: Windows = field(default_factory=Windows)
    before: dict[str, Told] = field(default_factory=dict)  # by trace id, from before a restart
    arrays: TraceArrays = field(init=False)
    told: dict[int, Told] = field(default_factory=dict)  # slot -> said before it was closed last
    _closed: deque[tuple[int, Rows]] = field(default_factory=deque)  # (when, slots), in order
    _rule_arrays: RuleArrays = field(init=False)
    _ask: Rows = field(init=False)

    def __post_init__(self) -> None:
        self.arrays = _empty_arrays(64)
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
                    outputs = outputs._replace(ask=_doubled(outputs.ask, len(self.rules.checks)))
                    self._ask = outputs.ask
                elif reason == NEED_SPILL:
                    outputs = outputs._replace(spilled=_doubled(outputs.spilled))
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

    def idle(self, last_seen_before: int) -> Rows:
        """Up to ``SWEEP_BATCH`` open slots without a span since then."""
        out = np.empty(SWEEP_BATCH, np.int64)
        return out[: upkeep.find_idle(self.arrays, last_seen_before, out)]

    def old(self, first_seen_before: int) -> Rows:
        """Up to ``SWEEP_BATCH`` open slots that began before then."""
        out = np.empty(SWEEP_BATCH, np.int64)
        return out[: upkeep.find_old(self.arrays, first_seen_before, out)]

    def close(self, slots: Rows, now: int) -> DueTraces:
        """Close open traces; they are kept until :meth:`evict`."""
        self._learn(slots)
        due = self.copy(slots, closed=True, now=now)
        upkeep.close(self.arrays, slots, now)
        self._closed.append((now, slots))
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
        used = int(self.arrays.fill[SLOTS_USED])
        activity = self.arrays.activity[:used]
        activity[activity != NEVER] += by
        for column in (FIRST_SEEN, LAST_SEEN, CLOSED_AT):
            self.arrays.slots[:used, column] += by
        self._closed = deque((when + by, slots) for when, slots in self._closed)

    def survey(self) -> tuple[int, int, int]:
        """Open traces that are long, span ids held for open traces, and when the oldest began
        (nanoseconds; ``NEVER`` without one)."""
        out = np.zeros(3, np.int64)
        upkeep.survey(self.arrays, self.windows.long_lived, out)
        return int(out[0]), int(out[1]), int(out[2])

    def evict(self, closed_before: int, fresh_from: int, keep: int, closed: ClosedTraces) -> int:
        """Free traces closed before a time, and the oldest beyond ``keep`` of them that were closed
        before ``fresh_from``; they are put into ``closed``. How many."""
        freed = 0
        while self._closed and (
            self._closed[0][0] < closed_before
            or (self.closed_count > keep and self._closed[0][0] < fresh_from)
        ):
            when, slots = self._closed.popleft()
            over = self.closed_count - keep
            if when >= closed_before and 0 < over < len(slots):
                self._closed.appendleft((when, slots[over:]))
                slots = slots[:over]
            with np.errstate(over="ignore"):
                generation = closed.generation(len(slots))
                salt = closed.salt(self.tenant)
                freed += upkeep.free_closed(
                    self.arrays, slots, when, closed.filters, generation, salt
                )
            if self.told:
                for slot in slots[self.arrays.slots[slots, STATE] == FREE].tolist():
                    self.told.pop(slot, None)
        return freed

    def snapshot(self) -> TableSnapshot:
        """Copies of everything, for a checkpoint."""
        a, fill = self.arrays, self.arrays.fill
        used = int(fill[SLOTS_USED])
        arrays: dict[str, npt.NDArray[Any]] = {
            "fill": fill.copy(),
            "slots": a.slots[:used].copy(),
            "activity": a.activity[:used].copy(),
            "names": a.names[:used].copy(),
            "ring_small": a.ring_small[:used].copy(),
            "ring_middle": a.ring_middle[: fill[MIDDLE_USED]].copy(),
            "ring_large": a.ring_large[: fill[LARGE_USED]].copy(),
            "entries": a.entries[: fill[ENTRIES_USED]].copy(),
        }
        definitions = [rule.definition() for rule in self.rules.rules]
        told = [(slot, listed(each)) for slot, each in self.told.items()]
        names = list(self.rules.check_names)
        return TableSnapshot(self.rules.version, definitions, names, arrays, told)

    def restore(self, saved: TableSnapshot) -> None:
        """Become what a snapshot of a table with the same rules holds."""
        arrays = saved.arrays
        slots = 64
        while slots < len(arrays["slots"]):
            slots *= 2
        room = _empty_arrays(slots)
        for name in ("slots", "activity", "names", "ring_small"):
            getattr(room, name)[: len(arrays[name])] = arrays[name]
        room.fill[:] = arrays["fill"]
        self.arrays = room._replace(
            ring_middle=_with_room(arrays["ring_middle"], 8),
            ring_large=_with_room(arrays["ring_large"], 1),
            chains=np.zeros((len(arrays["ring_large"]) + 1, CHAIN_COLUMNS), np.int16),
            entries=_with_room(arrays["entries"], slots),
        )
        with np.errstate(over="ignore"):
            pools.rebuild(
                self.arrays.table, self.arrays.secret, self.arrays.slots, len(arrays["slots"])
            )
            pools.relink(self.arrays)
        closed = np.flatnonzero(self.arrays.slots[:, STATE] == CLOSED).astype(np.int64)
        when = self.arrays.slots[closed, CLOSED_AT]
        for time in np.unique(when).tolist():
            self._closed.append((time, closed[when == time]))
        self.told = {slot: unlisted(rows) for slot, rows in saved.told}

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
        old = self.arrays
        if reason == NEED_ENTRIES:
            self.arrays = old._replace(entries=_doubled(old.entries, len(self.rules.checks)))
        elif reason == NEED_MIDDLE:
            self.arrays = old._replace(ring_middle=_doubled(old.ring_middle))
        elif reason == NEED_LARGE:
            self.arrays = old._replace(
                ring_large=_doubled(old.ring_large), chains=_doubled(old.chains)
            )
        else:
            assert reason == NEED_SLOTS
            activity = _doubled(old.activity)
            activity[len(old.activity) :] = NEVER
            slots = _doubled(old.slots)
            table = np.zeros(2 * len(old.table), np.int64)
            pools.rebuild(table, old.secret, slots, int(old.fill[SLOTS_USED]))
            self.arrays = old._replace(
                table=table,
                slots=slots,
                activity=activity,
                names=_doubled(old.names),
                ring_small=_doubled(old.ring_small),
            )


def idle_longest(tables: Sequence[TraceTable], count: int) -> list[tuple[TraceTable, Rows]]:
    """The ``count`` open slots of all tables that have been idle longest, or all there are; up to
    ``SWEEP_BATCH`` in each piece."""
    used = [table.arrays.activity[: table.arrays.fill[SLOTS_USED]] for table in tables]
    count = min(count, sum(table.open_count for table in tables))
    if not count:
        return []
    chosen = np.sort(np.argpartition(np.concatenate(used), count - 1)[:count])
    found = []
    for table, slots in zip(tables, used, strict=True):
        own = chosen[(chosen >= 0) & (chosen < len(slots))]
        chosen = chosen - len(slots)
        found += [(table, own[at : at + SWEEP_BATCH]) for at in range(0, len(own), SWEEP_BATCH)]
    return found


def _doubled(array: npt.NDArray, more: int = 0) -> npt.NDArray:  # type: ignore[type-arg]
    """A copy twice as long, and ``more``; the new rows are zero."""
    grown = np.zeros((2 * len(array) + more, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


def _with_room(array: npt.NDArray[np.int64], least: int) -> Rows:
    """A copy with at least ``least`` rows more."""
    grown = np.zeros((len(array) + least, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


def _empty_arrays(slots: int) -> TraceArrays:
    fill = np.zeros(FILL_SIZE, np.int64)
    fill[[SLOTS_FREE, ENTRIES_FREE, MIDDLE_FREE, LARGE_FREE]] = -1
    return TraceArrays(
        table=np.zeros(2 * slots, np.int64),
        secret=np.frombuffer(secrets.token_bytes(24), np.int64) | 1,
        slots=np.zeros((slots, SLOT_COLUMNS), np.int64),
        activity=np.full(slots, NEVER, np.int64),
        names=np.zeros((slots, NAME_BYTES), np.uint8),
        ring_small=np.zeros((slots, SMALL_RING), np.int64),
        ring_middle=np.zeros((8, MIDDLE_RING), np.int64),
        ring_large=np.zeros((1, LARGE_RING), np.int64),
        chains=np.zeros((1, CHAIN_COLUMNS), np.int16),
        entries=np.zeros((slots, ENTRY_COLUMNS), np.int64),
        fill=fill,
    )
