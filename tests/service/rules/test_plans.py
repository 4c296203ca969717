"""How rules are decided, and the sentences about it."""

from __future__ import annotations

import pytest

from betrace.service.rules.parse import parse
from betrace.service.rules.plans import decided_by, plan


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("when { a } always { b.where(x > 1) }", "fold"),
        ("never { a.where(child(b)) }", "skeleton"),
        ("never { a.where(x > 1 and not ancestor(b.where(y == 2))) }", "skeleton"),
        ("never { a.where(count(sibling(b)) > 3 and followed_by(b within 5s)) }", "skeleton"),
        ("for each a as p always { b.where(ancestor(p)) }", "skeleton"),
        ("never { a.where(parent:x == 1) or trace:duration > 1s or root:status == error }",
         "skeleton"),
        ("never { a.where(event(event:name == e) or count(link()) > 3) }", "skeleton"),
        ("for each a by x, span:parentId as p never { count(p.where(y == 1)) > 1 }",
         "values by key"),
        ("for each a as p always { b.where(x == p:x and y == 2) }", "values by key"),
        ("never { a.where(x != .y - .z) }", "values by key"),
        ("never { sum(a, x) > 3 * count(b) or distinct(a, y) > 1 }", "values by key"),
        ("for each a as p always { b.where(x == p:x and y == p:y) }", "read back"),
        ("for each a as p always { b.where(x > p:x) }", "read back"),
        ("for each a as p always { c.where(child(b.where(x == p:x))) }", "read back"),
        ("for each a by x as p never { b.where(ancestor(p)) }", "read back"),
        ("for each a as p never { count(b.where(descendant(p))) > 1 }", "read back"),
        ("for each a as p never { sum(b.where(parent(p)), x) > 1 }", "read back"),
    ],
)  # fmt: skip
def test_the_strategy_follows_from_the_constructs(rule: str, expected: str) -> None:
    assert decided_by(parse(rule)) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("a.where(x > 1)", "decided from counts while the spans arrive"),
        (
            "when { a } never { trace:duration > 2ns or trace:spans >= 7 }",
            "reads a trace back from the span log while it is open and when it closes and judges "
            "its skeleton: names, ids, parents and times (about 5 µs a span), if it has: a, a "
            "duration of at least 3 ns or at least 7 spans",
        ),
        (
            "for each a as p always { b.where(x > p:x) }",
            "reads a trace back from the span log when it closes and judges it span by span "
            "(about 10 µs a span), if it has: a",
        ),
    ],
)
def test_a_plan_says_what_is_read_and_what_it_costs(rule: str, expected: str) -> None:
    assert plan(parse(rule)) == expected
