"""Messages of a partition's output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from betrace.service.cluster import output
from betrace.service.cluster.output import Counts, DeadMessage, NotJudged, Output, OutputCorrupt
from betrace.service.pipeline.trace_rows import trace_table
from betrace.service.rules.compile import compile_rules
from betrace.service.signals import Kind, Signal
from betrace.service.storage.undecided import UndecidedTrace
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    ENTRY_COLUMNS,
    FLAGS,
    HI,
    LO,
    NAME_BYTES,
    POSITION_0,
    POSITION_COUNT,
    POSITIONS,
    ROOT_NAME_LEN,
    ROOT_SERVICE,
    ROOTED,
    SERVICES_1,
    SERVICES_2,
    SLOT_COLUMNS,
    SPANS,
)
from betrace.service.traces.verdicts import Decided


def closed(traces: int, services: list[str], version: str = "v1", seed: int = 1) -> DueTraces:
    random = np.random.default_rng(seed)
    rows = np.zeros((traces, SLOT_COLUMNS), np.int64)
    rows[:, [HI, LO]] = random.integers(-(2**63), 2**63 - 1, (traces, 2))
    rows[:, SPANS] = random.integers(1, 50, traces)
    rows[:, POSITION_COUNT] = random.integers(1, POSITIONS + 1, traces)
    rows[:, POSITION_0 : POSITION_0 + POSITIONS] = 5 << 48 | random.integers(1, 99, (traces, 8))
    rows[:, FLAGS] = ROOTED
    rows[:, ROOT_NAME_LEN] = np.arange(traces) % 7
    rows[:, ROOT_SERVICE] = len(services) - 1
    rows[:, SERVICES_1] = (len(services) - 1) | 1 << 16 | 3 << 32 | (len(services) - 2) << 48
    rows[:, SERVICES_2] = 4
    names = np.full((traces, NAME_BYTES), ord("n"), np.uint8)
    starts, entries = np.zeros(traces + 1, np.int64), np.zeros((0, ENTRY_COLUMNS), np.int64)
    rules = compile_rules((), version)
    return DueTraces("t", rules, True, rows, names, entries, starts, services)


def signal(number: int, tenant: str = "t") -> Signal:
    return Signal(
        id=f"{number:032x}",
        tenant=tenant,
        rule_id="r0",
        rule_version="v",
        severity="high",
        kind=Kind.RAISED,
        clause="never",
        trace_id=f"{number:032x}",
        detected_at=7,
        early=False,
        counts={"a": 1},
        evidence={"a": ["01"]},
        message="m",
    )


def made(*decided: Decided) -> Output:
    return Output(5, 9, 2, 3, Counts(evaluated=4, spans=7), list(decided))


SERVICES = ["", *(f"service {k}" for k in range(4000))]


def test_what_is_read_is_what_was_decided():
    traces = closed(50, SERVICES)
    spilled = np.arange(20).reshape(2, 10)
    found = made(Decided("t", [signal(1)], traces, spilled, 11), Decided("u", [signal(2)], None))
    found.dead = [DeadMessage(3, "t", "why")]
    found.undecided = [NotJudged("t", UndecidedTrace("aa", "r", "v", "why", 4))]
    (data,) = output.pack(found)
    read = output.unpack(data)
    assert (read.upto, read.step, read.log_time_ns, read.time_ns) == (5, 9, 2, 3)
    assert (read.counts, read.dead, read.undecided) == (found.counts, found.dead, found.undecided)
    assert read.complete
    first, second = read.decided
    assert first.signals == [signal(1)]
    assert second.signals == [signal(2)]
    assert first.spilled is not None
    assert first.spilled.tolist() == spilled.tolist()
    assert first.closed is not None
    assert len(first.closed.services) < 7
    assert trace_table(first.closed).equals(trace_table(traces))
    assert first.due_ns == 11


def test_few_items_are_written_for_many_decisions():
    services = ["", "a", "b", "c", "d", "e"]
    parts = [Decided("t", [signal(k)], closed(1, services, seed=k), None, k) for k in range(9)]
    parts.insert(4, Decided("t", [signal(99)], None))
    parts.append(Decided("t", [signal(100)], closed(1, services, "v2")))
    read = output.unpack(output.pack(made(*parts))[0])
    assert [len(each.signals) for each in read.decided] == [10, 1]
    assert [len(each.closed or ()) for each in read.decided] == [9, 1]
    order = [0, 1, 2, 3, 99, 4, 5, 6, 7, 8]
    assert [each.id for each in read.decided[0].signals] == [signal(k).id for k in order]


@pytest.mark.parametrize("most_bytes", [1, 5000, 20_000])
def test_a_large_output_is_split(most_bytes):
    traces = closed(40, ["", "a", "b", "c", "d", "e"])
    many = Decided("t", [signal(k) for k in range(30)], traces, np.arange(20).reshape(2, 10))
    parts = [output.unpack(each) for each in output.pack(made(many, many), most_bytes)]
    assert len(parts) > 2
    assert [each.complete for each in parts] == [False] * (len(parts) - 1) + [True]
    decided = [each for part in parts for each in part.decided]
    assert [s for each in decided for s in each.signals] == many.signals * 2
    rows = np.concatenate([each.closed.rows for each in decided if each.closed is not None])
    assert rows[:, LO].tolist() == traces.rows[:, LO].tolist() * 2
    assert sum(each.spilled is not None for each in decided) == 1


def test_damaged_outputs_are_refused():
    (data,) = output.pack(made(Decided("t", [signal(1)], closed(3, ["", "a", "b", "c", "d"]))))
    for at in range(0, len(data), 3):
        bad = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        with pytest.raises(OutputCorrupt):
            output.unpack(bad)
    with pytest.raises(OutputCorrupt):
        output.unpack(data[: len(data) // 2])


def test_a_later_output_is_taken_in():
    first, later = made(Decided("t", [signal(1)], None)), made(Decided("t", [signal(2)], None))
    later = replace(later, upto=8, step=12, counts=Counts(evaluated=7))
    first.add(later)
    assert (first.upto, first.step, first.counts.evaluated, first.rows) == (8, 12, 7, 2)
