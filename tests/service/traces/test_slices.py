"""A fold that stops at any step, and continues, finds what one that does not stop finds."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.parse import parse
from betrace.service.traces import folding
from betrace.service.traces.slices import CpuSlice, SliceOver
from betrace.service.traces.tenant_traces import TenantTraces
from tests.support.engine import compiled
from tests.support.spans import S, body

pytestmark = pytest.mark.kernel

RULES = [
    'count(a.where(x matches "v.*3")) > 2',
    'count(a.where(x matches "^v1" and not x matches "7$")) > 2',
    "count(b) > 1",
    'a*.where(x matches "9")',
]


class Interrupted(CpuSlice):
    """Stops at random steps."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(0)
        self._chance = chance

    def pay(self, seconds: float = 0.0) -> None:
        if self._chance.random() < 0.05:
            raise SliceOver


def batch():
    spans = [
        S(n, "ab"[n % 3 == 0], trace=bytes([n % 7 + 1]) * 16, x=f"v{n}") for n in range(1, 300)
    ]
    made = scan_bodies("t", [body(*spans[:100]), body(*spans[100:])])
    made.positions = np.array([10, 20])
    return made


def found(parts):
    return (
        sum(folded.matched for _, folded in parts),
        sum(folded.opened for _, folded in parts),
        sum(folded.repeated for _, folded in parts),
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_fold_in_slices(seed, monkeypatch):
    rules = compiled([parse(rule) for rule in RULES])
    whole = TenantTraces("t", rules)
    expected = found(whole.fold(batch(), 1))
    monkeypatch.setattr(folding, "_PATTERN_CELLS", 40)
    chance = random.Random(seed)
    traces, given = TenantTraces("t", rules), batch()
    parts = []
    for _ in range(10_000):
        try:
            parts += traces.fold(given, 1, slice=Interrupted(chance))
            break
        except SliceOver:
            parts += traces.owed
            traces.owed = []
    assert found(parts) == expected
    assert expected[0] > 100
    assert found(traces.fold(given, 1)) == (0, 0, len(given))  # nothing is left, all is known


class Steps(CpuSlice):
    """Allows so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(0)
        self._steps = steps

    def pay(self, seconds: float = 0.0) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise SliceOver


def test_a_slice_passes_over_what_is_folded_in_one_step(monkeypatch):
    calls = []
    take_rows = folding.FoldRun._take_rows

    def counted(run, end):
        calls.append(end)
        take_rows(run, end)

    monkeypatch.setattr(folding.FoldRun, "_take_rows", counted)
    monkeypatch.setattr(folding, "_PATTERN_CELLS", 9)  # three rows
    traces = TenantTraces("t", compiled([parse(rule) for rule in RULES]))
    made = scan_bodies("t", [body(*(S(n, "other") for n in range(1, 301)))])
    made.positions = np.array([10])
    slices = 0
    while True:
        slices += 1
        try:
            traces.fold(made, 1, slice=Steps(10))
            break
        except SliceOver:
            traces.owed = []
    pieces = -(-300 // (9 // traces.tables[-1].rules.patterns.count))
    assert slices >= pieces / 10
    assert len(calls) == len(set(calls)) == pieces


def test_a_slice_ends_with_its_time_and_a_certain_one_allows_one_step_more():
    with pytest.raises(SliceOver):
        CpuSlice(60).pay(100.0)
    CpuSlice(60).pay(0.0)
    certain = CpuSlice(60, certain=True)
    certain.pay()
    certain.pay(100.0)
    with pytest.raises(SliceOver):
        certain.pay(100.0)
    with pytest.raises(SliceOver):
        CpuSlice(60, certain=True, longest=0.02).pay(100.0)
    short = CpuSlice(0.005)
    until = time.thread_time() + 0.01
    while time.thread_time() < until:
        pass
    assert short.used >= 0.005
    with pytest.raises(SliceOver):
        short.pay()
