"""Examples in rule files: reading them, running them, and their errors."""

from __future__ import annotations

from typing import Any

import pytest

from betrace.service.rules.definition import Problem, Rule, RuleFileError, etag, make_rule
from betrace.service.rules.examples import MAX_EXAMPLES, flat_spans
from betrace.service.rules.units import unit_warnings
from betrace.service.rules.yaml_file import dump_rules, load_text
from betrace.service.traces.example_runs import check_examples

pytestmark = pytest.mark.kernel

FILE = """\
rules:
  - id: checked
    condition: when { pay.where(amount > 1000) } always { check } never { bypass }
    examples:
      - name: unchecked
        expect: broken
        clause: always
        spans:
          - {name: pay, attributes: {amount: 1500}}
      - expect: kept
        spans: [{name: pay, attributes: {amount: 1500}, children: [check]}]
"""


def rule(condition: str, *examples: dict[str, Any], **more: Any) -> Rule:
    return make_rule({"id": "r", "condition": condition, "examples": [*examples], **more})


def faults(*examples: Any) -> list[Problem]:
    with pytest.raises(RuleFileError) as caught:
        make_rule({"id": "r", "condition": "a", "examples": [*examples]})
    return list(caught.value.problems)


def failing(condition: str, **example: Any) -> str:
    (problem,) = check_examples([rule(condition, example)])
    return problem.message


def test_examples_that_do_what_they_say():
    (loaded,) = load_text(FILE, "x.yaml")
    assert [(each.name, each.expect, each.line) for each in loaded.examples] == [
        ("unchecked", "broken", 5),
        ("example 2", "kept", 10),
    ]
    assert check_examples([loaded]) == []


def test_rules_with_examples_are_written_and_read_again():
    (loaded,) = load_text(FILE, "x.yaml")
    text = dump_rules([loaded])
    assert load_text(text, "x.yaml") == [loaded]
    assert etag(loaded) != etag(make_rule({**loaded.definition(), "examples": []}))
    shadow = make_rule({"id": "s", "condition": "a", "mode": "shadow", "incomplete": "skip"})
    assert load_text(dump_rules([shadow]), "x.yaml") == [shadow]


def test_aliases_in_examples_are_written_out():
    text = "rules: [{id: a, condition: a, examples: [{expect: kept, spans: [&s {name: b}, *s]}]}]"
    (loaded,) = load_text(text, "x.yaml")
    assert load_text(dump_rules([loaded]), "x.yaml") == [loaded]


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ({"expect": "kept", "spans": ["a", "b"]}, "is broken, but should be kept"),
        ({"expect": "broken", "spans": ["b"]}, "is kept, but should be broken"),
        (
            {"expect": "broken", "clause": "always", "spans": ["a", "c"]},
            "breaks 'never', but should break 'always'",
        ),
    ],
)
def test_examples_that_do_not(example, says):
    message = failing("always { a or b } never { a }", name="mine", **example)
    assert message == f"the example 'mine' {says}" or says in message


def test_a_failing_example_is_reported_with_its_place():
    text = FILE.replace("expect: kept", "expect: broken")
    (problem,) = check_examples(load_text(text, "x.yaml"), "x.yaml")
    assert str(problem).startswith("x.yaml:10: rule checked: the example 'example 2' is kept, but")


def test_disabled_rules_are_checked_too():
    made = rule("a", {"expect": "kept", "spans": ["a"]}, enabled=False)
    assert len(check_examples([made])) == 1


def test_too_much_work_is_an_error():
    span = {"name": "a", "times": 50, "attributes": {"x": "ab" * 2000}}
    made = rule('never { a.where(x matches "(a|b)*c") }', {"expect": "kept", "spans": [span]})
    (problem,) = check_examples([made], cpu_seconds=0)
    assert "too much processor time" in problem.message


def test_all_that_a_span_can_have():
    span = {
        "name": "a",
        "attributes": {"t": "x", "i": 7, "d": 0.1, "b": True, "l": ["p", "q"], "m": {"k": 1}},
        "resource": {"region": "eu"},
        "service": "pay",
        "scope": "lib",
        "kind": "client",
        "status": "error",
        "status_message": "no",
        "start_ms": 2.5,
        "duration_ms": 1500,
        "parent_id": "up",
        "events": [{"name": "exception", "attributes": {"type": "T"}, "offset_ms": 3}],
        "links": [{"trace_id": "0af7651916cd43dd8448eb211c80319c", "attributes": {"w": 1}}],
    }
    condition = """
        a.where(t == x and i == 7 and d == 0.1 and b and l contains q and resource.region == eu
            and span:service == pay and span:scope == lib and span:kind == client
            and span:status == error and span:statusMessage == no and span:duration == 1500ms
            and event(event:name == exception and type == T and event:sinceStart == 3ms)
            and link(link:traceId == "0af7651916cd43dd8448eb211c80319c" and w == 1)
            and preceded_by(up within 3ms) and parent(up) and sibling(other))
    """
    spans = [span, {"name": "up", "span_id": "up", "children": ["other"]}]
    assert check_examples([rule(condition, {"expect": "broken", "spans": spans})]) == []


def test_children_and_repeated_spans():
    given = [{"name": "p", "times": 2, "children": [{"name": "c", "times": 2}, "d"]}]
    spans = list(flat_spans(given))
    assert [span["name"] for span in spans] == ["p", "c", "c", "d"] * 2
    assert len({span["span_id"] for span in spans}) == 8
    assert {span["parent_id"] for span in spans[1:4]} == {spans[0]["span_id"]}
    assert {span["parent_id"] for span in spans[5:]} == {spans[4]["span_id"]}


def test_the_same_span_twice_is_one_span():
    twice = [{"name": "a", "span_id": 1}, {"name": "a", "span_id": 1}]
    assert check_examples([rule("count(a) > 1", {"expect": "kept", "spans": twice})]) == []


@pytest.mark.parametrize(
    ("example", "says", "hint", "path"),
    [
        (3, "an example is not a mapping", None, ()),
        ({"spans": ["a"]}, "'expect' of the example is missing", "an example has", ()),
        ({"expect": "brocken", "spans": ["a"]}, "one of broken, kept", "'broken'", ("expect",)),
        ({"expect": "kept", "span": ["a"]}, "unknown key 'span'", "'spans'", ("span",)),
        ({"expect": "kept", "spans": []}, "not a list of at least one span", None, ("spans",)),
        ({"expect": "kept", "clause": "never", "spans": ["a"]}, "no clause", None, ("clause",)),
        ({"expect": "kept", "name": "", "spans": ["a"]}, "'name' is not text", None, ("name",)),
        ({"expect": "kept", "spans": [{}]}, "'name' of the span is", "begin", ("spans", 0)),
        ({"expect": "kept", "spans": [7]}, "a span is not a mapping", None, ("spans", 0)),
        (
            {"expect": "kept", "spans": [{"name": "a", "atributes": {}}]},
            "unknown key 'atributes' of a span",
            "'attributes'",
            ("spans", 0, "atributes"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "attributes": {"x": 2**63}}]},
            "64-bit",
            "text",
            ("spans", 0, "attributes", "x"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "attributes": {"x": float("nan")}}]},
            "finite",
            None,
            ("spans", 0, "attributes", "x"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "attributes": {"x": [{"y": b""}]}}]},
            "no value that a span can have",
            "quotes",
            ("spans", 0, "attributes", "x", 0, "y"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "attributes": {1: 1}}]},
            "not text",
            "quotes",
            ("spans", 0, "attributes"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "kind": "sever"}]},
            "'kind' must be one of",
            "'server'",
            ("spans", 0, "kind"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "start_ms": 1e300}]},
            "at most 1000000000 ms",
            None,
            ("spans", 0, "start_ms"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "events": [{"offset": 1}]}]},
            "unknown key 'offset' of an entry of 'events'",
            "'offset_ms'",
            ("spans", 0, "events", 0, "offset"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "times": 2, "span_id": "x"}]},
            "cannot have a 'span_id'",
            None,
            ("spans", 0, "span_id"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "times": 0}]},
            "'times' must be 1 to 1000",
            None,
            ("spans", 0, "times"),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "times": 500, "children": ["b", "c"]}]},
            "more than 1000 spans",
            None,
            ("spans",),
        ),
        (
            {"expect": "kept", "spans": [{"name": "a", "status_message": "x" * 5000}]},
            "longer than 4096",
            None,
            ("spans", 0, "status_message"),
        ),
    ],
)
def test_errors_of_examples(example, says, hint, path):
    (problem,) = faults(example)
    assert says in problem.message
    assert hint is None or hint in (problem.hint or "")
    assert problem.path == ("examples", 0, *path)


def test_children_nest_to_a_depth():
    span: Any = "a"
    for _ in range(10):
        span = {"name": "a", "children": [span]}
    assert "deeper than 10 levels" in faults({"expect": "kept", "spans": [span]})[0].message


def test_a_rule_has_a_limited_number_of_examples():
    (problem,) = faults(*[{"expect": "kept", "spans": ["b"]}] * (MAX_EXAMPLES + 1))
    assert problem.message == f"'examples' has more than {MAX_EXAMPLES} entries"


def test_examples_are_limited_in_size():
    large = {"name": "a", "attributes": {"x": "x" * 60_000}}
    (problem,) = faults({"expect": "kept", "spans": [large, large]})
    assert problem.message == "'examples' has more than 64 KiB as JSON"
    message = failing("b", expect="kept", spans=[{**large, "times": 100}])
    assert message.endswith("cannot be evaluated: its spans have more than 4 MiB")
    nested: Any = "x"
    for _ in range(2000):
        nested = [nested]
    (problem,) = faults({"expect": "kept", "spans": [{"name": "a", "attributes": {"x": nested}}]})
    assert "deeper than 20 levels" in problem.message


def test_errors_have_their_line_and_column():
    text = FILE.replace("children: [check]", "childen: [check]")
    with pytest.raises(RuleFileError) as caught:
        load_text(text, "x.yaml")
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (11, 57)
    with pytest.raises(RuleFileError) as caught:
        load_text("rules:\n- id: a\n  condition: a\n  examples: [[1]]\n  mode: x\n", "x.yaml")
    assert {each.line for each in caught.value.problems} == {4, 5}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("mode", "shado", "'mode' must be one of alert, shadow"),
        ("incomplete", "skp", "'incomplete' must be one of judge, skip"),
        ("examples", {}, "'examples' is not a list"),
    ],
)
def test_errors_of_the_other_new_keys(key, value, says):
    with pytest.raises(RuleFileError) as caught:
        make_rule({"id": "r", "condition": "a", key: value})
    (problem,) = caught.value.problems
    assert problem.message == says


# Warnings


@pytest.mark.parametrize(
    ("condition", "places"),
    [
        ("a.where(span:duration > 500)", [25]),
        ("a.where(duration > 500)", [20]),
        ("trace:duration >= 2 or trace:duration > 2s", [19]),
        ("never { avg(a, span:duration) + 1ms > 20 }", [39]),
        ("for each a.where(span:duration > 5) as x never { x:duration > 7 and b }", [34, 63]),
        ("when { a before b.where(not (span:duration > 9)) } never { b }", [46]),
        ("never { a.where(count(child(b.where(span:duration > 3))) > 4) }", [53]),
        ("never { a.where(event(event:sinceStart > 70)) }", [42]),
        ("a.where(span:duration > 0)", []),
        ("a.where(span:duration > 500ms and amount > 500)", []),
        ("a.where(span:duration > 2 * .limit)", []),
        ("count(a) > 3", []),
    ],
)
def test_plain_numbers_next_to_durations(condition, places):
    found = unit_warnings([rule(condition)])
    assert [each.syntax.column for each in found if each.syntax is not None] == places
    assert len(found) == len(places)
    assert all(each.hint is not None and "ms" in each.hint for each in found)
