"""What signals say of a breach."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from betrace.service.rules.format import format_check
from betrace.service.rules.parse import parse
from betrace.service.rules.syntax import RuleSyntax, span_sets
from betrace.service.rules.wording import breach_text
from tests.support import strategies


@pytest.mark.parametrize(
    ("condition", "clause", "counts", "text"),
    [
        ("never { pay }", "never", {"pay": 6}, "forbidden: pay, found 6"),
        (
            "never { count(pay) > 5 }",
            "never",
            {"pay": 6},
            "forbidden: more than 5 pay, found 6",
        ),
        ("never { 5 < count(pay) }", "never", {"pay": 6}, "forbidden: more than 5 pay, found 6"),
        ("never { count(a) != 1 }", "never", {"a": 3}, "required: exactly 1 a, found 3"),
        ("never { not a }", "never", {"a": 0}, "missing: a"),
        (
            "never { a or b or c }",
            "never",
            {"a": 0, "b": 1, "c": 2},
            "forbidden: b, found 1; c, found 2",
        ),
        ("never { a and b }", "never", {"a": 1, "b": 2}, "forbidden: a and b (a: 1, b: 2)"),
        ("never { a before b }", "never", {"a": 1, "b": 2}, "forbidden: a before b (a: 1, b: 2)"),
        ("when { pay } always { check }", "always", {"pay": 1, "check": 0}, "missing: check"),
        ("always { a and b and c }", "always", {"a": 0, "b": 1, "c": 0}, "missing: a, c"),
        (
            "always { a and count(b) >= 2 and not c }",
            "always",
            {"a": 0, "b": 1, "c": 4},
            "missing: a; required: at least 2 b, found 1; forbidden: c, found 4",
        ),
        ("always { count(a) != 2 }", "always", {"a": 2}, "forbidden: exactly 2 a, found 2"),
        ("always { a or b }", "always", {"a": 0, "b": 0}, "required: a or b (a: 0, b: 0)"),
        (
            "always { count(a) == count(b) }",
            "always",
            {"a": 1, "b": 0},
            "required: count(a) == count(b) (a: 1, b: 0)",
        ),
        ("count(pay) > 2", "never", {"pay": 3}, "condition met: more than 2 pay, found 3"),
        (
            "pay and not check",
            "never",
            {"pay": 1, "check": 0},
            "condition met: pay and not check (pay: 1, check: 0)",
        ),
        ("not check", "never", {"check": 0}, "condition met: not check (check: 0)"),
        ("count(a) != 1", "never", {"a": 2}, "condition met: other than 1 a, found 2"),
        # The counts do not tell which alternative is true.
        (
            "never { a before b or b before a or a before c }",
            "never",
            {"a": 1, "b": 1, "c": 0},
            "forbidden: a before b (a: 1, b: 1); b before a (b: 1, a: 1)",
        ),
    ],
)
def test_a_breach_reads_as_a_person_would_say_it(
    condition: str, clause: str, counts: dict[str, int], text: str
) -> None:

    assert breach_text(parse(condition), clause, counts) == text


@given(strategies.rules(), st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_every_rule_can_be_described(rule: RuleSyntax, data: st.DataObject) -> None:
    checks = {
        format_check(spans)
        for node in (rule.when, rule.always, rule.never)
        for spans in span_sets(node)
    }
    counts = {check: data.draw(st.integers(0, 3)) for check in sorted(checks)}
    for clause, node in (("always", rule.always), ("never", rule.never)):
        text = breach_text(rule, clause, counts)
        assert bool(text) is (node is not None)
        assert text.startswith("condition met: ") is (rule.bare and clause == "never")


def test_rules_that_relate_spans_name_the_condition_and_the_groups() -> None:
    example = {"key": {"order_id": "17"}, "spans": ["ab" * 8]}
    groups = {"broken": 2, "of": 7, "examples": [example, {"key": {}, "spans": []}]}
    rule = parse("for each pay by order_id as p never { count(p) > 1 }")
    text = breach_text(rule, "never", {}, groups)
    assert text == "forbidden: count(p) > 1, broken by 2 of 7: order_id 17"
    rule = parse("when { root:name == checkout } always { sum(pay, amount) > 0 }")
    assert breach_text(rule, "always", {}) == "required: sum(pay, .amount) > 0"
    rule = parse("distinct(*, tenant) > 1")
    assert breach_text(rule, "never", {}) == "condition met: distinct(*, .tenant) > 1"
