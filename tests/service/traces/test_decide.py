"""Decisions from counts: three-valued while a trace is open, and early signals are final."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from betrace.service.rules.compile import CompiledRules
from betrace.service.rules.parse import parse
from betrace.service.rules.syntax import (
    And,
    Before,
    CountCompare,
    Exists,
    Not,
    Or,
    RuleSyntax,
    SpanSet,
)
from betrace.service.traces.decide import ALWAYS_BROKEN, NEVER_BROKEN, decide
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import E_CHECK, E_COUNT, E_EVIDENCE, ENTRY_COLUMNS, SLOT_COLUMNS
from tests.support.engine import compiled

pytestmark = pytest.mark.kernel

NAMES = ("a", "b", "c")
OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# A trace as a decision sees it: for each name how many spans it has, and the earliest start.
State = dict[str, tuple[int, int]]


def due(rules: CompiledRules, states: list[State], *, closed: bool) -> DueTraces:
    entries, starts = [], [0]
    for state in states:
        for check, spans in enumerate(rules.checks):
            count, start = state.get(spans.name, (0, 0))
            if count:
                row = [0] * ENTRY_COLUMNS
                row[E_CHECK], row[E_COUNT], row[E_EVIDENCE] = check, count, start
                entries.append(row)
        starts.append(len(entries))
    rows = np.zeros((len(states), SLOT_COLUMNS), np.int64)
    return DueTraces(
        "t",
        rules,
        closed,
        rows,
        np.zeros((len(states), 96), np.uint8),
        np.array(entries, np.int64).reshape(-1, ENTRY_COLUMNS),
        np.array(starts, np.int64),
        [""],
    )


def breaches(rule: RuleSyntax, states: list[State], *, closed: bool, **options: Any) -> list[int]:
    """The clause that each trace breaks, or 0."""
    found = [0] * len(states)
    for breach in decide(due(compiled([rule]), states, closed=closed), **options):
        assert breach.early is not closed
        assert found[breach.trace] == 0, "two signals of one rule for one trace"
        found[breach.trace] = breach.clause
    return found


# The meaning, written down once more


def holds(node: Any, state: State) -> bool:
    match node:
        case Exists(spans):
            return state.get(spans.name, (0, 0))[0] > 0
        case CountCompare(left, op, right):
            sides = [
                state.get(side.name, (0, 0))[0] if isinstance(side, SpanSet) else side
                for side in (left, right)
            ]
            return bool(OPERATORS[op](*sides))
        case Before(first, second):
            one, other = (state.get(s.name, (0, 0)) for s in (first, second))
            return bool(one[0] and other[0] and one[1] < other[1])
        case And(items):
            return all(holds(item, state) for item in items)
        case Or(items):
            return any(holds(item, state) for item in items)
        case Not(item):
            return not holds(item, state)
    raise AssertionError(node)


def grown(count: int, *limits: int | Fraction) -> list[int]:
    """Counts that ``count`` can grow to: the next ones, those around the limits, a huge one."""
    around = [math.floor(limit) + delta for limit in limits for delta in (-1, 0, 1, 2)]
    return sorted({*range(count, count + 3), *(n for n in around if n >= count), 10**301})


def extensions(state: State) -> Iterator[State]:
    """Possible extensions of the trace: more spans of each name, and earlier ones."""
    choices = []
    for name in NAMES:
        count, start = state.get(name, (0, 5))
        more = [(n, begun) for n in (count + 1, count + 2, count + 4) for begun in {start, 0}]
        choices.append([(count, start), *more])
    for combination in itertools.product(*choices):
        yield {name: value for name, value in zip(NAMES, combination, strict=True) if value[0]}


def atom(node: Any, state: State) -> int:
    """Brute force: 2 if it holds in every extension, 0 if in none, else 1. Comparisons of two
    growing counts are unknown until the trace closes, and so is before."""
    match node:
        case Exists(spans):
            name, limit = spans.name, 0
        case CountCompare(SpanSet(name), _, int() | Fraction() as limit):
            pass
        case CountCompare(int() | Fraction() as limit, _, SpanSet(name)):
            pass
        case _:
            return 1
    count, start = state.get(name, (0, 0))
    outcomes = {holds(node, {name: (n, start)}) for n in grown(count, limit)}
    return 1 if len(outcomes) > 1 else 2 * outcomes.pop()


def kleene(node: Any, state: State) -> int:
    match node:
        case And(items):
            return min(kleene(item, state) for item in items)
        case Or(items):
            return max(kleene(item, state) for item in items)
        case Not(item):
            return 2 - kleene(item, state)
    return atom(node, state)


def broken(rule: RuleSyntax, state: State, truth: Any) -> int:
    """The clause that is certainly broken, according to a three-valued ``truth``."""
    if rule.when is not None and truth(rule.when, state) != 2:
        return 0
    if rule.always is not None and truth(rule.always, state) == 0:
        return ALWAYS_BROKEN
    if rule.never is not None and truth(rule.never, state) == 2:
        return NEVER_BROKEN
    return 0


def closed_truth(node: Any, state: State) -> int:
    return 2 * holds(node, state)


# Strategies

sets = st.sampled_from(NAMES).map(SpanSet)
HALVES = [Fraction(n, 2) for n in (-1, 1, 5)]
numbers = st.sampled_from([-1, 0, 1, 2, 3, *HALVES, 10**30, -(10**30)])


@st.composite
def counts(draw: st.DrawFn) -> CountCompare:
    left: Any = draw(sets)
    right: Any = draw(st.one_of(numbers, numbers, sets))
    if draw(st.booleans()):
        left, right = right, left
    return CountCompare(left, draw(st.sampled_from(sorted(OPERATORS))), right)


atoms = st.one_of(sets.map(Exists), counts(), counts(), st.builds(Before, sets, sets))
conditions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        inner.map(Not),
        st.lists(inner, min_size=2, max_size=3).map(lambda x: And(tuple(x))),
        st.lists(inner, min_size=2, max_size=3).map(lambda x: Or(tuple(x))),
    ),
    max_leaves=5,
)
rules = st.one_of(
    st.builds(RuleSyntax, st.none() | conditions, conditions, st.none() | conditions),
    st.builds(RuleSyntax, st.none() | conditions, st.none(), conditions),
)
states = st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(1, 4), st.integers(0, 9)))


@given(rules, st.lists(states, min_size=1, max_size=8))
def test_a_closed_trace_is_decided_as_a_whole(rule, traces):
    expected = [broken(rule, state, closed_truth) for state in traces]
    assert breaches(rule, traces, closed=True, raised_early=False) == expected


@given(rules, states)
@example(parse("count(a) != 1"), {"a": (2, 0)})
@example(parse("always { count(a) < 2 }"), {"a": (2, 0)})
@example(parse("when { a } never { count(b) >= 0 }"), {"a": (1, 0)})
@example(parse("when { not (a and count(a) < -0.5) } never { a }"), {"a": (1, 0)})
def test_an_open_trace_is_decided_by_kleenes_logic(rule, state):
    said = breaches(rule, [state], closed=False)[0]
    expected = broken(rule, state, kleene)
    if not state and said == 0:
        return  # a trace that no check matched is not looked at before it closes
    touched = {s.name for s in compiled([rule]).checks} & set(state)
    assert said == (expected if touched and not vacuous(rule) else 0)


def vacuous(rule: RuleSyntax) -> bool:
    """Whether even a trace without any span certainly breaks it."""
    return broken(rule, {}, kleene) != 0


@given(rules, states)
def test_early_signals_are_never_wrong(rule, state):
    if breaches(rule, [state], closed=False)[0]:
        for extended in extensions(state):
            assert broken(rule, extended, closed_truth), extended


@given(rules, st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 9)), max_size=8))
def test_each_breach_is_signalled_once(rule, arrivals):
    """Span by span: a breach raised early is not raised at the close, and none is missed."""
    table = compiled([rule])
    values, starts = table.thresholds
    state: State = {}
    early = 0
    for name, start in arrivals:
        count, earliest = state.get(name, (0, start))
        state = state | {name: (count + 1, min(start, earliest))}
        crossed = any(
            spans.name == name and count + 1 in values[starts[c] : starts[c + 1]]
            for c, spans in enumerate(table.checks)
        )
        if crossed and not early:
            early = breaches(rule, [state], closed=False)[0]
        elif not early:
            assert breaches(rule, [state], closed=False)[0] == 0, "no threshold was crossed"
    late = breaches(rule, [state], closed=True)[0]
    assert (early or late) == broken(rule, state, closed_truth) or early
    assert bool(early or late) is bool(broken(rule, state, closed_truth))
    assert not (early and late)


def test_a_rule_that_every_trace_breaks_is_signalled_once():
    """It is certain from the beginning and raised at the close, but not also when another rule's
    count makes an early decision worthwhile."""
    table = compiled([parse("never { count(a) >= 0 }"), parse("never { count(a) > 1 }")])
    state = {"a": (2, 0)}
    early = decide(due(table, [state], closed=False))
    late = decide(due(table, [state], closed=True))
    assert sorted(b.rule for b in [*early, *late]) == [0, 1]


@given(st.lists(states, max_size=40), st.integers(1, 60))
def test_many_traces_and_rules_at_once(traces, n_rules):
    """Even if the breaches do not fit into one call of the kernel."""
    conditions_ = ["count(a) > 1", "not b", "a before b", "always { c }", "count(a) == count(b)"]
    rule_list = [parse(conditions_[i % 5]) for i in range(n_rules)]
    found = decide(due(compiled(rule_list), traces, closed=True), raised_early=False)
    assert {(b.trace, b.rule): b.clause for b in found} == {
        (k, r): clause
        for k, state in enumerate(traces)
        for r, rule in enumerate(rule_list)
        if (clause := broken(rule, state, closed_truth))
    }
    assert len(found) == len({(b.trace, b.rule) for b in found})


def test_more_breaches_than_fit_into_one_call():
    rule_list = [parse("always { x }")] * 700
    found = decide(due(compiled(rule_list), [{}] * 5, closed=True))
    assert sorted((b.trace, b.rule) for b in found) == [
        (k, r) for k in range(5) for r in range(700)
    ]


def test_nothing_to_decide():
    assert decide(due(compiled([]), [{}], closed=True)) == []
    assert decide(due(compiled([parse("a")]), [], closed=True)) == []


def test_the_deepest_rule_fits_the_stack():
    text = "a"
    for depth in range(31):
        text = f"({text} {'and' if depth % 2 else 'or'} not b)"
    assert breaches(parse(text), [{"a": (1, 0)}], closed=True, raised_early=False) == [NEVER_BROKEN]
