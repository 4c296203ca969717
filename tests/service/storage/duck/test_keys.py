"""What a table has, told from memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.storage.duck.keys import KeyBudget, Keys, frame_keys, id_key, id_keys

NUMBERS = st.lists(st.integers(0, 50) | st.integers(0, 2**64 - 1), max_size=30)


@given(st.lists(NUMBERS, max_size=12), NUMBERS)
def test_add_reports_what_was_added(batches: list[list[int]], asked: list[int]) -> None:
    budget = KeyBudget(1 << 20)
    keys = Keys(budget)
    for batch in batches:
        keys.add(np.array(batch, np.uint64))
    there = set().union(*batches) if batches else set()
    assert keys.maybe(np.array(asked, np.uint64)).tolist() == [key in there for key in asked]
    assert budget.used == 8 * len(keys) == 8 * sum(map(len, batches))
    keys.clear()
    assert (budget.used, len(keys)) == (0, 0)
    assert not keys.maybe(np.array(asked, np.uint64)).any()


def test_runs_are_few() -> None:
    keys = Keys(KeyBudget(1 << 20))
    for first in range(0, 4000, 4):
        keys.add(np.arange(first, first + 4, dtype=np.uint64))
    assert keys._runs is not None
    assert len(keys._runs) <= 6
    assert keys.maybe(np.arange(4001, dtype=np.uint64)).tolist() == [True] * 4000 + [False]


def test_without_memory_every_key_may_exist() -> None:
    budget = KeyBudget(800)
    one, two = Keys(budget), Keys(budget)
    one.add(np.arange(60, dtype=np.uint64))
    two.add(np.arange(40, dtype=np.uint64))
    two.add(np.arange(1, dtype=np.uint64))
    assert (one.complete, two.complete, budget.used) == (True, False, 480)
    assert two.maybe(np.array([7, 1000], np.uint64)).all()
    two.add(np.arange(10, dtype=np.uint64))
    two.clear()
    assert budget.used == 480
    one.clear()
    assert budget.used == 0


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=5))
def test_keys_of_ids(ids: list[bytes]) -> None:
    assert id_keys(ids).tolist() == [id_key(key) for key in ids]
    halves = [(key[:8], key[8:]) for key in ids]
    assert [id_key(low + high) for high, low in halves] == id_keys(ids).tolist()


def test_chunks_of_a_trace_have_keys_of_their_own() -> None:
    of_one_trace = frame_keys(np.full(1000, 7, np.uint64), np.arange(1000))
    assert len(np.unique(of_one_trace)) == 1000
