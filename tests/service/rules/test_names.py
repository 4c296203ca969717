"""The checks of each span name, with any hash and any number of names."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from betrace.service.otlp.wire import hash_text
from betrace.service.rules import names
from betrace.service.rules.names import (
    FULL,
    LONGEST_NAME,
    N_COUNT,
    N_FIRST,
    NO_CHECKS,
    TOO_LONG,
    USED,
    NameTable,
    find_name,
    glob_match,
)
from tests.support.oracle import name_matches
from tests.support.strategies import NAME_PATTERNS, SPAN_NAMES

pytestmark = pytest.mark.kernel


def look_up(table: NameTable, name: str, hash_of=hash_text) -> list[int] | int:
    """The checks of a name, or the reason why it has none."""
    data = name.encode()
    buf = np.frombuffer(data or b"\0", np.uint8)
    slot = find_name(table.arrays, hash_of(name), buf, 0, len(data))
    if slot < 0:
        return int(slot)
    _, _, _, first, count = table.arrays.slots[slot].tolist()
    assert table.arrays.slots[slot, N_FIRST] == first
    assert table.arrays.slots[slot, N_COUNT] == count
    return table.arrays.lists[first : first + count].tolist()


def expected(entries: list[tuple[str, int]], name: str) -> list[int]:
    return sorted(check for pattern, check in entries if name_matches(pattern, name))


NAMES = st.one_of(st.sampled_from(SPAN_NAMES), st.text("ab.", max_size=4), st.text(max_size=3))
PATTERNS = st.one_of(st.sampled_from(NAME_PATTERNS), st.text("ab*", max_size=6))


def encodable(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[str, int]]:
    chosen = draw(st.lists(st.one_of(NAMES.filter(encodable), PATTERNS), max_size=8))
    return [(name, check) for check, name in enumerate(chosen)]


@given(tables(), st.lists(NAMES.filter(encodable), max_size=10), st.booleans())
@example([("*", 0), ("", 1)], [""], False)
@example([("a", 0), ("a", 1), ("a*", 2)], ["a", "aa", "a"], True)
def test_exact_names_and_patterns(entries, names, collide):
    """Every name has its checks, even if all names have the same hash."""

    def hash_of(text: str) -> int:
        return 7 if collide else hash_text(text)

    table = NameTable(entries, hash_of)
    for name in [*names, *names]:
        wanted = expected(entries, name)
        found = look_up(table, name, hash_of)
        assert (found if found != NO_CHECKS else []) == wanted
        assert table.glob_checks(name.encode()) == sorted(
            check for pattern, check in entries if "*" in pattern and name_matches(pattern, name)
        )


@given(st.text("ab*", max_size=8), st.text("ab", max_size=10))
@example("*a*a*a*b", "aaaaaaaaaa")
@example("a*b*ab", "ab")
@example("**", "")
def test_the_kernel_matches_patterns_as_the_oracle_does(pattern, name):
    p, n = pattern.encode(), name.encode()
    said = glob_match(
        np.frombuffer(p or b"\0", np.uint8),
        0,
        len(p),
        np.frombuffer(n or b"\0", np.uint8),
        0,
        len(n),
    )
    assert bool(said) is name_matches(pattern, name)


def test_without_patterns_nothing_is_learned():
    table = NameTable([("a", 0)], hash_text)
    assert look_up(table, "b") == NO_CHECKS
    assert look_up(table, "a") == [0]
    assert table.arrays.fill[USED] == 1


def test_a_name_is_learned_once():
    table = NameTable([("*a*", 0), ("*b", 1)], hash_text)
    for _ in range(3):
        assert look_up(table, "ab") == [0, 1]
        assert look_up(table, "c") == []
    assert table.arrays.fill[USED] == 2


def learn_until_full(table: NameTable) -> int:
    for number in range(1_000_000):
        if look_up(table, f"name {number}") == FULL:
            return number
    raise AssertionError("never full")


@pytest.mark.parametrize(
    ("slots", "text", "checks"), [(16, 1 << 19, 1 << 16), (4096, 100, 1 << 16), (4096, 1 << 19, 20)]
)
def test_a_full_table_drops_all_learned_names(monkeypatch, slots, text, checks):
    monkeypatch.setattr(names, "_LEARNED_SLOTS", slots)
    monkeypatch.setattr(names, "_LEARNED_BYTES", text)
    monkeypatch.setattr(names, "_LEARNED_CHECKS", checks)
    table = NameTable([("exact", 0), ("*", 1), ("name *", 2)], hash_text)
    learned = learn_until_full(table)
    assert learned > 1
    assert look_up(table, f"name {learned}") == FULL
    assert look_up(table, "name 0") == [1, 2]  # stored names stay
    table.forget()
    assert look_up(table, f"name {learned}") == [1, 2]
    assert look_up(table, "exact") == [0, 1]
    table.forget()
    assert learn_until_full(table) == learned


def test_one_name_always_fits(monkeypatch):
    """An empty table can learn the longest name, even if every pattern matches it."""
    monkeypatch.setattr(names, "_LEARNED_CHECKS", 1)
    patterns = [("n*" + "*" * i, i) for i in range(100)]
    table = NameTable(patterns, hash_text)
    assert look_up(table, "n" * LONGEST_NAME) == list(range(100))
    assert look_up(table, "n") == FULL
    table.forget()
    assert look_up(table, "n") == list(range(100))


def test_long_names():
    table = NameTable([("*b", 0), ("c" * 5000, 1)], hash_text)
    assert look_up(table, "a" * (LONGEST_NAME - 1) + "b") == [0]
    assert look_up(table, "a" * LONGEST_NAME + "b") == TOO_LONG
    assert look_up(table, "c" * 5000) == [1]  # an exact name needs no pattern
    assert table.glob_checks(b"a" * 10**6 + b"b") == [0]


def test_names_with_the_same_hash_are_distinguished():
    names = [f"n{i}" for i in range(300)]
    table = NameTable([*((name, i) for i, name in enumerate(names)), ("x*", 300)], lambda _: -1)
    random.Random(3).shuffle(names)
    for name in names:
        assert look_up(table, name, lambda _: -1) == [int(name[1:])]
    assert look_up(table, "x", lambda _: -1) == [300]
    assert look_up(table, "y", lambda _: -1) == []


def test_patterns_designed_to_be_slow_are_fast():
    table = NameTable([("*a" * 40 + "*b", 0)], hash_text)
    started = time.process_time()
    assert look_up(table, "a" * 1000) == []
    assert table.glob_checks(b"a" * 1_000_000) == []
    assert time.process_time() - started < 5


def test_a_pattern_is_matched_by_bytes():
    table = NameTable([("日*", 0), ("*本", 1), ("*\u65e5", 2)], hash_text)
    assert look_up(table, "日本") == [0, 1]
    assert look_up(table, "日") == [0, 2]
