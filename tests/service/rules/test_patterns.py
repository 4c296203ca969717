"""Searches with patterns: what they find, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import re2
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.rules.definition import Rule, make_rule
from betrace.service.rules.literals import MAX_PATTERN
from betrace.service.rules.match import SpanValues, evaluate
from betrace.service.rules.patterns import (
    MATCH_BYTES,
    PatternSearch,
    SearchStopped,
    pattern_size,
    search,
)
from betrace.service.rules.store import RuleLimitError, RuleStore
from betrace.service.rules.syntax import And, Attribute, Compare, Literal, Not, Or, Scope
from betrace.service.rules.values import compile_pattern
from tests.service.rules.test_match import batch_of
from tests.support.oracle import OracleSpan

X = Attribute(Scope.ANY, "x")
PATTERNS = ["^a", "b$", "a.*b", "[ab]{3}", "", "é", "(?i)A"]


def matches(pattern: str) -> Compare:
    return Compare(X, "matches", (Literal(pattern, None),))


@given(st.text("abéA ", max_size=12), st.lists(st.sampled_from(PATTERNS), unique=True))
def test_a_set_finds_what_each_pattern_finds(text, patterns):
    searched = PatternSearch([matches(pattern) for pattern in patterns])
    for pattern in patterns:
        for _ in range(2):  # the second time from memory
            found = searched.search(X, pattern, text, None)
            assert found is (re2.search(pattern, text) is not None)


def test_a_set_that_runs_out_of_memory_is_searched_one_by_one(monkeypatch):
    monkeypatch.setattr("betrace.service.rules.patterns._Set.search", lambda self, data: None)
    searched = PatternSearch([matches(pattern) for pattern in PATTERNS])
    assert searched.search(X, "^a", "ab", None) is True
    assert searched.search(X, "^a", "b", None) is False


def test_a_match_of_a_long_text_is_unknown():
    assert search("b$", "a" * (MATCH_BYTES - 1) + "b") is True
    assert search("b$", "a" * MATCH_BYTES + "b") is None
    assert search("b$", "é" * (MATCH_BYTES // 2 + 1)) is None  # bytes count


def test_a_large_pattern_looks_at_less_text():
    large = r"\p{L}{10}x"
    assert pattern_size(large) > 10_000
    assert search(large, "a" * 5000) is False
    assert search(large, "a" * 20_000) is None


def test_an_unknown_match_decides_only_what_depends_on_it():
    batch = batch_of(OracleSpan("a", attributes={"x": "a" * (MATCH_BYTES + 1), "y": 1}))
    values = SpanValues(batch)
    unknown = matches("b")
    true = Compare(Attribute(Scope.ANY, "y"), "==", (Literal("1", 1),))
    false = Not(true)
    assert evaluate(unknown, values, 0) is None
    assert evaluate(Not(unknown), values, 0) is None
    assert evaluate(And((unknown, true)), values, 0) is None
    assert evaluate(And((unknown, false)), values, 0) is False
    assert evaluate(Or((unknown, true)), values, 0) is True
    assert evaluate(Or((false, unknown)), values, 0) is None


def test_whoever_pays_is_asked_before_a_search():
    asked: list[float] = []
    search("[ab]*a[ab]{250}c", "a" * 1000, asked.append)
    assert asked == [pytest.approx(1000 * pattern_size("[ab]*a[ab]{250}c") * 1e-8)]


def test_a_search_that_is_stopped_says_how_to_do_it():
    pattern = "[ab]*a[ab]{250}c"
    searched = PatternSearch([matches(pattern)])

    def stop(seconds: float) -> None:
        raise SearchStopped

    for text in ("ab" * 100, "ab" * 1000):
        with pytest.raises(SearchStopped) as stopped:
            searched.search(X, pattern, text, stop)
        assert stopped.value.work is not None
        stopped.value.work()
        assert searched.search(X, pattern, text, stop) is False


@pytest.mark.parametrize("text", ["a7b", "a7b" * 1000])
def test_searches_of_several_sets_that_are_stopped_advance(text, monkeypatch):
    monkeypatch.setattr("betrace.service.rules.patterns._SET_PROGRAM", 20)
    patterns = [f"a{n}" for n in range(10)]
    searched = PatternSearch([matches(pattern) for pattern in patterns])
    for steps in (0, 1):  # that a slice allows
        stops, found = 0, None
        searched._remembered.clear()
        while found is None:
            left = iter([True] * steps)

            def pay(seconds: float, left: Iterator[bool] = left) -> None:
                if not next(left, False):
                    raise SearchStopped

            try:
                found = searched.search(X, "a7", text, pay)
            except SearchStopped as stopped:
                if not steps and stopped.work is not None:
                    stopped.work()
                stops += 1
                assert stops < 100
        assert found
        assert stops >= 3
    assert searched.search(X, "a6", text, pay) is False  # known from the same search
    assert not searched._partial


def test_patterns_are_compiled_once_however_many_there_are():
    compile_pattern.__globals__["_compile"].cache_clear()
    for _ in range(3):
        for number in range(1000):
            compile_pattern(f"a.*b{number}")
    assert compile_pattern.__globals__["_compile"].cache_info().misses == 1000


def test_the_largest_pattern_that_is_allowed_can_be_searched():
    pattern = r"\p{L}{16}"
    assert pattern_size(pattern) <= MAX_PATTERN
    assert search(pattern, "x" * 16) is True


def test_the_patterns_of_a_tenant_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr("betrace.service.rules.store.MAX_PATTERNS", 100)
    store = RuleStore(tmp_path)
    store.load()

    def rule(name: str, pattern: str, **more: object) -> Rule:
        condition = f'a.where(x matches "{pattern}")'
        return make_rule({"id": name, "condition": condition, **more})

    assert store.put("t", "one", rule("one", "a{60}"))
    with pytest.raises(RuleLimitError, match="more than 100 RE2 instructions"):
        store.put("t", "two", rule("two", "b{60}"))
    assert store.put("t", "off", rule("off", "b{60}", enabled=False))
    assert store.put("other", "two", rule("two", "b{60}"))
    assert not store.put("t", "one", rule("one", "c{70}"))  # replaces the first
    lines = "\n".join(
        f"  - id: r{n}\n    condition: 'a.where(x matches \"{c}{{60}}\")'"
        for n, c in enumerate("de")
    )
    (tmp_path / "default.yaml").write_text(f"rules:\n{lines}\n")
    store.poll()
    assert [each.id for each in store.rules("default")] == ["r0"]
    assert "rule r1: ignored" in str(store.problems)
