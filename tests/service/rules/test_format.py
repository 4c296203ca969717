"""Canonical text of rules."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from betrace.service.rules.format import format_check, format_condition, format_rule
from betrace.service.rules.parse import parse
from betrace.service.rules.syntax import Exists, RuleSyntax, SpanSet
from tests.support import strategies
from tests.support.relational_strategies import relational_rules


@given(strategies.rules())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_the_text_of_a_rule_parses_to_that_rule(rule: RuleSyntax) -> None:
    text = format_rule(rule)
    assert parse(text) == rule
    assert format_rule(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("never{c}always {b} ", "always { b } never { c }"),
        ("a.where(x>1).where(y)", "a.where(x > 1 and y)"),
        ("payment.amount >= 1e3", "payment.where(amount >= 1000)"),
        ('"a.b"', "a.b"),
        ('"GET /" before "when"', '"GET /" before "when"'),
        ("((a or b) and (c and not (d or e)))", "(a or b) and c and not (d or e)"),
        ("(a and b) or not (not c)", "a and b or not not c"),
        ("3.50<count( a )", "3.5 < count(a)"),
        ('a.where("x y"==USD)', 'a.where("x y" == "USD")'),
        (
            'a.where("resource.x" in ["true",2s,"1500","1500.0"])',
            'a.where("resource.x" in [true, 2s, "1500", "1500.0"])',
        ),
        ('a.where(resource.x matches "1")', 'a.where(resource.x matches "1")'),
        (r'a.where(span:name matches "\d\\.\"x\\\"")', r'a.where(span:name matches "\d\.\"x\\\"")'),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert format_rule(parse(text)) == canonical
    assert parse(canonical) == parse(text)


def test_checks_and_conditions() -> None:
    rule = parse("a.where(x)")
    assert isinstance(rule.never, Exists)
    assert format_check(rule.never.spans) == "a.where(x)"
    assert format_condition(rule.never) == "a.where(x)"
    assert format_check(SpanSet("")) == '""'


@given(relational_rules())
def test_relational_rules_are_parsed_back(text: str) -> None:
    rule = parse(text)
    assert parse(format_rule(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        'for each a.where(.x == "1") by .k, span:id, .resource.env, parent:"name" as p '
        'always { p before b or p:k > 2 } never { "p" }',
        "x.where(.a - (.b - .c) * 2 >= 1.50ms / root:n)",
        "(count(a) + 1) * 2 != sum(x.where(not link()), .n)",
        'x.where(event(event:"name" == "x" and event:resource.y and event:name == .name))',
    ],
)
def test_canonical_text_of_relations_is_itself(text: str) -> None:
    assert format_rule(parse(text)) == text
