"""Where in its text a rule was broken."""

import pytest

from betrace.service.rules.parse import parse
from betrace.service.rules.places import broken_places

PAYMENT = """when   { payment.charge_card.where(amount > 1000) }
always { payment.fraud_check }
never  { payment.bypass_validation }
"""


def broken(condition, clause, counts):
    """The texts of the broken parts."""
    rule = parse(condition)
    return [condition[a:b] for a, b in broken_places(condition, rule, clause, counts)]


def test_the_broken_clause():
    assert broken(PAYMENT, "always", {}) == ["payment.fraud_check"]
    assert broken(PAYMENT, "never", {"payment.bypass_validation": 1}) == [
        "payment.bypass_validation"
    ]


@pytest.mark.parametrize(
    ("condition", "clause", "counts", "parts"),
    [
        ("a and b", "never", {"a": 1, "b": 1}, ["a and b"]),
        ("a or b", "never", {"a": 1}, ["a"]),
        ("a or (b or c)", "never", {"c": 1}, ["c"]),
        ("(a or b)", "never", {"b": 1}, ["b"]),
        ("((a or b))", "never", {"b": 1}, ["b"]),
        ("a or b or a.where(x == 1 or y == 2)", "never", {"b": 1}, ["b"]),
        ("always { a and b and c }", "always", {"a": 1, "c": 1}, ["b"]),
        ("always { (a and b) and (c or d) }", "always", {"a": 1, "b": 1}, ["(c or d)"]),
        ("always { a and (b or c and d) }", "always", {"a": 1}, ["(b or c and d)"]),
        ("always { (a) and not (b and c) }", "always", {"b": 1, "c": 1}, ["(a)", "not (b and c)"]),
        ("always { a } never { b or c }", "never", {"a": 1, "c": 1}, ["c"]),
        ('never { "never {" or b }', "never", {"b": 1}, ["b"]),
        ("never { x.always or b }", "never", {"b": 1}, ["b"]),
        ("# never { x }\nnever { b }", "never", {"b": 1}, ["b"]),
        (
            "for each a by .x as s always { count(s) < 2 and s }",
            "always",
            {},
            ["count(s) < 2 and s"],
        ),
    ],
)
def test_parts(condition, clause, counts, parts):
    assert broken(condition, clause, counts) == parts
