"""Traces that are saved and restored at any point continue unchanged."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.signals import Signal
from betrace.service.traces.checkpoint import Snapshot, read_latest, write_checkpoint
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import FREE, HI, STATE
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import decide_due
from tests.support.examples import examples
from tests.support.spans import S, batch, many

pytestmark = pytest.mark.kernel

GENERATIONS = [
    compile_rules(
        [make_rule({"id": f"r{i}", "condition": text}) for i, text in enumerate(texts)], f"v{n}"
    )
    for n, texts in enumerate(
        [
            ["count(a) > 2", "when { a } always { b }", "count(a) == count(b)"],
            ["a before b", 'a.where(x matches "v") and not c', "count(*) < 3"],
            ["never { c }", "count(a) == count(b)"],
        ]
    )
]


def spans() -> st.SearchStrategy[S]:
    return st.builds(
        S,
        id=st.integers(1, 40),
        name=st.sampled_from("aaabbc"),
        trace=st.integers(1, 5).map(lambda n: bytes([n]) * 16),
        start=st.integers(0, 20),
        parent=st.sampled_from([0, 1]),
        service=st.sampled_from(["", "shop", "pay"]),
        complete=st.sampled_from([False] * 9 + [True]),
        x=st.sampled_from([None, "v", "w"]),
    )


steps = st.one_of(
    st.tuples(st.just("fold"), st.lists(spans(), min_size=1, max_size=8)),
    st.tuples(st.just("fold"), st.lists(spans(), min_size=1, max_size=8)),
    st.tuples(st.just("long"), st.integers(1, 3)),
    st.tuples(st.just("close"), st.integers(0, 30)),
    st.tuples(st.just("evict"), st.integers(0, 3)),
    st.tuples(st.just("rules"), st.integers(0, 2)),
)


class Run:
    """A stream of steps; the traces are saved and restored before the steps ``restarts``."""

    def __init__(self, directory: Path | None = None, restarts: frozenset[int] = frozenset()):
        self.directory, self.restarts = directory, restarts
        self.traces = TenantTraces("t", GENERATIONS[0])
        self.closed = ClosedTraces(1 << 12)
        self.now = 10**10
        self.signals: list[Signal] = []
        self.facts: list[Any] = []
        self.ids = itertools.count(10_000)

    def run(self, stream: list[tuple[str, Any]]) -> None:
        for number, (what, argument) in enumerate(stream):
            if number in self.restarts:
                self.restart()
            self.now += 10
            getattr(self, what)(argument)
            self.facts.append((self.traces.open_count, self.traces.closed_count))
        self.now += 1000
        self.close(0)

    def restart(self) -> None:
        saved = Snapshot(self.now, {}, [self.traces.snapshot()])
        if self.directory is not None:
            write_checkpoint(self.directory, saved)
            found = read_latest(self.directory)
            assert found is not None
            saved = found
        self.traces = TenantTraces.restored(saved.tenants[0])

    def fold(self, arrived: list[S]) -> None:
        self._take(batch(*arrived))

    def long(self, trace: int) -> None:
        half = int.from_bytes(bytes([trace]) * 8, "big")
        self._take(many(150, next(self.ids) * 1000, trace=(half, half)))

    def _take(self, arrived: Any) -> None:
        for table, folded in self.traces.fold(arrived, self.now):
            facts = (folded.opened, folded.repeated, folded.matched, folded.reopened)
            self.facts.append((table.rules.version, facts))
            if folded.early is not None:
                self.decide(folded.early)
            if len(folded.completed):
                self.decide(table.close(folded.completed, self.now))

    def close(self, idle: int) -> None:
        for due in self.traces.close_due(self.now, idle):
            self.decide(due)

    def evict(self, keep: int) -> None:
        self.facts.append(self.traces.evict(self.now + 10**11, 10**12, keep, self.closed))

    def rules(self, number: int) -> None:
        self.traces.rules = GENERATIONS[number]

    def decide(self, due: DueTraces) -> None:
        found = sorted(decide_due(due, self.now).signals, key=lambda s: (s.trace_id, s.id, s.kind))
        self.signals += found


@settings(max_examples=examples(25))  # compiling rules takes long
@given(st.lists(steps, max_size=25), st.frozensets(st.integers(0, 24), min_size=1, max_size=3))
def test_restored_traces_continue_unchanged(stream, restarts):
    without, with_restarts = Run(), Run(None, restarts)
    without.run(stream)
    with_restarts.run(stream)
    assert with_restarts.facts == without.facts
    key = [(s.trace_id, s.id, s.detected_at) for s in without.signals]
    assert sorted(key) == sorted((s.trace_id, s.id, s.detected_at) for s in with_restarts.signals)
    assert {s.id: s for s in with_restarts.signals} == {s.id: s for s in without.signals}


@settings(max_examples=examples(15), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, min_size=3, max_size=12), st.frozensets(st.integers(0, 11), max_size=3))
def test_traces_restored_from_files_continue_unchanged(tmp_path, stream, restarts):
    without, with_files = Run(), Run(tmp_path, restarts)
    without.run(stream)
    with_files.run(stream)
    assert with_files.facts == without.facts
    assert {s.id: s for s in with_files.signals} == {s.id: s for s in without.signals}


def test_the_order_of_eviction_is_the_same_after_a_restart():
    one, two = (bytes([n]) * 16 for n in (1, 2))
    both = [S(1, trace=one), S(2, trace=two, complete=True), S(3, trace=one, complete=True)]
    stream = [
        ("fold", [S(4, trace=one)]),
        ("fold", both),
        ("evict", 1),
        ("fold", [S(5, trace=one)]),
    ]
    without, restarted = Run(), Run(None, frozenset([2]))
    without.run(stream)
    restarted.run(stream)
    assert restarted.facts == without.facts


def test_a_snapshot_is_a_copy():
    run = Run()
    run.fold([S(1), S(2, "b")])
    saved = run.traces.snapshot()
    before = {name: array.copy() for name, array in saved.tables[0].arrays.items()}
    run.fold([S(i, trace=bytes([i]) * 16) for i in range(3, 90)])
    run.long(1)
    run.close(0)
    for name, array in saved.tables[0].arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_restored_arrays_can_grow_at_once():
    run = Run()
    for number in range(200):
        run.fold([S(1, trace=(number + 1).to_bytes(16, "big"))])
    run.restart()
    for number in range(300):
        run.fold([S(2, trace=(number + 1).to_bytes(16, "big"))])
    run.long(1)
    assert run.traces.open_count == 301
    arrays = run.traces.tables[-1].arrays
    assert int((arrays.slots[:, STATE] != FREE).sum()) == 301
    assert sorted(set(arrays.slots[:, HI].tolist())) == [0, int.from_bytes(b"\1" * 8, "big")]


def test_a_snapshot_with_other_checks_is_rejected():
    run = Run()
    run.fold([S(1)])
    saved = run.traces.snapshot()
    saved.tables[0].check_names.reverse()
    with pytest.raises(ValueError, match="compile to other checks"):
        TenantTraces.restored(saved)


def test_a_snapshot_with_rules_that_do_not_parse_is_rejected():
    run = Run()
    saved = run.traces.snapshot()
    wrong = saved.tables[0].definitions.replace(b'"condition":"', b'"condition":"no rule (')
    saved = replace(saved, tables=[replace(saved.tables[0], definitions=wrong)])
    with pytest.raises(ValueError, match="rule r0"):
        TenantTraces.restored(saved)
