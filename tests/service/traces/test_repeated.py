"""A repeated span counts once, however long its trace is and however much later it comes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.parse import parse
from betrace.service.traces import table
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import E_COUNT, LEAST_SET, REPEATED, SET_SIZE, SPANS
from betrace.service.traces.tenant_traces import TenantTraces
from tests.support.engine import compiled
from tests.support.spans import S, body

pytestmark = pytest.mark.kernel

RULES = compiled([parse("count(a) > 100000")])
LIMIT = LEAST_SET * 3 // 4  # spans that a set has room for at first


def fold(traces: TenantTraces, spans: list[tuple[int, int]], now: int = 1) -> None:
    """Fold spans (trace, id) in one batch."""
    made = [S(number, "a", trace=trace.to_bytes(16, "big")) for trace, number in spans]
    traces.fold(scan_bodies("t", [body(*made)]), now)


def counts(traces: TenantTraces, trace: int = 1) -> tuple[int, int, int]:
    """Distinct and repeated spans of a trace, and how often the check was satisfied."""
    (each,) = traces.tables
    slot = np.array([each.find(0, trace)])
    due = each.copy(slot, closed=False, now=1)
    row = due.rows[0]
    return int(row[SPANS]), int(row[REPEATED]), int(due.entries[0, E_COUNT])


def copied(traces: TenantTraces) -> TenantTraces:
    return TenantTraces.restored(traces.snapshot())


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_order_of_spans_repetitions_and_restarts(data):
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    traces = TenantTraces("t", RULES)
    sent: dict[int, list[int]] = {1: [], 2: []}
    seen: dict[int, set[int]] = {1: set(), 2: set()}
    for _ in range(data.draw(st.integers(2, 8))):
        batch = []
        for _ in range(chance.choice([10, 500, 1500])):
            trace = chance.choice([1, 1, 1, 2])
            old = sent[trace] and chance.random() < 0.3
            number = chance.choice(sent[trace]) if old else len(sent[trace]) * 7919 + 1
            sent[trace].append(number)
            seen[trace].add(number)
            batch.append((trace, number))
        fold(traces, batch)
        if chance.random() < 0.4:
            traces = copied(traces)
        for trace, numbers in seen.items():
            if numbers:
                distinct = len(numbers)
                assert counts(traces, trace) == (
                    distinct,
                    len(sent[trace]) - distinct,
                    distinct,
                )


def test_a_set_grows_with_its_trace():
    traces = TenantTraces("t", RULES)
    (each,) = traces.tables
    for first in range(0, 6 * LIMIT, 500):
        fold(traces, [(1, number + 1) for number in range(first, first + 500)])
    assert each.arrays.sets[:, SET_SIZE].max() == 8 * LEAST_SET
    fold(traces, [(1, number + 1) for number in range(0, 6 * LIMIT, 7)])
    spans, repeated, matched = counts(traces)
    assert spans == matched == -(-6 * LIMIT // 500) * 500
    assert repeated == len(range(0, 6 * LIMIT, 7))
    again = copied(traces).tables[0].arrays
    assert again.sets[:, SET_SIZE].max() == 8 * LEAST_SET
    assert len(again.ids) < 20 * LEAST_SET


def test_the_memory_of_sets_is_used_again():
    traces = TenantTraces("t", RULES)
    (each,) = traces.tables
    closed = ClosedTraces(1 << 16)
    used = []
    for trace in range(1, 6):
        now = trace * 10**12
        fold(traces, [(trace, number) for number in range(1, LIMIT + 200)], now)
        fold(traces, [(100, number) for number in range(1, 1200)], now)  # stays open
        used.append(len(each.arrays.ids))
        slot = np.array([each.find(0, trace)])
        each.close(slot, now + 1)
        assert traces.evict(now + 10**11, 0, 0, closed, 0) == 1
    assert max(used[1:]) <= 8 * LEAST_SET
    fold(traces, [(100, 1)], 10**13)
    assert counts(traces, 100)[:2] == (1199, 4 * 1199 + 1)
    each.close(np.array([each.find(0, 100)]), 10**13)
    traces.evict(10**14, 0, 0, closed, 0)
    assert len(each.arrays.ids) == 0


@pytest.mark.parametrize("limit", ["MOST_SET", "MOST_IDS", "MOST_IDS_AT_ALL"])
def test_beyond_the_limit_repetitions_are_known_among_the_last_thousand(monkeypatch, limit):
    monkeypatch.setattr(table, limit, LEAST_SET)
    traces = TenantTraces("t", RULES)
    fold(traces, [(1, number) for number in range(1, LIMIT)])
    fold(traces, [(1, 1), (1, LIMIT - 1)])
    assert counts(traces) == (LIMIT - 1, 2, LIMIT - 1)
    fold(traces, [(1, LIMIT), (1, LIMIT + 1)])  # too many for the set
    fold(traces, [(1, LIMIT + 1), (1, LIMIT - 900), (1, 1)])
    assert counts(traces) == (LIMIT + 2, 4, LIMIT + 2)
    traces = copied(traces)
    fold(traces, [(1, LIMIT + 1), (1, 2)])
    assert counts(traces) == (LIMIT + 3, 5, LIMIT + 3)
    fold(traces, [(2, number) for number in range(1, 1500)])  # another trace has room again
    fold(traces, [(2, 1)])
    assert counts(traces, 2)[:2] == (1499, 1)
    (each,) = traces.tables
    assert each.totals.ids == LEAST_SET
    each.leave()
    assert each.totals.ids == 0


def test_long_traces_in_snapshots_of_earlier_versions_go_on_with_the_last_thousand():
    traces = TenantTraces("t", RULES)
    fold(traces, [(1, number) for number in range(1, 1501)])
    fold(traces, [(2, number) for number in range(1, 501)])
    saved = traces.snapshot()
    for name in ("sets", "set_ids"):
        del saved.tables[0].arrays[name]
    restored = TenantTraces.restored(saved)
    fold(restored, [(1, 1), (1, 1400)])
    assert counts(restored)[:2] == (1501, 1)
    fold(restored, [(2, number) for number in range(501, 1501)])
    fold(restored, [(2, 1)])
    assert counts(restored, 2)[:2] == (1500, 1)
