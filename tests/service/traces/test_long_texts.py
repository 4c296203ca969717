"""Rules whose verdicts depend on texts that are too long to be searched are undecided."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examined
from hypothesis import strategies as st

from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.compile import EQ, FALSE, GE, GT, LE, LT, NE, TRUE, UNKNOWN
from betrace.service.rules.parse import parse
from betrace.service.rules.patterns import MATCH_BYTES, match_bytes, set_match_bytes
from betrace.service.signals import Kind
from betrace.service.traces.decide import O_UNDECIDED, _between, _count_count
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import decide_due
from tests.support.engine import Engine, compiled
from tests.support.examples import examples
from tests.support.inprocess import active_signals, closed, running, send, settings, write_rules
from tests.support.spans import TRACE, S, body

pytestmark = pytest.mark.kernel

LONG = "hay " * 500
TRACE_ID = TRACE.hex()
OPERATORS = {
    EQ: int.__eq__,
    NE: int.__ne__,
    LT: int.__lt__,
    LE: int.__le__,
    GT: int.__gt__,
    GE: int.__ge__,
}


@pytest.fixture(autouse=True, scope="module")
def _short_texts_are_long() -> Iterator[None]:
    set_match_bytes(1024)
    yield
    set_match_bytes(MATCH_BYTES)


def verdicts(conditions: Sequence[str], spans: Sequence[S]) -> list[str]:
    """What is said of the closed trace by each rule."""
    traces = TenantTraces("t", compiled([parse(each) for each in conditions]))
    found = ["kept"] * len(conditions)
    numbers = {f"r{number}": number for number in range(len(conditions))}
    early = []
    for _, folded in traces.fold(scan_bodies("t", [body(*spans)]), 1):
        if folded.early is not None:
            early = decide_due(folded.early, 1).signals
    (due,) = traces.close_due(2, 0)
    decided = decide_due(due, 2)
    for signal in (*early, *decided.signals):
        found[numbers[signal.rule_id]] = "broken"
    for each in decided.undecided:
        assert found[each.rule] == "kept"
        assert each.reason == "a text is too long to be searched"
        found[each.rule] = "undecided"
    assert decided.outcomes is not None
    assert decided.outcomes[:, O_UNDECIDED].tolist() == [each == "undecided" for each in found]
    return found


HIT = 'a.where(x matches "needle")'
CONDITIONS = [
    f"never {{ {HIT} }}",
    f"when {{ b }} always {{ {HIT} }}",
    f"when {{ {HIT} }} always {{ b }}",
    f"count({HIT}) == 1",
    f"count({HIT}) != 2",
    f"count({HIT}) < 2",
    f"count({HIT}) >= 2",
    f"count({HIT}) > count(b)",
    f"count(b) >= count({HIT})",
    f"count({HIT}) == count(b)",
    f"{HIT} before b",
    f"never {{ b before {HIT} }}",
    'always { *.where(not (x matches "needle")) }',
    f"when {{ a and not {HIT} }} never {{ b or {HIT} }}",
    'a.where(x matches "needle" and span:duration > 5ns) or count(a) > 2',
    "count(a) > 1",
]
values = st.sampled_from(["long", "long", "needle", "hay"])
traces = st.lists(st.tuples(st.sampled_from("aab"), values, st.integers(0, 5)), max_size=4)


@examined(max_examples=examples(25))
@given(traces)
def test_what_is_decided_holds_whatever_the_long_texts_contain(drawn: list[Any]) -> None:
    def spans(texts: Sequence[str]) -> list[S]:
        made = [
            S(number, name, start=start, x=text)
            for number, ((name, _, start), text) in enumerate(zip(drawn, texts, strict=True), 1)
        ]
        return [*made, S(99, "other")]

    given_texts = [LONG if text == "long" else text for _, text, _ in drawn]
    choices = [("needle", "hay") if text == LONG else (text,) for text in given_texts]
    found = verdicts(CONDITIONS, spans(given_texts))
    possible = [verdicts(CONDITIONS, spans(texts)) for texts in itertools.product(*choices)]
    for number, verdict in enumerate(found):
        outcomes = {each[number] for each in possible}
        if verdict == "undecided":
            assert LONG in given_texts
        else:
            assert outcomes == {verdict}, CONDITIONS[number]


def test_a_rule_is_undecided_only_if_it_depends_on_the_text() -> None:
    conditions = [f"never {{ {HIT} }}", f"count({HIT}) > 2", f"b or {HIT}", f"{HIT} and c"]
    spans = [S(1, "a", x=LONG), S(2, "a", x="needle"), S(3, "b")]
    assert verdicts(conditions, spans) == ["broken", "kept", "broken", "kept"]
    assert verdicts(conditions, spans[:1]) == ["undecided", "kept", "undecided", "kept"]
    both = 'never { a.where(x matches "needle" or x matches "hay$") }'
    short = 'never { a.where(span:duration > 1h and x matches "needle") }'
    assert verdicts([both, short], [S(1, "a", x=LONG)]) == ["undecided", "kept"]


def test_intervals_of_counts() -> None:
    def truth(values: set[bool]) -> int:
        return UNKNOWN if len(values) > 1 else TRUE if True in values else FALSE

    for least, most, number in itertools.product(range(5), range(5), range(-1, 6)):
        if least <= most:
            for op in (EQ, NE, LT, GT):
                expected = truth({OPERATORS[op](n, number) for n in range(least, most + 1)})
                assert _between(least, most, op, number) == expected
            for op, operator in OPERATORS.items():
                expected = truth({operator(n, 2) for n in range(least, most + 1)})
                assert _count_count(least - 2, most - 2, op) == expected


@pytest.mark.parametrize("forget", [False, True])
def test_what_is_undecided_is_not_retracted_until_it_is_decided(forget: bool) -> None:
    engine = Engine([parse(f"count({HIT}) == 1"), parse("always { b }")])

    def late(span: S) -> set[str]:
        if forget:
            engine.forget()
        engine.send(body(span))
        engine.close()
        return {rule for _, rule in engine.active}

    assert late(S(1, "a", x="needle")) == {"r0", "r1"}
    assert late(S(2, "a", x=LONG)) == {"r0", "r1"}
    engine.restart()
    assert late(S(3, "a", x=LONG)) == {"r0", "r1"}
    assert late(S(4, "b")) == {"r0"}
    assert [s.kind for s in engine.signals if s.rule_id == "r0"] == [Kind.RAISED]
    assert late(S(5, "a", x="needle")) == set()
    assert late(S(6, "a", x=LONG)) == set()


async def test_a_running_service_lists_them(tmp_path: Path, caplog: Any) -> None:
    write_rules(tmp_path, {"hit": f"never {{ {HIT} }}", "all": "count(a) == 1"})
    async with running(settings(tmp_path, rules={"match_max_bytes": 1500})) as service:
        assert match_bytes() == 1500
        await send(service, [S(1, "a", x=LONG)])
        await send(service, [S(1, "a", x=LONG[:1400], trace=b"\2" * 16)])
        await closed(service)
        assert {rule for _, rule in active_signals(service)} == {"all"}
        (found,) = service.pipeline.evaluate._undecided.page("default")[0]
        assert (found.trace_id, found.rule_id) == (TRACE_ID, "hit")
        assert found.reason == "a text is too long to be searched"
        assert service.pipeline.evaluate.counts.undecided == 1
        assert service.pipeline.open_traces.counts.unknown == 1
    assert "a text is too long to be searched" in caplog.text
