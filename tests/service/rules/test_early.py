"""Early verdicts are those of every larger trace, and the commonest rules have them."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from betrace.service.rules.early import early
from betrace.service.rules.format import format_rule
from betrace.service.rules.least import least
from betrace.service.rules.parse import parse
from betrace.service.rules.relations import judge
from tests.support import relations_oracle
from tests.support.relational_strategies import case_traces, relational_rules
from tests.support.trace_spans import case_trace


@given(relational_rules(), case_traces(), st.integers(0, 2**32))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_what_was_decided_early_stays(rule, spans, seed):
    syntax = parse(rule, relational=True)
    before = early(syntax)
    if before is None:
        return
    rng = random.Random(seed)
    some = rng.sample(spans, rng.randint(1, len(spans)))
    if judge(before, case_trace(some)).clause:
        assert relations_oracle.breaks(syntax, spans)


@given(relational_rules(), case_traces())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_trace_that_breaks_a_rule_has_what_it_takes_at_least(rule, spans):
    syntax = parse(rule, relational=True)
    if relations_oracle.breaks(syntax, spans):
        duration = case_trace(spans).duration
        assert any(len(spans) >= n.spans and duration >= n.duration for n in least(syntax))


@pytest.mark.parametrize(
    "rule",
    [
        "never { a.where(n > .m) }",
        "never { a.where(event(event:name == e)) }",
        "for each a by k as q never { count(q) > 20 }",
        "for each a as q never { b.where(k == q:k) }",
        "never { a.where(count(child(b)) > 10) }",
        "never { distinct(*, k) > 1 or max(a, n) >= 5 or min(a, n) < 0 }",
        "when { a } never { trace:duration > 2s }",
        "never { a.where(followed_by(b within 1s)) }",
    ],
)
def test_these_rules_are_decided_early(rule):
    assert early(parse(rule)) == parse(rule)


@pytest.mark.parametrize(
    ("rule", "stronger"),
    [
        ("never { a.where(not (count(child(b)) <= 9)) }", "never { a.where(count(child(b)) > 9) }"),
        ("when { a } always { count(a.where(parent(b))) < 3 } never { sum(a, n) > 3 }",
         "when { a } always { not (count(a.where(parent(b))) >= 3) }"),
        ("never { a.where(parent(b) and not child(b)) or count(a.where(n == .m)) > 3 }",
         "never { count(a.where(n == .m)) > 3 }"),
    ],
)  # fmt: skip
def test_these_rules_are_decided_early_in_part(rule, stronger):
    assert format_rule(early(parse(rule))) == format_rule(parse(stronger))


@pytest.mark.parametrize(
    "rule",
    [
        "never { a.where(not parent(b)) }",
        "for each a as q always { b.where(k == q:k) }",
        "never { sum(a, n) > 3 }",
        "never { a.where(parent:n > 3) }",
        "when { root:name == a } never { b.where(n > .m) }",
        "for each a by n as q never { q:n != 5 and count(q) > 1 }",
        "never { a.where(not followed_by(b)) }",
        "never { avg(a, n) > 1 }",
    ],
)
def test_these_rules_wait_until_the_trace_closes(rule):
    assert early(parse(rule)) is None


@pytest.mark.parametrize(
    ("rule", "needed"),
    [
        ("never { a.where(count(child(b)) > 50) }", [(52, 0)]),
        ("for each a by k as q never { count(q) > 20 }", [(21, 0)]),
        (
            "when { a } never { trace:duration > 2ns or trace:spans >= 7 }",
            [(1, 3), (7, 0)],
        ),
        ("never { trace:duration > 2ns or trace:spans >= 7 or count(a) > 8 }", [(0, 3), (7, 0)]),
        ("never { (trace:spans > 1 or trace:duration > 5ns) and count(a) > 2 }", [(3, 0)]),
        ("when { a } never { trace:duration > 2s }", [(1, 2_000_000_001)]),
        ("never { not (count(a) < 5) and a.where(exists(parent:x)) }", [(5, 0)]),
        ("always { a.where(parent(b)) }", [(0, 0)]),
    ],
)
def test_the_least_spans_and_duration(rule, needed):
    assert list(least(parse(rule))) == needed


def test_many_alternatives_are_joined():
    each = " or ".join(f"(trace:spans > {n} and trace:duration > {100 - n}ns)" for n in range(20))
    assert list(least(parse(f"never {{ {each} }}"))) == [(1, 82)]
