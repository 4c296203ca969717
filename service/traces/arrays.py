"""Creates, grows, saves and restores the arrays of open traces."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from betrace.service.otlp.columns import Rows
from betrace.service.traces import pools
from betrace.service.traces.layout import (
    CHAIN_COLUMNS,
    ENTRIES_FREE,
    ENTRIES_USED,
    ENTRY_COLUMNS,
    FILL_SIZE,
    FREE,
    IDS_USED,
    LARGE_FREE,
    LARGE_RING,
    LARGE_USED,
    LEAST_SET,
    MIDDLE_FREE,
    MIDDLE_RING,
    MIDDLE_USED,
    NAME_BYTES,
    NEED_ENTRIES,
    NEED_LARGE,
    NEED_MIDDLE,
    NEED_SLOTS,
    NEVER,
    RING,
    RING_CLASS,
    SET_AT,
    SET_CLASSES,
    SET_COLUMNS,
    SET_SIZE,
    SLOT_COLUMNS,
    SLOTS_FREE,
    SLOTS_USED,
    SMALL_RING,
    SPANS,
    STATE,
    TraceArrays,
)

LEAST_SLOTS = 64

Array = npt.NDArray[Any]


def empty_arrays(slots: int) -> TraceArrays:
    """Empty arrays with a capacity of ``slots`` traces (a power of two)."""
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
        sets=np.zeros((1, SET_COLUMNS), np.int64),
        ids=np.zeros(0, np.int64),
        free_ids=np.zeros(SET_CLASSES, np.int64),
        entries=np.zeros((slots, ENTRY_COLUMNS), np.int64),
        fill=fill,
    )


def grown(old: TraceArrays, reason: int, checks: int) -> TraceArrays:
    """The arrays with the pool doubled that a kernel found full (``reason``). A trace has at most
    ``checks`` entries."""
    if reason == NEED_ENTRIES:
        return old._replace(entries=doubled(old.entries, checks))
    if reason == NEED_MIDDLE:
        return old._replace(ring_middle=doubled(old.ring_middle))
    if reason == NEED_LARGE:
        return old._replace(
            ring_large=doubled(old.ring_large), chains=doubled(old.chains), sets=doubled(old.sets)
        )
    assert reason == NEED_SLOTS
    activity = doubled(old.activity)
    activity[len(old.activity) :] = NEVER
    slots = doubled(old.slots)
    table = np.zeros(2 * len(old.table), np.int64)
    pools.rebuild(table, old.secret, slots, int(old.fill[SLOTS_USED]))
    return old._replace(
        table=table,
        slots=slots,
        activity=activity,
        names=doubled(old.names),
        ring_small=doubled(old.ring_small),
    )


def saved_arrays(a: TraceArrays) -> dict[str, Array]:
    """Copies of the rows in use, by name, without arrays that can be computed from them."""
    fill = a.fill
    used = int(fill[SLOTS_USED])
    return {
        "fill": fill.copy(),
        "slots": a.slots[:used].copy(),
        "activity": a.activity[:used].copy(),
        "names": a.names[:used].copy(),
        "ring_small": a.ring_small[:used].copy(),
        "ring_middle": a.ring_middle[: fill[MIDDLE_USED]].copy(),
        "ring_large": a.ring_large[: fill[LARGE_USED]].copy(),
        "entries": a.entries[: fill[ENTRIES_USED]].copy(),
        **_saved_sets(a),
    }


def restored_arrays(saved: Mapping[str, Array]) -> TraceArrays:
    """The inverse of :func:`saved_arrays`, with spare capacity."""
    slots = LEAST_SLOTS
    while slots < len(saved["slots"]):
        slots *= 2
    empty = empty_arrays(slots)
    for name in ("slots", "activity", "names", "ring_small"):
        getattr(empty, name)[: len(saved[name])] = saved[name]
    empty.fill[:] = saved["fill"]
    arrays = empty._replace(
        ring_middle=_with_spare_rows(saved["ring_middle"], 8),
        ring_large=_with_spare_rows(saved["ring_large"], 1),
        chains=np.zeros((len(saved["ring_large"]) + 1, CHAIN_COLUMNS), np.int16),
        sets=np.zeros((len(saved["ring_large"]) + 1, SET_COLUMNS), np.int64),
        entries=_with_spare_rows(saved["entries"], slots),
    )
    with np.errstate(over="ignore"):
        pools.rebuild(arrays.table, arrays.secret, arrays.slots, len(saved["slots"]))
        arrays = _restored_sets(arrays, saved)
        pools.relink(arrays)
    return arrays


def set_size(count: int) -> int:
    """The capacity of the set of a trace with so many spans."""
    size = LEAST_SET
    while 4 * (count - 1) >= 3 * size:
        size *= 2
    return size


def with_set(arrays: TraceArrays, ring: int, count: int, size: int) -> TraceArrays:
    """The arrays, in which a large ring has a set of ``size`` with the ids added to it so far."""
    used = int(arrays.free_ids[IDS_USED])
    if not arrays.free_ids[size.bit_length() - 1] and used + size > len(arrays.ids):
        arrays = _compacted(arrays, size)
    pools.build_set(arrays, ring, count, size)
    return arrays


def ids_in_use(arrays: TraceArrays) -> int:
    """The capacity of all sets."""
    return int(np.maximum(arrays.sets[:, SET_SIZE], 0).sum()) if len(arrays.ids) else 0


def _compacted(arrays: TraceArrays, more: int) -> TraceArrays:
    """The arrays without free pieces between the sets, and with room for ``more`` ids and a quarter
    of all."""
    used = ids_in_use(arrays)
    ids = np.zeros((used + more) * 5 // 4, np.int64)
    at = 0
    for ring, (first, size) in enumerate(arrays.sets.tolist()):
        if size > 0:
            ids[at : at + size] = arrays.ids[first : first + size]
            arrays.sets[ring, SET_AT] = at
            at += size
    arrays.free_ids[:] = 0
    arrays.free_ids[IDS_USED] = at
    return arrays._replace(ids=ids)


def without_free_sets(arrays: TraceArrays) -> TraceArrays:
    """The arrays without the memory of sets, if no trace has one."""
    if not len(arrays.ids) or (arrays.sets[:, SET_SIZE] > 0).any():
        return arrays
    arrays.free_ids[:] = 0
    return arrays._replace(ids=np.zeros(0, np.int64))


def _saved_sets(a: TraceArrays) -> dict[str, Array]:
    """The number of ids in the set of each large ring, 0 or -1 without one, and the ids; nothing
    without any set."""
    sets = a.sets[: a.fill[LARGE_USED]]
    if not sets[:, SET_SIZE].any():
        return {}
    found = [a.ids[at : at + size] for at, size in sets.tolist() if size > 0]
    parts = [part[part != 0] for part in found]
    counts = np.minimum(sets[:, SET_SIZE], 0)
    counts[sets[:, SET_SIZE] > 0] = [len(part) for part in parts]
    return {"sets": counts, "set_ids": np.concatenate([*parts, np.zeros(0, np.int64)])}


def _restored_sets(arrays: TraceArrays, saved: Mapping[str, Array]) -> TraceArrays:
    """Restore the sets. In snapshots of earlier versions, long traces have none."""
    if "sets" not in saved:
        rows = arrays.slots[arrays.slots[:, STATE] != FREE]
        long = (rows[:, RING_CLASS] == 2) & (rows[:, SPANS] > LARGE_RING)
        arrays.sets[rows[long, RING], SET_SIZE] = -1
        return arrays
    first = 0
    for ring, count in enumerate(saved["sets"].tolist()):
        if count <= 0:
            arrays.sets[ring, SET_SIZE] = count
            continue
        arrays = with_set(arrays, ring, 0, set_size(count))
        pools.fill_set(arrays, ring, saved["set_ids"][first : first + count].copy())
        first += count
    return arrays


def doubled(array: npt.NDArray, more: int = 0) -> npt.NDArray:  # type: ignore[type-arg]
    """A copy with twice as many rows, plus ``more``; the new rows are zero."""
    twice = np.zeros((2 * len(array) + more, *array.shape[1:]), array.dtype)
    twice[: len(array)] = array
    return twice


def _with_spare_rows(array: npt.NDArray[np.int64], spare: int) -> Rows:
    """A copy with ``spare`` more rows."""
    longer = np.zeros((len(array) + spare, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer
