"""The marks of incomplete traces, and the share of time that they may take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import trio

from betrace.channels import ThreadRunner
from betrace.service.pipeline.incomplete import BURST_SECONDS, SHARE, IncompleteTraces, mark_now
from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.rules.trace_tree import TraceTree
from betrace.service.signals import Kind
from betrace.service.traces.due import DueTraces
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import Decided, decide_due
from tests.support.spans import S, batch
from tests.support.trace_spans import case_trace

IDS = [bytes([i]) * 16 for i in (1, 2, 3)]
ORPHAN = {"name": "a", "attributes": {}, "parent_id": "0000000000000009"}
ROOT = {"name": "a", "attributes": {}}


class FakeReadBack:
    """Reads the trees given by trace id; of the others only the reason."""

    def __init__(self, **trees: Any) -> None:
        self.trees = {name: case_trace(spans) for name, spans in trees.items()}
        self.asked: list[str] = []
        self.error: Exception | None = None

    def traces(
        self, due: DueTraces, numbers: Sequence[int]
    ) -> Iterator[list[tuple[int, TraceTree | str]]]:
        if self.error is not None:
            raise self.error
        for k in numbers:
            trace = due.trace_id(k)
            self.asked.append(trace)
            yield [(k, self.trees.get(f"t{trace[:2]}", "it cannot be read"))]


def decided() -> Decided:
    """Three closed traces that break a rule, two of which break another one, too."""
    rules = compile_rules(
        [
            make_rule({"id": "b", "condition": "always { b }"}),
            make_rule({"id": "c", "condition": "when { x } always { c }"}),
        ]
    )
    traces = TenantTraces("t", rules)
    spans = [S(1, trace=each) for each in IDS] + [S(2, "x", trace=each) for each in IDS[:2]]
    traces.fold(batch(*spans), now=1)
    (due,) = traces.close_due(now=2, idle_ns=0)
    return decide_due(due, 3)


def marks(found: Decided) -> set[tuple[str, str, int]]:
    return {(each.trace_id[:2], each.rule_id, each.missing_parents) for each in found.signals}


UNMARKED = {("01", "b", 0), ("02", "b", 0), ("03", "b", 0), ("01", "c", 0), ("02", "c", 0)}
MARKED = (UNMARKED - {("01", "b", 0), ("01", "c", 0)}) | {("01", "b", 1), ("01", "c", 1)}


def test_signals_of_incomplete_traces_are_marked() -> None:
    found, reads = decided(), FakeReadBack(t01=[ORPHAN, ORPHAN], t02=[ROOT])
    mark_now(found, reads)  # type: ignore[arg-type]
    assert marks(found) == MARKED
    assert sorted(reads.asked) == [each.hex() for each in IDS]  # each once


def test_early_signals_and_retractions_are_not_looked_at() -> None:
    found, reads = decided(), FakeReadBack(t01=[ORPHAN])
    found.signals = [
        replace(each, early=True) if each.rule_id == "b" else replace(each, kind=Kind.RETRACTED)
        for each in found.signals
    ]
    mark_now(found, reads)  # type: ignore[arg-type]
    mark_now(Decided("t", decided().signals, None), reads)  # type: ignore[arg-type]
    assert not reads.asked
    assert marks(found) == UNMARKED


def test_it_takes_a_share_of_the_time() -> None:
    now = 0.0
    reads = FakeReadBack(t01=[ORPHAN])
    real = reads.traces

    def slow(due: DueTraces, numbers: Sequence[int]) -> Iterator[list[tuple[int, TraceTree | str]]]:
        nonlocal now
        now += 2 * BURST_SECONDS
        return real(due, numbers)

    reads.traces = slow  # type: ignore[method-assign]

    async def main() -> None:
        nonlocal now
        threads = ThreadRunner("test", 1)
        marking = IncompleteTraces(threads, reads, lambda: now)  # type: ignore[arg-type]
        first, second, third = decided(), decided(), decided()
        await marking.mark([first, second])
        assert (marks(first), marks(second)) == (MARKED, UNMARKED)
        assert marking.unmarked == 3
        now += 1.5 * BURST_SECONDS / SHARE
        await marking.mark([third])
        assert marks(third) == MARKED
        threads.close()

    trio.run(main)


def test_an_error_leaves_signals_unmarked() -> None:
    reads = FakeReadBack(t01=[ORPHAN])
    reads.error = OSError("the disk is gone")

    async def main() -> None:
        threads = ThreadRunner("test", 1)
        marking = IncompleteTraces(threads, reads)  # type: ignore[arg-type]
        found = decided()
        await marking.mark([found])
        assert marks(found) == UNMARKED
        assert marking.unmarked == 3
        threads.close()

    trio.run(main)


def test_traces_that_were_read_to_judge_them_are_not_read_again() -> None:
    found, reads = decided(), FakeReadBack(t01=[ORPHAN, ORPHAN], t02=[ROOT])
    assert found.closed is not None
    number = {found.closed.trace_id(k): k for k in range(3)}
    found.missing = {number[IDS[0].hex()]: 1, number[IDS[1].hex()]: 0}
    mark_now(found, reads)  # type: ignore[arg-type]
    assert marks(found) == MARKED
    assert reads.asked == [IDS[2].hex()]
