"""The fold: repeated spans, pools that grow in the middle of a batch, evidence, roots, services."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from betrace.service.otlp.columns import SPAN_ID
from betrace.service.rules import names
from betrace.service.rules.parse import parse
from betrace.service.traces import table
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import (
    CLOSED,
    E_CHECK,
    E_COUNT,
    E_EVIDENCE,
    ENTRIES_USED,
    ERRORS,
    EVIDENCE,
    FIRST_SEEN,
    FLAGS,
    FREE,
    HI,
    LARGE_USED,
    LAST_SEEN,
    LO,
    MAX_END,
    MIDDLE_USED,
    MIN_START,
    OPEN,
    POSITION_0,
    POSITION_COUNT,
    POSITIONS,
    REOPENED,
    REPEATED,
    ROOT_ID,
    SLOTS_USED,
    SPANS,
    SPILLED,
    STATE,
    TraceArrays,
)
from betrace.service.traces.tenant_traces import MOST_SERVICES, OTHER_SERVICES, TenantTraces
from tests.support.engine import Engine, compiled
from tests.support.examples import examples
from tests.support.spans import TRACE, S, batch, body, many, of_traces

pytestmark = pytest.mark.kernel

HI_LO = tuple(int.from_bytes(TRACE[i : i + 8], "big") for i in (0, 8))
NOW = 10**18


def tenant(*rules: str) -> TenantTraces:
    return TenantTraces("t", compiled([parse(rule) for rule in rules]))


def row_of(traces: TenantTraces, hi: int = HI_LO[0], lo: int = HI_LO[1]) -> np.ndarray:
    for each in traces.tables:
        slot = each.find(hi, lo)
        if slot >= 0:
            return each.arrays.slots[slot]
    raise AssertionError("no such trace")


def counts_of(traces: TenantTraces, hi: int = HI_LO[0], lo: int = HI_LO[1]) -> dict[str, int]:
    for each in traces.tables:
        slot = each.find(hi, lo)
        if slot >= 0:
            due = each.copy(np.array([slot]), closed=False, now=0)
            return {each.rules.check_names[row[E_CHECK]]: int(row[E_COUNT]) for row in due.entries}
    raise AssertionError("no such trace")


# Repeated spans


@pytest.mark.parametrize("between", [0, 1, 14, 15, 16, 17, 126, 127, 128, 129, 500, 998, 999])
@pytest.mark.parametrize("before", [0, 5, 15, 16, 127, 128, 999, 1000, 2345])
@pytest.mark.parametrize("split", [False, True])
def test_a_span_repeated_within_the_next_1000_is_not_counted(before, between, split):
    traces = tenant("count(a) > 0")
    parts = [many(before, 10_000), many(1, 7), many(between, 20_000), many(1, 7)]
    if split:
        for part in parts:
            traces.fold(part, NOW)
    else:
        whole = parts[0]
        whole.spans = np.concatenate([part.spans for part in parts])
        traces.fold(whole, NOW)
    row = row_of(traces)
    assert row[REPEATED] == 1
    assert row[SPANS] == before + 1 + between
    assert counts_of(traces) == {"a": before + 1 + between}


@given(st.lists(st.integers(1, 40), max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_short_traces_count_each_span_once(ids, cuts):
    traces = tenant("count(a) > 0")
    for first, last in itertools.pairwise([0, *sorted(cuts), max([*cuts, len(ids)])]):
        if part := ids[first:last]:
            traces.fold(batch(*(S(id) for id in part)), NOW)
    if ids:
        row = row_of(traces)
        assert row[SPANS] == len(set(ids))
        assert row[REPEATED] == len(ids) - len(set(ids))


@pytest.mark.parametrize("known", [None, 1000], ids=["all", "last 1000"])
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=12),
    st.integers(0, 2**32),
    st.sampled_from([1000, 1100, 1600, 10**6]),
)
@settings(max_examples=examples(20))
def test_a_long_trace_knows_its_span_ids(known, cuts, seed, pool):
    """Compared with a model: the ids that were counted; without sets, a queue of the last 1000."""
    with pytest.MonkeyPatch.context() as patch:
        if known:
            patch.setattr(table, "MOST_SET", 0)
        compare_with_model(known, cuts, seed, pool)


def compare_with_model(known, cuts, seed, pool):
    rng = random.Random(seed)
    traces = tenant()
    window: deque[int] = deque(maxlen=known)
    repeated = spans = 0
    template = many(1, 1)
    for length in cuts:
        ids = [rng.randrange(1, pool) for _ in range(length)]
        part = template.spans.repeat(length, axis=0)
        part[:, SPAN_ID] = ids
        traces.fold(replace(template, spans=part), NOW)
        for id in ids:
            if id in window:
                repeated += 1
            else:
                spans += 1
                window.append(id)
    assert row_of(traces)[SPANS] == spans
    assert row_of(traces)[REPEATED] == repeated


def test_span_ids_in_one_chain_are_distinguished(monkeypatch):
    """The worst case: all hashes are equal."""
    arrays = original(64)
    monkeypatch.setattr(table, "empty_arrays", lambda _: arrays)
    arrays.secret[:] = 0
    monkeypatch.setattr(table, "MOST_SET", 0)
    traces = tenant()
    traces.fold(many(1100), NOW)
    traces.fold(many(1000, 101), NOW)  # all still known
    assert row_of(traces)[SPANS] == 1100
    assert row_of(traces)[REPEATED] == 1000
    traces.fold(many(1, 100), NOW)  # no longer
    assert row_of(traces)[SPANS] == 1101


def test_span_ids_of_a_set_with_equal_hashes_are_distinguished(monkeypatch):
    arrays = original(64)
    monkeypatch.setattr(table, "empty_arrays", lambda _: arrays)
    arrays.secret[:] = 0
    traces = tenant()
    traces.fold(many(1100), NOW)
    traces.fold(many(1100), NOW)
    assert row_of(traces)[SPANS] == row_of(traces)[REPEATED] == 1100


def test_a_long_trace_knows_its_span_ids_after_a_restart():
    traces = tenant()
    traces.fold(many(1700), NOW)
    saved = traces.snapshot()
    restored = TenantTraces("t", compiled([]))
    restored.tables[0].restore(saved.tables[0])
    restored.fold(many(1000, 1 + 700), NOW)
    assert row_of(restored)[REPEATED] == 1000
    assert row_of(restored)[SPANS] == 1700


def test_traces_with_equal_hashes_are_distinguished(monkeypatch):
    arrays = original(64)
    monkeypatch.setattr(table, "empty_arrays", lambda _: arrays)
    arrays.secret[:] = 0
    traces = tenant()
    for _ in range(2):
        traces.fold(of_traces(np.arange(59) // 7, np.arange(59) + 1), NOW)
    assert traces.open_count == 59
    traces.close_due(NOW + 10, 5)
    closed = ClosedTraces(1 << 12)
    assert traces.evict(NOW + 10**12, 1, 0, closed) == 59
    assert not traces.tables[0].arrays.table.any()


def test_a_repeated_batch_is_not_counted():
    traces = tenant("count(a) > 0")
    spans = many(1000)
    for _ in range(3):
        traces.fold(spans, NOW)
    assert row_of(traces)[SPANS] == 1000
    assert row_of(traces)[REPEATED] == 2000


def test_the_same_span_id_in_another_trace_is_another_span():
    traces = tenant()
    traces.fold(batch(S(1), S(1, trace=b"\2" * 16), S(1)), NOW)
    assert row_of(traces)[SPANS] == 1
    assert traces.open_count == 2


# Pools


def tiny_arrays(_: int) -> TraceArrays:
    """Pools with almost no capacity."""
    arrays = original(1)
    return arrays._replace(
        table=np.zeros(2, np.int64),
        ring_middle=arrays.ring_middle[:1].copy(),
        ring_large=arrays.ring_large[:1].copy(),
        entries=arrays.entries[:1].copy(),
    )


original = table.empty_arrays


def totals(traces: TenantTraces) -> dict[tuple[int, int], Any]:
    found = {}
    for each in traces.tables:
        slots = np.flatnonzero(each.arrays.slots[:, STATE] != FREE)
        due = each.copy(slots, closed=False, now=0)
        for k, row in enumerate(due.rows):
            entries = due.entries[due.starts[k] : due.starts[k + 1]]
            found[int(row[HI]), int(row[LO])] = (
                row[[SPANS, REPEATED, ERRORS, MIN_START, MAX_END, ROOT_ID]].tolist(),
                entries[:, [E_CHECK, E_COUNT]].tolist(),
                [sorted(e[E_EVIDENCE : E_EVIDENCE + 2 * min(5, e[E_COUNT])]) for e in entries],
                due.service_names(k),
                due.root_name(k),
            )
    return found


RULES = (
    "count(a) > 2 and b",
    'a.where(x matches "^v") before c',
    "count(db.*) > 3",
    '*.where(x == "v1") or count(*) > 500',
)


def mixture(rng: random.Random, n: int) -> list[S]:
    return [
        S(
            rng.randrange(1, 3 * n),
            rng.choice(["a", "b", "c", "db.get", "db.put", "e" * 5000, f"n{rng.randrange(50)}"]),
            trace=bytes([rng.choice([1, 1, 1, 2, 3, rng.randrange(4, 90)])]) * 16,
            start=rng.randrange(50),
            parent=rng.choice([0, 1]),
            service=rng.choice(["", "shop", "pay"]),
            error=rng.random() < 0.1,
            x=rng.choice([None, "v1", "v2", "w"]),
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_pools_that_grow_in_the_middle_of_a_batch_change_nothing(monkeypatch, seed):
    rng = random.Random(seed)
    spans = mixture(rng, 700)
    positions = [1 + i // rng.choice([1, 3, 40]) for i in range(len(spans))]
    positions.sort()
    one_by_one, at_once = tenant(*RULES), None
    for span, position in zip(spans, positions, strict=True):
        one_by_one.fold(batch(span, positions=[position]), NOW)
    monkeypatch.setattr(table, "empty_arrays", tiny_arrays)
    monkeypatch.setattr(names, "_LEARNED_SLOTS", 8)
    monkeypatch.setattr(names, "_LEARNED_CHECKS", 4)
    at_once = tenant(*RULES)
    at_once.tables[0].ask = np.zeros((1, 3), np.int64)
    folded = at_once.fold(batch(*spans, positions=positions), NOW)
    assert totals(at_once) == totals(one_by_one)
    ((_, result),) = folded
    assert result.opened == at_once.open_count == one_by_one.open_count


def test_every_pool_was_grown_from_one_row(monkeypatch):
    """Otherwise the test above would prove little."""
    monkeypatch.setattr(table, "empty_arrays", tiny_arrays)
    traces = tenant(*RULES)
    for number in range(3):
        traces.fold(many(200, trace=(0, number)), NOW)
    fill = traces.tables[0].arrays.fill
    assert fill[SLOTS_USED] == 3
    assert fill[LARGE_USED] == 3
    assert fill[MIDDLE_USED] == 1  # returned, and used again
    assert fill[ENTRIES_USED] == 6


def test_long_traces_can_be_closed_one_after_another():
    """There are more large rings than there ever were middle ones at the same time."""
    traces = tenant("count(a) > 1500")
    for number in range(30):
        traces.fold(many(1600, trace=(number, 5)), NOW)
    closed = traces.close_due(NOW + 2, 1)
    assert [len(due) for due in closed] == [30]
    assert set(closed[0].rows[:, SPANS].tolist()) == {1600}


# The table of traces


def clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all traces hash to few places of the table, with a secret of zeros except the last."""

    def arrays(slots: int) -> TraceArrays:
        made = original(slots)
        return made._replace(secret=np.array([0, 1, 2**58], np.int64))

    monkeypatch.setattr(table, "empty_arrays", arrays)


def evict_all(traces: TenantTraces, now: int = NOW * 2) -> int:
    return traces.evict(now + 10**12, 1, 0, ClosedTraces(1 << 10))


@pytest.mark.parametrize("seed", range(3))
def test_clustered_ids_can_be_removed_in_any_order(monkeypatch, seed):
    clustered(monkeypatch)
    rng = random.Random(seed)
    hi = lo = np.arange(1, 401)
    traces = tenant("count(a) > 1")
    traces.fold(of_traces(hi, lo), NOW)
    table = traces.tables[0]
    left = list(range(400))
    rng.shuffle(left)
    time = NOW
    while left:
        gone, left = left[:37], left[37:]
        time += 10
        slots = np.array([table.find(int(hi[i]), int(lo[i])) for i in gone])
        table.close(slots, time)
        assert evict_all(traces) == len(gone)
        for i in gone:
            assert table.find(int(hi[i]), int(lo[i])) == -1
        for i in left:
            assert table.arrays.slots[table.find(int(hi[i]), int(lo[i])), LO] == lo[i]
    assert not table.arrays.table.any()
    traces.fold(of_traces(hi, lo), NOW)
    assert traces.open_count == 400
    assert table.arrays.fill[SLOTS_USED] == 400  # the slots were used again


@pytest.mark.parametrize("ids", ["equal halves", "equal xor", "high bits", "one half"])
def test_ids_chosen_by_a_client_do_not_cluster(ids):
    numbers = np.arange(1, 4001)
    hi, lo = {
        "equal halves": (numbers, numbers),
        "equal xor": (numbers * 77_777, numbers * 77_777 ^ 12_345),
        "high bits": (numbers * 0, numbers << 51),
        "one half": (numbers << 40, numbers * 0),
    }[ids]
    traces = tenant()
    traces.fold(of_traces(hi, lo), NOW)
    table = traces.tables[0].arrays.table
    full = np.flatnonzero(np.append(table, 0) == 0)
    longest = int(np.diff(full, prepend=-1).max()) - 1
    assert traces.open_count == 4000
    assert longest < 200  # consecutive slots; 4000 if all hashed to one place


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 11)), max_size=60))
def test_slots_rings_and_entries_are_used_again(steps):
    """Compared with a model: open, long, closed and forgotten traces in any order."""
    traces = tenant("count(a) > 1", "count(*) > 2")
    model: dict[int, int] = {}
    is_open: dict[int, bool] = {}
    now, next_id = NOW, 1
    for what, key in steps:
        now += 10
        if what == 0:
            n = 1 if key % 3 else 150
            traces.fold(many(n, next_id, trace=(key, key)), now)
            next_id += n
            model[key] = model.get(key, 0) + n
            is_open[key] = True
        elif what == 1:
            traces.close_due(now + 1, 1)
            is_open = dict.fromkeys(is_open, False)
        elif what == 2:
            evict_all(traces)
            model = {k: n for k, n in model.items() if is_open[k]}
            is_open = dict.fromkeys(model, True)
        else:
            traces = TenantTraces.restored(snapshot_of(traces))
        assert traces.open_count == sum(is_open.values())
        assert traces.closed_count == len(is_open) - sum(is_open.values())
        for k, n in model.items():
            row = row_of(traces, k, k)
            assert row[SPANS] == n
            assert row[STATE] == (OPEN if is_open[k] else CLOSED)
            assert counts_of(traces, k, k) == {"a": n, "*": n}


def snapshot_of(traces: TenantTraces) -> Any:
    """A snapshot with the rules as real definitions."""
    saved = traces.snapshot()
    definitions = orjson.dumps(
        [{"id": "r0", "condition": "count(a) > 1"}, {"id": "r1", "condition": "count(*) > 2"}]
    )
    tables = [replace(table, definitions=definitions) for table in saved.tables]
    return replace(saved, tables=tables)


# The contents of a trace


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 2**64 - 1)),
        max_size=12,
        unique_by=lambda p: p[1],
    ),
    st.randoms(),
)
def test_evidence_is_the_five_earliest_in_any_order(pairs, rng):
    rng.shuffle(pairs)
    traces = tenant("count(a) > 0")
    for start, id in pairs:
        traces.fold(batch(S(id, start=start)), NOW)
    if not pairs:
        return
    (due,) = traces.close_due(NOW + 2, 1)
    (entry,) = due.entries
    kept = entry[E_EVIDENCE : E_EVIDENCE + 2 * min(EVIDENCE, len(pairs))].reshape(-1, 2).tolist()
    signed = [(start, id - 2**64 if id >= 2**63 else id) for start, id in pairs]
    assert [tuple(pair) for pair in kept] == sorted(signed)[:EVIDENCE]
    assert entry[E_COUNT] == len(pairs)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 99), st.sampled_from([0, 0, 7])),
        min_size=1,
        max_size=8,
        unique_by=lambda t: t[1],
    )
)
def test_the_root_is_the_earliest_span_without_a_parent(spans):
    traces = tenant()
    for start, id, parent in spans:
        traces.fold(batch(S(id, f"n{id}", start=start, parent=parent, service=f"s{id}")), NOW)
    (due,) = traces.close_due(NOW + 2, 1)
    roots = sorted((start, id) for start, id, parent in spans if not parent)
    assert due.root_name(0) == (f"n{roots[0][1]}" if roots else None)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("", ""),
        ("a" * 96, "a" * 96),
        ("a" * 97, "a" * 96),
        ("日" * 40, "日" * 32),
        ("a" + "日" * 40, "a" + "日" * 31),
        ("aa" + "日" * 40, "aa" + "日" * 31),
        ("💰" * 25, "💰" * 24),
        ("a" + "💰" * 25, "a" + "💰" * 23),
        ("a" * 94 + "é", "a" * 94 + "é"),
        ("a" * 95 + "é", "a" * 95),
    ],
)
def test_a_long_root_name_is_cut_between_characters(name, kept):
    traces = tenant()
    traces.fold(batch(S(1, name, parent=0)), NOW)
    (due,) = traces.close_due(NOW + 2, 1)
    assert due.root_name(0) == kept


def test_a_root_that_arrives_last_and_one_that_replaces_a_longer_name():
    traces = tenant()
    traces.fold(batch(S(1, "child", start=1), S(2, "long name of a root", start=9, parent=0)), NOW)
    traces.fold(batch(S(3, "root", start=8, parent=0, service="shop")), NOW)
    (due,) = traces.close_due(NOW + 2, 1)
    assert due.root_name(0) == "root"


def test_up_to_eight_services_in_order_of_appearance():
    traces = tenant()
    names = [f"s{i}" for i in range(12)]
    for round in range(2):
        traces.fold(batch(*(S(100 * round + i + 1, service=s) for i, s in enumerate(names))), NOW)
    traces.fold(batch(S(999)), NOW)
    (due,) = traces.close_due(NOW + 2, 1)
    assert due.service_names(0) == names[:8]


def test_the_service_of_a_trace_is_that_of_its_root_or_first_span():
    traces, other = tenant(), b"\2" * 16
    traces.fold(batch(S(2, service="bank"), S(3, service="shop")), NOW)
    traces.fold(batch(S(1, trace=other, parent=0)), NOW)
    due = traces.close_due(NOW + 2, 1)
    found = {each.trace_id(k): each.service(k) for each in due for k in range(len(each))}
    assert found == {TRACE.hex(): "bank", other.hex(): ""}
    traces.fold(batch(S(1, parent=0, service="s" * 300)), NOW + 3)
    (late,) = traces.close_due(NOW + 5, 1)
    assert late.service(0) == "s" * 200


def test_services_beyond_the_limit_share_a_name():
    traces = tenant()
    for first in range(0, MOST_SERVICES + 200, 500):
        last = min(first + 500, MOST_SERVICES + 200)
        spans = [
            S(i + 1, trace=(i + 1).to_bytes(16, "big"), service=f"s{i}") for i in range(first, last)
        ]
        traces.fold(batch(*spans), NOW)
    assert len(traces.services) == MOST_SERVICES + 1
    due = traces.close_due(NOW + 2, 1)
    names = {due_.trace_id(k): due_.service_names(k) for due_ in due for k in range(len(due_))}
    assert names[f"{1:032x}"] == ["s0"]
    assert names[f"{MOST_SERVICES + 150:032x}"] == [OTHER_SERVICES]
    traces.fold(batch(S(1, service="s3")), NOW + 3)
    (due,) = traces.close_due(NOW + 5, 1)
    assert due.service_names(0) == ["s3"]


def test_log_positions_are_spilled_when_there_are_too_many():
    traces = tenant()
    spilled: list[int] = []
    spans = [S(i) for i in range(1, 101)]
    for first in range(0, 100, 10):
        part = spans[first : first + 10]
        for _, folded in traces.fold(batch(*part, positions=[s.id for s in part]), NOW):
            assert {tuple(row[:2]) for row in folded.spilled} <= {HI_LO}
            spilled += folded.spilled[:, 2:].ravel().tolist()
    row = row_of(traces)
    kept = row[POSITION_0 : POSITION_0 + row[POSITION_COUNT]].tolist()
    assert len(kept) <= POSITIONS
    assert spilled + kept == list(range(1, 101))
    assert row[FLAGS] & SPILLED


def test_a_frame_is_listed_once_and_position_0_never():
    traces = tenant()
    for id, position in ((1, 5), (2, 5), (3, 9), (4, 5), (5, 9)):
        traces.fold(batch(S(id), positions=[position]), NOW)
    traces.fold(batch(S(6)), NOW)
    row = row_of(traces)
    assert row[POSITION_0 : POSITION_0 + row[POSITION_COUNT]].tolist() == [5, 9]


def test_errors_times_and_times_of_receipt():
    traces = tenant()
    traces.fold(batch(S(1, start=50, end=60), S(2, start=40, end=45, error=True)), NOW)
    traces.fold(
        batch(S(2, start=1, end=999, error=True), S(3, start=55, end=58, error=True)), NOW + 9
    )
    row = row_of(traces)
    wanted = [SPANS, REPEATED, ERRORS, MIN_START, MAX_END, FIRST_SEEN, LAST_SEEN]
    assert row[wanted].tolist() == [3, 1, 2, 40, 60, NOW, NOW + 9]


def test_times_beyond_2_63_and_in_the_future_are_accepted():
    engine = Engine([parse("a before b"), parse("b before a")])
    engine.send(body(S(1, "a", start=2**64 - 1, end=2**64 - 1), S(2, "b", start=2**63 - 2)))
    engine.close()
    assert {rule for _, rule in engine.active} == {"r1"}
    equal = Engine([parse("a before b"), parse("b before a")])
    equal.send(body(S(1, "a", start=2**64 - 1), S(2, "b", start=2**63)))
    equal.close()
    assert not equal.active  # both are clamped to the same time


# Reopening


def test_a_trace_closed_and_continued_in_one_batch_of_many():
    engine = Engine([parse("count(a) == 2"), parse("always { b }")])
    other = b"\2" * 16
    engine.send(body(S(1), S(2), S(1, trace=other)))
    engine.close()
    assert engine.active == {
        (TRACE.hex(), "r0"),
        (TRACE.hex(), "r1"),
        (other.hex(), "r1"),
    }
    engine.send(body(S(5, trace=b"\3" * 16), S(3), S(4, "b"), S(2, "b", trace=other), S(3)))
    row = row_of(engine.traces)
    assert row[SPANS] == 4
    assert row[REPEATED] == 1
    assert row[FLAGS] & REOPENED
    assert engine.traces.open_count == 3
    engine.close()
    assert engine.active == {((b"\3" * 16).hex(), "r1")}
    assert [s.reason is None for s in engine.signals if s.kind == "retracted"] == [False] * 3


def test_a_repeated_span_reopens_a_trace_without_changing_its_verdict():
    engine = Engine([parse("count(a) == 1")])
    engine.send(body(S(1)))
    engine.close()
    engine.send(body(S(1)))
    engine.close()
    assert engine.active == {(TRACE.hex(), "r0")}
    assert [s.kind for s in engine.signals].count("retracted") == 0
    assert len({s.id for s in engine.signals}) == 1


def test_a_complete_trace_is_closed_at_once_each_time():
    engine = Engine([parse("count(a) > 1"), parse("always { b }")])
    engine.send(body(S(1), S(2, complete=True), S(3, complete=True)))
    assert engine.traces.open_count == 0
    assert sorted((s.rule_id, s.early) for s in engine.signals) == [("r0", True), ("r1", False)]
    engine.send(body(S(4, "b", complete=True)))
    assert engine.traces.open_count == 0
    assert [(s.rule_id, s.kind) for s in engine.signals[2:]] == [("r1", "retracted")]


def test_a_repeated_span_can_complete_a_trace():
    traces = tenant()
    traces.fold(batch(S(1)), NOW)
    ((_, folded),) = traces.fold(batch(S(1, complete=True)), NOW)
    assert len(folded.completed) == 1


# Idle and old traces


def test_idle_and_old_traces_are_found_in_portions(monkeypatch):
    monkeypatch.setattr(table, "SWEEP_BATCH", 7)
    traces = tenant()
    ids = np.arange(1, 51)
    traces.fold(of_traces(ids, ids), 100)
    traces.fold(of_traces(ids[:20], ids[:20], 1000), 200)
    due = traces.close_due(300, 150)
    assert [len(d) for d in due] == [7, 7, 7, 7, 2]
    assert sorted(int(r[HI]) for d in due for r in d.rows) == ids[20:].tolist()
    assert traces.open_count == 20
    assert not traces.close_due(300, 150, 201)
    due = traces.close_due(300, 150, 199)
    assert sum(len(d) for d in due) == 20
    assert traces.open_count == 0
    assert traces.closed_count == 50


def test_a_trace_that_is_never_idle_is_closed_by_age():
    traces = tenant()
    second = 10**9
    for number in range(3601):
        traces.fold(batch(S(number + 1)), number * second)
        due = traces.close_due(number * second + 1, 5 * second, 3600 * second)
        assert bool(due) is (number == 3600)


def test_if_the_clock_runs_backwards_traces_still_close_once():
    traces = tenant("always { b }")
    traces.fold(batch(S(1)), 1000)
    traces.fold(batch(S(2)), 400)
    assert row_of(traces)[LAST_SEEN] == 1000  # the index keeps the row with the latest time
    assert not traces.close_due(300, 50)
    closed = traces.close_due(451, 50)
    assert len(closed) == 1
    traces.fold(batch(S(3)), 200)  # before it was closed
    assert traces.open_count == 1
    assert len(traces.close_due(251, 50)) == 1
    assert evict_all(traces, 0) == 1
    assert traces.closed_count == 0


def test_eviction_by_count_removes_the_oldest():
    traces = tenant()
    for number in range(1, 11):
        ids = np.array([number])
        traces.fold(of_traces(ids, ids), number * 10**10)
        traces.close_due(number * 10**10 + 2, 1)
    assert traces.evict(10**12, 10**15, 4, ClosedTraces(1 << 10)) == 6
    assert [traces.tables[0].find(n, n) >= 0 for n in range(1, 11)] == [False] * 6 + [True] * 4


def test_traces_that_the_index_may_lack_are_not_evicted():
    traces = tenant()
    for number in range(1, 11):
        ids = np.array([number])
        traces.fold(of_traces(ids, ids), number * 10**10)
        traces.close_due(number * 10**10 + 2, 1)
    closed = ClosedTraces(1 << 10)
    assert traces.evict(11 * 10**10, 1, 0, closed, lag_ns=35 * 10**9) == 7
    assert [traces.tables[0].find(n, n) >= 0 for n in range(1, 11)] == [False] * 7 + [True] * 3
    assert traces.evict(11 * 10**10, 1, 0, closed) == 3


def test_eviction_by_count_can_remove_part_of_those_closed_together():
    traces = tenant()
    ids = np.arange(1, 21)
    traces.fold(of_traces(ids, ids), 5)
    traces.close_due(10, 1)
    assert traces.evict(10**12, 10**15, 15, ClosedTraces(1 << 10)) == 5
    assert traces.closed_count == 15
    assert traces.evict(10**12, 10**15, 15, ClosedTraces(1 << 10)) == 0
    assert traces.evict(10**12, 1, 15, ClosedTraces(1 << 10)) == 15


def test_eviction_by_age_keeps_reopened_traces():
    traces = tenant()
    ids = np.arange(1, 11)
    traces.fold(of_traces(ids, ids), 5)
    traces.close_due(10, 1)
    traces.fold(of_traces(ids[:3], ids[:3], 100), 20)
    assert evict_all(traces) == 7
    assert traces.open_count == 3
    traces.close_due(50, 1)
    traces.fold(of_traces(ids[:1], ids[:1], 200), 60)
    traces.close_due(100, 1)
    assert evict_all(traces) == 3
    assert traces.closed_count == traces.open_count == 0


def test_evicted_traces_are_in_the_filter():
    traces = tenant()
    closed = ClosedTraces(1 << 14)
    ids = np.arange(1, 101)
    traces.fold(of_traces(ids, -ids), 5)
    traces.close_due(10, 1)
    traces.evict(10**12, 1, 0, closed)
    assert all(closed.may_hold("t", int(i), -int(i)) for i in ids)
    assert sum(closed.may_hold("other", int(i), -int(i)) for i in ids) < 20


# Rules that change


def test_open_traces_keep_their_rules_when_rules_change():
    first = compiled([parse("count(a) == 1")], "v1")
    second = compiled([parse("count(b) == 1"), parse("always { a }")], "v2")
    traces = TenantTraces("t", first)
    old, new = b"\1" * 16, b"\2" * 16
    traces.fold(batch(S(1, trace=old)), NOW)
    traces.rules = second
    traces.fold(batch(S(2, "b", trace=old), S(3, "b", trace=new)), NOW + 1)
    assert [table.open_count for table in traces.tables] == [1, 1]
    traces.rules = first  # changed back: new traces go to the first table again
    third = b"\3" * 16
    traces.fold(batch(S(4, trace=third), S(5, "b", trace=new), S(6, trace=old)), NOW + 2)
    by_version = {table.rules.version: table.open_count for table in traces.tables}
    assert by_version == {"v1": 2, "v2": 1}
    assert counts_of(traces, *halves(old)) == {"a": 2}
    assert counts_of(traces, *halves(new)) == {"b": 2}
    assert counts_of(traces, *halves(third)) == {"a": 1}
    traces.close_due(NOW + 10, 1)
    evict_all(traces)
    assert [table.rules.version for table in traces.tables] == ["v1"]


def halves(trace: bytes) -> tuple[int, int]:
    return int.from_bytes(trace[:8], "big"), int.from_bytes(trace[8:], "big")


def test_many_generations_of_rules():
    traces = TenantTraces("t", compiled([parse("a")], "v0"))
    for generation in range(12):
        traces.rules = compiled([parse(f"count(a) > {generation}")], f"v{generation}")
        traces.fold(batch(S(1, trace=bytes([generation + 1]) * 16)), NOW)
    spans = [S(2, trace=bytes([generation + 1]) * 16) for generation in range(12)]
    traces.fold(batch(*spans), NOW)
    assert traces.open_count == 12
    due = traces.close_due(NOW + 2, 1)
    assert {d.rules.version: int(d.rows[0, SPANS]) for d in due} == {f"v{i}": 2 for i in range(12)}
    evict_all(traces)
    assert len(traces.tables) == 1


def test_empty_tables_of_former_rules_are_dropped():
    traces = TenantTraces("t", compiled([parse("a")], "v0"))
    for generation in range(5):
        traces.rules = compiled([parse("a")], f"v{generation}")
    assert len(traces.tables) == 1


def test_a_closed_trace_is_reopened_under_its_old_rules():
    traces = TenantTraces("t", compiled([parse("a")], "v0"))
    traces.fold(batch(S(1)), NOW)
    traces.close_due(NOW + 2, 1)
    traces.rules = compiled([parse("b")], "v1")
    folded = traces.fold(batch(S(2)), NOW + 3)
    assert sum(f.reopened for _, f in folded) == 1
    assert sum(f.opened for _, f in folded) == 0
    assert [d.rules.version for d in traces.close_due(NOW + 5, 1)] == ["v0"]


# Size


@example(n=10)
@given(n=st.integers(1, 3000))
def test_the_memory_of_a_trace_does_not_grow_with_its_length(n):
    traces = tenant("count(a) > 5 and not b")
    traces.fold(many(n), NOW)
    assert traces.tables[0].arrays.fill[SLOTS_USED] == 1
    assert traces.tables[0].arrays.fill[ENTRIES_USED] == 1
    assert traces.nbytes < 1_000_000


@pytest.mark.slow
def test_a_million_spans_in_one_trace():
    traces = tenant("count(a) > 999999", "count(a) == 1000000")
    for first in range(0, 1_000_000, 5000):
        traces.fold(many(5000, first + 1), NOW)
    assert traces.nbytes < 40 << 20  # of which its span ids are at most 32
    traces.fold(many(5000, 1), NOW)
    assert row_of(traces)[REPEATED] == 5000
    assert row_of(traces)[SPANS] == 1_000_000
    assert counts_of(traces) == {"a": 1_000_000}


@pytest.mark.slow
def test_five_hundred_traces_of_ten_thousand_spans_interleaved():
    traces = tenant("count(a) > 9999")
    early = 0
    sizes = []
    traces_of = np.arange(1, 501)
    for first in range(0, 10_000, 20):
        part = many(500 * 20)
        part.spans[:, 0] = part.spans[:, 1] = np.tile(traces_of, 20)
        part.spans[:, 2] = np.repeat(first + 1 + np.arange(20), 500)
        for _, folded in traces.fold(part, NOW):
            early += 0 if folded.early is None else len(folded.early)
        ids = traces.tables[0].arrays.ids.nbytes
        sizes.append(traces.nbytes - ids)
    assert early == 500
    assert sizes[-1] == sizes[len(sizes) // 2]
    assert sizes[-1] / 500 < 20_000
    assert ids <= 48 << 20  # not all traces have sets
    (due,) = traces.close_due(NOW + 2, 1)
    assert set(due.rows[:, SPANS].tolist()) == {10_000}
    assert not due.rows[:, REPEATED].any()
