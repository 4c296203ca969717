"""The rule language: syntax trees of valid rules, and error messages of invalid ones."""

from __future__ import annotations

import json
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.rules.errors import KEYWORDS, RuleSyntaxError
from betrace.service.rules.parse import MAX_TEXT_BYTES, parse
from betrace.service.rules.syntax import (
    FIELDS,
    And,
    Attribute,
    Before,
    Compare,
    Comparison,
    Constant,
    CountCompare,
    Exists,
    Literal,
    Not,
    Or,
    Ref,
    RuleSyntax,
    Scope,
    SpanSet,
    Truthy,
)

CASES = Path(__file__).parents[3] / "../shared/cases"


def condition(text: str) -> Any:
    rule = parse(text)
    assert rule.bare
    return rule.never


def predicate(text: str) -> Any:
    node = condition(f"x.where({text})")
    assert isinstance(node, Exists)
    return node.spans.where


def literal(text: str) -> Literal:
    return predicate(f"a == {text}").literals[0]


def rejected(text: str) -> RuleSyntaxError:
    with pytest.raises(RuleSyntaxError) as caught:
        parse(text)
    return caught.value


def attempt(text: str) -> RuleSyntaxError | None:
    try:
        parse(text)
    except RuleSyntaxError as error:
        return error
    return None


def any_attribute(name: str) -> Attribute:
    return Attribute(Scope.ANY, name)


def exists(name: str) -> Exists:
    return Exists(SpanSet(name))


@pytest.mark.parametrize("name", ["rules-parse.json", "rules3-parse.json"])
def test_shared_cases(name: str) -> None:
    if not (CASES / name).exists():
        pytest.skip("the shared cases are not next to the repository")
    cases = json.loads((CASES / name).read_text())["cases"]
    assert [case for case in cases if (attempt(case["rule"]) is None) != case["valid"]] == []


# Clauses


def test_the_clauses() -> None:
    a, b, c = exists("a"), exists("b"), exists("c")
    assert parse("when {a} always {b} never {c}") == RuleSyntax(a, b, c)
    assert parse("when {a} never {c} always {b}") == RuleSyntax(a, b, c)
    assert parse("when {a} always {b}") == RuleSyntax(a, b, None)
    assert parse("when {a} never {c}") == RuleSyntax(a, None, c)
    assert parse("always {b}") == RuleSyntax(None, b, None)
    assert parse("never {c} always {b}") == RuleSyntax(None, b, c)
    assert parse("c") == RuleSyntax(None, None, c, bare=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n // nothing\n",
        "when {a}",
        "always {a} when {b}",
        "always {a} always {b}",
        "when {a} always {b} never {c} never {d}",
        "a always {b}",
        "when {} always {b}",
        "when {a; b} always {c}",
        "{a}",
    ],
)
def test_misplaced_clauses_are_rejected(text: str) -> None:
    rejected(text)


# Conditions


def test_precedence_and_flattening() -> None:
    a, b, c, d = (exists(name) for name in "abcd")
    assert condition("a or b and not c or d") == Or((a, And((b, Not(c))), d))
    assert condition("not a and b") == And((Not(a), b))
    assert condition("not (a and b)") == Not(And((a, b)))
    assert condition("(a and b) and (c and (d))") == And((a, b, c, d))
    assert condition("a or (b or (c or d))") == Or((a, b, c, d))
    assert condition("(a or b) and c") == And((Or((a, b)), c))
    assert condition("not not a") == Not(Not(a))


def test_counts() -> None:
    a = SpanSet("a")
    assert condition("count(a) >= 3") == CountCompare(a, ">=", 3)
    assert condition("3 < count(a)") == CountCompare(3, "<", a)
    assert condition("count(a) != count(*)") == CountCompare(a, "!=", SpanSet("*"))
    assert condition("count(a) > -1.5e1") == CountCompare(a, ">", -15.0)
    assert condition("not count(a) == 0") == Not(CountCompare(a, "==", 0))


def test_before_takes_filters() -> None:
    assert condition("a.where(x) before b.c") == Before(
        SpanSet("a", Truthy(any_attribute("x"))), SpanSet("b.c")
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("db.*", "db.*"),
        ("*", "*"),
        ("*.retry", "*.retry"),
        ("a*b.*c-d", "a*b.*c-d"),
        ('"GET /cart"', "GET /cart"),
        ('"GET *"', "GET *"),
        ('"when"', "when"),
        ('"a\\"b\\\\c\\d"', 'a"b\\c\\d'),
        ("a . b // comment\n . c", "a.b.c"),
        ("whenever.counted.android", "whenever.counted.android"),
        ("span.resource", "span.resource"),
        ("_-9", "_-9"),
    ],
)
def test_span_names(text: str, name: str) -> None:
    assert condition(text) == exists(name)


def test_direct_comparison_takes_the_last_segment_as_the_attribute() -> None:
    def direct(text: str) -> tuple[str, Attribute]:
        spans = condition(text).spans
        return spans.name, spans.where.attribute

    assert direct("payment.card.amount > 1") == ("payment.card", any_attribute("amount"))
    assert direct("db.*.rows in [1, 2]") == ("db.*", any_attribute("rows"))
    assert direct('"GET /".status matches "^5"') == ("GET /", any_attribute("status"))
    assert direct('a."http.status" contains x') == ("a", any_attribute("http.status"))
    assert direct('"a b"."c d" == 1') == ("a b", any_attribute("c d"))
    # "resource." has no special meaning here: it is part of the span's name.
    assert direct("resource.pod == x") == ("resource", any_attribute("pod"))
    assert direct("a.resource.pod == x") == ("a.resource", any_attribute("pod"))


# Predicates


def test_attributes() -> None:
    assert predicate("a.b-c") == Truthy(any_attribute("a.b-c"))
    assert predicate('"a.b c"') == Truthy(any_attribute("a.b c"))
    assert predicate('"count"') == Truthy(any_attribute("count"))
    assert predicate("resource.k8s.pod") == Truthy(Attribute(Scope.RESOURCE, "k8s.pod"))
    assert predicate("resource") == Truthy(any_attribute("resource"))
    assert predicate('"resource.x"') == Truthy(any_attribute("resource.x"))
    assert predicate('"span:name"') == Truthy(any_attribute("span:name"))
    for field in FIELDS:
        assert predicate(f"span:{field}") == Truthy(Attribute(Scope.FIELD, field))


def test_chained_filters_are_one_conjunction() -> None:
    a, b, c = (Truthy(any_attribute(name)) for name in "abc")
    assert condition("x.where(a).where(b and c)").spans.where == And((a, b, c))
    assert condition("x.where(a or b).where(c)").spans.where == And((Or((a, b)), c))
    assert condition('"x y".where(not (a and b))').spans.where == Not(And((a, b)))


@pytest.mark.parametrize("op", ["==", "!=", "<", "<=", ">", ">=", "contains"])
def test_comparisons(op: str) -> None:
    attribute = any_attribute("a")
    assert predicate(f"a {op} 1") == Compare(attribute, op, (Literal("1", 1),))
    assert predicate(f'a {op}"1"') == Compare(attribute, op, (Literal("1", None),))


def test_in_and_matches() -> None:
    assert predicate("a in [x]") == Compare(any_attribute("a"), "in", (Literal("x", None),))
    assert predicate('a in ["x", 2, 3s, true, y.z]').literals == (
        Literal("x", None),
        Literal("2", 2),
        Literal("3s", 3 * 10**9),
        Literal("true", None),
        Literal("y.z", None),
    )
    pattern = predicate(r'a matches "v\d+\\.\"y"')
    assert pattern == Compare(any_attribute("a"), "matches", (Literal('v\\d+\\."y', None),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", Literal("1000", 1000)),
        ("-7", Literal("-7", -7)),
        ("0.50", Literal("0.5", Fraction(1, 2))),
        ("1e3", Literal("1000", 1000)),
        ("2.50E-1", Literal("0.25", Fraction(1, 4))),
        ("9007199254740993", Literal("9007199254740993", 2**53 + 1)),
        ('"1500"', Literal("1500", None)),
        ('"1500.0"', Literal("1500.0", None)),
        ('"2s"', Literal("2s", None)),
        ('"a\nb\0"', Literal("a\nb\0", None)),
        ('"# no // comment"', Literal("# no // comment", None)),
        ('""', Literal("", None)),
        ("true", Literal("true", None)),
        ("false", Literal("false", None)),
        ("USD", Literal("USD", None)),
        ("a.b", Literal("a.b", None)),
        ("5ns", Literal("5ns", 5)),
        ("5us", Literal("5us", 5000)),
        ("0.1ms", Literal("0.1ms", 100_000)),
        ("1.5s", Literal("1.5s", 1_500_000_000)),
        ("2m", Literal("2m", 120 * 10**9)),
        ("-1e0h", Literal("-1e0h", -3600 * 10**9)),
        ("0.5ns", Literal("0.5ns", Fraction(1, 2))),
        ("1e-999s", Literal("1e-999s", 0)),
    ],
)
def test_values(text: str, expected: Literal) -> None:
    value = literal(text)
    assert value == expected
    assert type(value.number) is type(expected.number)


@pytest.mark.parametrize("keyword", sorted(KEYWORDS - {"where"}))
def test_keywords_are_names_only_in_quotes_and_after_a_dot(keyword: str) -> None:
    assert condition(f'"{keyword}"') == exists(keyword)
    assert predicate(f'"{keyword}" == "{keyword}"').attribute.name == keyword
    rejected(keyword)
    assert condition(f"a.{keyword}") == exists(f"a.{keyword}")
    rejected(f"a.where({keyword} == 1)")
    if keyword not in ("true", "false"):
        rejected(f"a.where(x == {keyword})")


def test_a_rule_without_relations_has_the_nodes_of_old() -> None:
    """They decide the versions of checks in checkpoints."""
    texts = ("sum.where(sum > 1) before max", "(count(a) > 1) and retry.count > 3", "for and each")
    assert not any(parse(text).relational for text in texts)
    rule = parse("x.where(a > 0.1)", relational=True)
    assert rule.relational
    assert rule.never == Exists(
        SpanSet(
            "x", Comparison(Ref("", any_attribute("a")), ">", (Constant(Fraction(1, 10), "0.1"),))
        )
    )


def test_for_each_binds_a_word() -> None:
    rule = parse('for each a by k, span:id as b never { b or "b" }')
    assert rule.for_each is not None
    key = Ref("", any_attribute("k"))
    assert rule.for_each.by == (key, Ref("", Attribute(Scope.FIELD, "id")))
    assert rule.never == Or((Exists(SpanSet("b", bound=True)), Exists(SpanSet("b"))))


def test_relations_count_as_levels() -> None:
    def rule(levels: int) -> str:
        return "x.where(" + "child(x.where(" * levels + "a" + "))" * levels + ")"

    assert parse(rule(32))
    assert "32 levels" in rejected(rule(33)).message
    assert "32 levels" in rejected(f"for each x as y never {{ {rule(32)} }}").message


def test_long_sums_are_flat() -> None:
    assert parse("count(a)" + " + count(a)" * 1000 + " > 3")


def test_comments_and_layout() -> None:
    text = "# first\nwhen{a}// second { \r\n\talways\n{ b.where ( x>1 )#third\n}"
    rule = parse(text)
    assert rule.when == exists("a")
    assert rule.always == Exists(SpanSet("b", Compare(any_attribute("x"), ">", (Literal("1", 1),))))


# Limits


def test_size_limit() -> None:
    assert condition("a" * MAX_TEXT_BYTES) == exists("a" * MAX_TEXT_BYTES)
    error = rejected('"' + "ä" * (MAX_TEXT_BYTES // 2) + '"')
    assert "16384" in error.message
    assert error.column == 8193


def nested(levels: int) -> str:
    return "a and (b or " * levels + "c" + ")" * levels


def test_depth_limit() -> None:
    assert parse(nested(32))
    assert "32 levels" in rejected(nested(33)).message
    assert parse("not " * 32 + "a")
    error = rejected("not " * 33 + "a")
    assert "32 levels" in error.message
    assert error.line == 1
    assert error.column == 33 * 4 + 1
    assert parse("not (" * 32 + "a" + ")" * 32)
    rejected("not (" * 33 + "a" + ")" * 33)


def test_levels_count_through_where() -> None:
    def rule(inner: int) -> str:
        return "not " * 16 + "x.where(" + "not " * inner + "y)"

    assert parse(rule(16))
    rejected(rule(17))
    assert parse("not " * 31 + "x.where(a or b).where(c)")
    rejected("not " * 32 + "x.where(a or b).where(c)")


def test_needless_parentheses_do_not_count_as_levels() -> None:
    assert condition("(" * 100 + "a" + ")" * 100) == exists("a")
    assert condition("(" * 100 + "a" + " and a)" * 100) == And((exists("a"),) * 101)
    assert "brackets" in rejected("(" * 129 + "a" + ")" * 129).message


def test_limit_on_distinct_checks() -> None:
    names = [f"a{i}" for i in range(256)]
    assert parse(" and ".join([*names, *names]))
    error = rejected("when {" + " or\n".join(names) + "}\nalways { count(b) > 1 }")
    assert "256" in error.message
    assert (error.line, error.column) == (257, 16)


def test_pattern_limits() -> None:
    assert "too large" in rejected(r'a.where(x matches "\p{L}{500}")').message
    many = " or ".join(f'x matches "{i}\\\\p{{L}}{{40}}"' for i in range(5))
    assert "too large" in rejected(f"a.where({many})").message


HOSTILE = [
    "(" * MAX_TEXT_BYTES,
    "[" * MAX_TEXT_BYTES,
    "{" * MAX_TEXT_BYTES,
    "(" * 8000 + "a" + ")" * 8000,
    "a and (" * 2000,
    "not " * 4095 + "a",
    "a.where(" * 2000,
    "a" + ".where(b)" * 1800,
    ".".join("a" * 8000),
    "a and " * 2700 + "a",
    "a.where(x in [" + "1," * 8000 + "1])",
    '"' + "\\" * 16000,
    '"' + '\\"' * 8000,
    "a.where(x == " + "1" * 16000 + ")",
    "a.where(x == 1e-999999999999h)",
    "a.where(x == 1e999999999999h)",
    'a.where(x matches "' + "(" * 8000 + ")" * 8000 + '")',
    'a.where(x matches "(.+)+$")',
    "#" * MAX_TEXT_BYTES,
    "\n" * (MAX_TEXT_BYTES - 1) + "(",
    "-" * MAX_TEXT_BYTES,
    "a." * 8000,
    "\ud800",
    'a.where(x == "\udfff")',
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_rejected_quickly(text: str) -> None:
    start = time.process_time()
    error = attempt(text)
    assert time.process_time() - start < 1.5
    assert error is None or len(str(error)) < 1000


def test_threads_can_parse_at_the_same_time() -> None:
    texts = [f"when {{ a{i}.where(x > {i}) }} always {{ count(b{i}) == {i} }}" for i in range(40)]
    expected = [parse(text) for text in texts]
    wrong: list[str] = []

    def work() -> None:
        for text, rule in zip(texts, expected, strict=True):
            if parse(text) != rule:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


WORDS = st.sampled_from(
    [
        *sorted(KEYWORDS),
        *"(){}[],.*=<>!&|'\"#/-+:\\ \n\x00ä",
        "==",
        ">=",
        "a",
        "b.c",
        "x*",
        "1",
        "-2.5",
        "3ms",
        "1e9",
        '"s"',
        "span:",
        "span:name",
        "resource.x",
        ".where(",
        "count(",
        "1x",
    ]
)


@given(st.lists(WORDS, max_size=30).map(" ".join) | st.lists(WORDS).map("".join) | st.text())
def test_any_text_is_a_rule_or_an_error_with_a_location_in_it(text: str) -> None:
    error = attempt(text)
    if error is not None:
        lines = text.split("\n")
        assert 1 <= error.line <= len(lines)
        assert 1 <= error.column <= len(lines[error.line - 1]) + 1
        assert error.message
        assert str(error).startswith(f"line {error.line}, column {error.column}: {error.message}")


# Errors


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        ("a && b", 3, "found '&&'", "use 'and'"),
        ("a || b", 3, "found '||'", "use 'or'"),
        ("!a", 1, "found '!'", "use 'not'"),
        ("a.where(x = 3)", 11, "found '='", "use '=='"),
        ("a.where(x => 3)", 11, "found '=>'", "use '>='"),
        ("a.where(x <> 3)", 12, "found '>', expected a value", "use '!='"),
        ("a.where(x =~ y)", 11, "found '=~'", "use 'matches'"),
        ("payment > 3", 1, "span name payment itself", "count(payment) > 3"),
        ("payment == x", 1, "span name payment itself", "payment.where(attribute == x)"),
        ("payment in [1]", 1, "span name payment itself", "payment.where(attribute in [ … ])"),
        ('"GET /" > 3', 9, "found '>'", "count(…) > 3"),
        ("a.where(b) > 3", 12, "found '>'", "count(…) > 3"),
        ("a.where(b).c > 3", 12, "found 'c', expected 'where'", "another .where("),
        ("when { a }", 11, "found the end of the rule, expected 'always' or 'never'", "add always"),
        ("when { a } alwys { b }", 12, "found 'alwys'", "did you mean 'always'?"),
        ("whn { a } always { b }", 5, "found '{'", "did you mean 'when'?"),
        ("if { a } always { b }", 4, "found '{'", "did you mean 'when'?"),
        ("a AND b", 3, "found 'AND'", "'and'? (keywords are in lower case)"),
        ("NOT a", 5, "found 'a'", "'not'? (keywords are in lower case)"),
        ("Count(a) > 3", 6, "found '('", "'count'? (keywords are in lower case)"),
        ("a.wher(x)", 7, "found '('", "did you mean 'where'?"),
        ("a.where(x imatches y)", 11, "found 'imatches'", "did you mean 'matches'?"),
        ("a.where(x is 3)", 11, "found 'is'", "did you mean '=='?"),
        ("a.where(x like y)", 11, "found 'like'", "did you mean 'matches'?"),
        ("when a always b", 6, "found 'a', expected '{'", "when { … }"),
        ("a b", 3, "found 'b'", "join conditions with 'and' or 'or'"),
        ("a, b", 2, "found ','", "join conditions with 'and' or 'or'"),
        ("a.where(x == U S)", 16, "found 'S'", "in double quotes"),
        ("a.where", 8, "found the end of the rule, expected '('", "payment.where("),
        ("a.where x", 9, "found 'x', expected '('", "payment.where("),
        ("a.where(b.where(c))", 11, "found the keyword 'where'", "cannot be inside another where"),
        ("count a > 3", 7, "found 'a', expected '('", "count(payment)"),
        ("count(a > 3", 9, "found '>', expected ')'", "'(' at line 1, column 6 is not closed"),
        ("when { a always { b }", 10, "found the keyword 'always'", "'{' at line 1, column 6"),
        ("when { (a } always { b }", 11, "found '}'", "'(' at line 1, column 8"),
        ("(a", 3, "found the end of the rule", "'(' at line 1, column 1"),
        ("a) and b", 2, "found ')'", "no open '(' before it"),
        ("when { } always { b }", 8, "found '}', expected a condition", "leave the clause out"),
        ("a always { b }", 3, "found the keyword 'always'", "every condition is in one"),
        ("always {a} when {b}", 12, "found the keyword 'when'", "optional when { … }"),
        ("3 > 5", 1, "found two numbers", "count(payment) > 5"),
        ("3 > a", 5, "found 'a', expected count(…) or a number", "count(a)"),
        ("count(a) > 5s", 12, "found '5s'", "numbers without a unit"),
        ("a.where(count(x) > 3)", 15, "found 'x', expected child(…)", "cannot be inside where"),
        ("a.where(span:nme == x)", 14, "found span:nme", "did you mean 'span:name'?"),
        ("a.where(span:foo == x)", 14, "span:statusMessage", "without 'span:'"),
        ("a.span:name == x", 3, "found 'span:'", "payment.where(span:duration > 1s)"),
        ("a.where(resource:x)", 9, "found 'resource:'", "resource.x"),
        ("before", 1, "found the keyword 'before'", '"before"'),
        ("a.9b", 3, "malformed number", "in double quotes"),
        ("a.9", 3, "found '9'", "in double quotes"),
        ("a.where(x > 5d)", 13, "malformed number", "ns us ms s m h"),
        ("a.where(x* > 3)", 9, "an attribute cannot have wildcards", "in quotes"),
        ("a.b* > 3", 3, "an attribute cannot have wildcards", "in quotes"),
        ("a.where(x == b*)", 14, "a value cannot have wildcards", "in quotes"),
        ("a.where(x in y)", 14, "found 'y', expected '['", "in brackets"),
        ("a.where(x matches y)", 19, "expected a string in double quotes", "double quotes"),
        ('a.where(x matches "(")', 19, "does not compile: missing )", "RE2"),
        ('a.where(x matches "(?=b)")', 19, "does not compile", "look-around"),
        ("a.where(x == 1e999)", 14, "too large", "1.8e308"),
        ("a.where(x == 'b')", 14, 'found "\'"', "double quotes"),
        ("a.where(x == “b”)", 14, "found '“'", "plain double quote"),
        ('a.where(x == "b)', 14, "not closed", "end it with"),
        ("a.where(x - y > 3)", 11, "found '-'", "write .x"),
        ("käse", 2, "found 'ä'", "in double quotes"),
        ("a\u00a0and b", 2, "U+00A0", "plain space"),
        ("", 1, "the rule is empty", "write when"),
    ],
)
def test_errors_have_a_location_a_message_and_a_hint(
    text: str, column: int, message: str, hint: str
) -> None:
    error = rejected(text)
    assert message in error.message
    assert hint in (error.hint or "")
    assert (error.line, error.column) == (1, column)


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        (".amount > 3", 1, "found '.'", "in where only"),
        ("count(x) > .limit", 12, "found '.'", "in where only"),
        ("parent:x == 3", 1, "no parent", "use it in where"),
        ("x.where(a == chrg:a)", 14, "found 'chrg:'", "bind it: for each payment as chrg"),
        ("for each a as charge never { x.where(b == chrg:b) }", 43, "'chrg:'", "'charge:'?"),
        ("when { b } for each a as b never { c }", 8, "'when' does not know", 'write "b"'),
        ("when { b:x } for each a as b never { c }", 8, "'when' does not know", "always or never"),
        ("for each a.where(x == b:x) as b never { c }", 23, "'b:'", "only in always and never"),
        ("for each a by k as p never { p:j == 1 }", 30, "only what stands after 'by': k", "add it"),
        ("event:name == x", 1, "only inside event(…)", "event(event:… == …)"),
        ("trace:span > 3", 7, "found trace:span", "did you mean 'trace:spans'?"),
        ("trace:tenant == a", 7, "found trace:tenant", "use root:"),
        ("x.where(span:parentID == a)", 14, "span:parentID", "did you mean 'span:parentId'?"),
        ("exists(amount)", 8, "has no span of its own", "name the spans"),
        ("x.where(count(y) > 3)", 15, "found 'y'", "count(child(…))"),
        ("x.where(max(y, z) > 3)", 9, "found 'max'", "of the whole trace"),
        ("sum(x) > 3", 6, "found ')', expected ','", ""),
        ("sum(x, y)", 1, "found the number sum(x, y)", "compare it: sum(x, y) > 3"),
        ("sum(x, y + z) > 3", 10, "found '+'", ""),
        ("median(x, y) > 3", 7, "found '('", "there is no function 'median'"),
        ("chld(x)", 5, "found '('", "did you mean 'child'?"),
        ("avg(x, y) in [1]", 11, "found 'in' after a number", "attributes and fields"),
        ("never { child(x) }", 9, "found 'child'", "payment.where(child(…))"),
        ("count(child(x)) > 3", 7, "found 'child'", "payment.where(count(child(…)) > 3)"),
        ("x.where(count(ancestor(y)) > 2)", 15, "cannot be counted", "child, descendant"),
        ("x.where(followed_by(y within 5))", 30, "expected a duration", "within takes a duration"),
        ("x.where(followed_by(y within 0s))", 30, "within 0 or less", "positive duration"),
        ("x.where(child(y within 5s))", 17, "found 'within'", "inside followed_by(…)"),
        ("for a as p always { b }", 5, "found 'a'", "for each payment as p"),
        ("for each a always { b }", 12, "expected 'as' or 'by'", ""),
        ("for each a as root always { b }", 15, "'root' cannot be bound", "another word"),
        ("for each a as b for each c as d never { e }", 17, "found 'for'", "one 'for each'"),
        ("x.where(amount + 1 > .limit)", 16, "found '+'", "write .amount"),
        ("x.where(5 < amount)", 13, "which is text here", "write .amount"),
        ("count(x) > limit", 12, "found 'limit'", "count(limit)"),
        ("x.where(.a -1 > 0)", 12, "found '-1'", "spaces around '-'"),
        ("x.where(.a/.b > 0)", 11, "found '/'", "spaces around '/'"),
        ("x.where(.a + .b)", 10, "found the number .a + .b", "compare it"),
        ("x.where(parent:)", 16, "found ')', expected a name", "after the colon"),
        ("x.where((.a or .b) + 1 > 2)", 11, "found a condition, expected a number", ""),
    ],
)
def test_errors_of_relations(text: str, column: int, message: str, hint: str) -> None:
    error = rejected(text)
    assert message in error.message
    assert hint in (error.hint or "")
    assert (error.line, error.column) == (1, column)


def test_an_error_shows_its_line_with_a_caret() -> None:
    error = rejected("when { a }\r\nalways {\n\tpayment && b\n}")
    assert str(error) == (
        "line 3, column 10: found '&&', which is not part of the language\n"
        "  \tpayment && b\n"
        "  \t        ^\n"
        "  hint: use 'and'"
    )
    assert error.to_json() == {
        "line": 3,
        "column": 10,
        "message": "found '&&', which is not part of the language",
        "hint": "use 'and'",
    }


def test_an_error_without_a_hint_ends_with_the_caret() -> None:
    assert str(rejected("a and")).endswith("expected a condition\n  a and\n       ^")


def test_a_long_line_is_shortened() -> None:
    error = rejected("a and " * 100 + "\0 " + "or b" * 100)
    line, caret = error.excerpt().split("\n")
    assert line.startswith("…")
    assert line.endswith("…")
    assert len(line) == 102
    assert line[len(caret) - 1] == "\ufffd"
