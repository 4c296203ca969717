"""trace-correlation on a virtual clock: which traces are due when, and what failures do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trio

from betrace.channels import open_channel
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.stages import backlog, correlate
from betrace.service.pipeline.stages.correlate import CorrelateStage
from betrace.service.pipeline.stages.trace_clock import LOOKED_AT
from betrace.service.rules.parse import parse
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.limits import LateSpans, TraceLimits
from betrace.service.traces.slices import SliceOver
from tests.support.engine import compiled
from tests.support.spans import S, batch

SECOND = 10**9


@pytest.fixture(autouse=True)
def _unlimited_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU slices are real time, which a virtual clock does not stop: a garbage collection in the
    middle of a fold would put a batch into the backlog."""
    for name in ("FIRST_SLICE", "ALL_SLICES", "LEAST_SLICE", "CALL_SECONDS"):
        monkeypatch.setattr(correlate, name, 3600.0)


class Here:
    """A runner that calls at once, because threads do not wait for a virtual clock."""

    async def run(self, function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)


class Rig:
    """The stage on Trio's clock, and what it passed on."""

    def __init__(self, **limits: int) -> None:
        given = {
            "idle_ns": 5 * SECOND,
            "max_age_ns": 3600 * SECOND,
            "sweep_ns": 300 * SECOND,
            "keep_ns": 600 * SECOND,
            "keep": 1000,
            "most_open": 1000,
        } | limits
        self.rules = {"t": compiled([parse("count(a) > 1"), parse("always { b }")])}
        self.offset = 0
        self.behind = False
        self.progress, self.in_flight = LogProgress(), InFlight()
        send, self.receive = open_channel("due", 1000, lambda due: len(due) or 1, hold=True)
        self.position = 0
        self.traces = OpenTraces(
            lambda tenant: self.rules.get(tenant, self.rules["t"]),
            TraceLimits(**given),
            LateSpans(ClosedTraces(1 << 14), lambda _, ids: (), lambda: self.behind),
            self.progress,
            self.in_flight,
            self.clock,
        )
        self.stage = CorrelateStage(self.traces, Here(), send)  # type: ignore[arg-type]

    def clock(self) -> int:
        return int((trio.current_time() + 10**6) * SECOND) + self.offset

    def batch(self, *spans: S, tenant: str = "t") -> Any:
        self.position += 10
        made = batch(*spans)
        made.tenant = tenant
        made.positions = np.array([self.position])
        made.received_ns = self.clock()
        self.progress.append(tenant, lambda: [self.position])
        return made

    async def send(self, *spans: S, tenant: str = "t") -> None:
        await self.stage.handle([self.batch(*spans, tenant=tenant)])

    def due(self) -> list[DueTraces]:
        found = []
        while True:
            try:
                item = self.receive.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                return found
            self.receive.done(self.receive.weigh(item))
            found.append(item)


@pytest.fixture
async def rig(nursery, autojump_clock):
    rig = Rig()
    rig.stage.caught_up.set()
    nursery.start_soon(rig.stage.tick)
    return rig


async def test_an_idle_trace_is_due(rig, autojump_clock):
    await rig.send(S(1))
    await trio.sleep(4)
    await rig.send(S(2, "b"))
    await trio.sleep(4.9)
    assert rig.due() == []
    await trio.sleep(0.6)
    (due,) = rig.due()
    assert due.closed
    assert due.spans == 2
    assert rig.traces.counts.closed == 1


async def test_a_trace_is_due_early_when_a_count_decides_a_rule(rig, autojump_clock):
    await rig.send(S(1))
    assert rig.due() == []
    await rig.send(S(2))
    (due,) = rig.due()
    assert not due.closed
    await rig.send(S(3))
    assert rig.due() == []


async def test_a_trace_marked_complete_is_due_at_once(rig, autojump_clock):
    await rig.send(S(1), S(2, complete=True))
    early, closed = rig.due()
    assert (early.closed, closed.closed) == (False, True)
    await trio.sleep(20)
    assert rig.due() == []


async def test_a_trace_that_never_idles_is_due_at_its_maximum_age(nursery, autojump_clock):
    rig = Rig(max_age_ns=60 * SECOND, sweep_ns=10 * SECOND)
    rig.stage.caught_up.set()
    nursery.start_soon(rig.stage.tick)
    start = trio.current_time()
    for number in range(1, 100):
        await rig.send(S(number, "x"))
        await trio.sleep(1)
        if found := [due for due in rig.due() if len(due)]:  # log positions are passed on too
            assert 60 <= trio.current_time() - start <= 72
            assert found[0].closed
            return
    raise AssertionError("never closed")


async def test_nothing_is_closed_before_the_log_is_read(nursery, autojump_clock):
    rig = Rig()
    nursery.start_soon(rig.stage.tick)
    await rig.send(S(1))
    await trio.sleep(100)
    assert rig.due() == []
    rig.stage.caught_up.set()
    await trio.sleep(1)
    assert len(rig.due()) == 1


async def test_above_the_limit_the_traces_idle_longest_are_closed(nursery, autojump_clock):
    rig = Rig(most_open=3)
    rig.stage.caught_up.set()
    nursery.start_soon(rig.stage.tick)
    for number in range(1, 8):
        await rig.send(S(1, "x", trace=bytes([number]) * 16))
    await trio.sleep(0.5)
    closed = [due.trace_id(k)[:2] for due in rig.due() for k in range(len(due))]
    assert sorted(closed) == ["01", "02", "03", "04"]
    assert rig.traces.counts.closed_for_room == 4


async def test_closed_traces_are_shared_fairly_and_forgotten(nursery, autojump_clock):
    rig = Rig(keep=10, sweep_ns=SECOND)
    rig.stage.caught_up.set()
    nursery.start_soon(rig.stage.tick)
    for number in range(1, 41):
        await rig.send(S(1, "x", trace=bytes([number]) * 16), tenant="big")
    await rig.send(S(1, "x"), S(2, "x", trace=b"\2" * 16), tenant="small")
    await trio.sleep(20)
    kept = {name: traces.closed_count for name, traces in rig.traces.tenants.items()}
    assert sum(kept.values()) <= 10
    assert kept["big"] >= 8
    await trio.sleep(700)
    assert rig.traces.tenants == {}


async def test_a_redelivered_batch_is_skipped(rig, autojump_clock):
    first, second = rig.batch(S(1)), rig.batch(S(2))
    await rig.stage.handle([first])
    await rig.stage.handle([first, second])
    assert rig.traces.counts.folded == 2
    assert rig.traces.counts.repeated == 0
    assert rig.progress.snapshot() == {"t": (20, [])}


async def test_what_was_due_before_a_failure_is_passed_on(rig, autojump_clock, monkeypatch):
    good, bad = rig.batch(S(1), S(2)), rig.batch(S(3), tenant="u")
    fold = rig.traces.fold

    def fail(given: Any, cpu: Any) -> Any:
        if given is bad:
            raise RuntimeError("injected")
        return fold(given, cpu)

    with monkeypatch.context() as broken:
        broken.setattr(rig.traces, "fold", fail)
        with pytest.raises(RuntimeError, match="injected"):
            await rig.stage.handle([good, bad])
    assert len(rig.due()) == 1
    assert rig.progress.snapshot() == {"t": (10, []), "u": (20, [20])}
    await rig.stage.handle([good])
    await rig.stage.handle([bad])
    assert rig.traces.counts.folded == 3
    assert rig.progress.snapshot() == {"t": (10, []), "u": (20, [])}


async def test_batches_of_a_tenant_are_folded_together(rig, autojump_clock, monkeypatch):
    folded = []
    fold = rig.traces.fold

    def note(given: Any, cpu: Any) -> Any:
        folded.append((given.tenant, given.positions.tolist()))
        return fold(given, cpu)

    monkeypatch.setattr(rig.traces, "fold", note)
    batches = [rig.batch(S(1), S(2)), rig.batch(S(5), tenant="u"), rig.batch(S(3), S(4))]
    assert await rig.stage.handle([*batches, batches[0]]) == [*batches, batches[0]]
    assert folded == [("t", [10, 30]), ("u", [20])]
    assert rig.traces.counts.folded == 5
    assert rig.traces.counts.repeated == 0


async def test_joined_batches_that_need_too_much_time_wait(rig, autojump_clock, monkeypatch):
    fold = rig.traces.fold

    def over(given: Any, cpu: Any) -> Any:
        raise SliceOver

    batches = [rig.batch(S(1), S(2)), rig.batch(S(3), S(4))]
    with monkeypatch.context() as slow:
        slow.setattr(rig.traces, "fold", over)
        assert await rig.stage.handle(batches) == []
    assert rig.stage.backlog.batches("t") == batches
    assert rig.traces.fold == fold
    for expected in batches:
        assert await rig.stage.fold_waiting() == (expected, 0)
    assert rig.traces.counts.folded == 4
    assert rig.progress.snapshot() == {"t": (20, [])}


async def test_tenants_with_few_spans_are_folded_first(rig, autojump_clock, monkeypatch):
    monkeypatch.setattr(correlate, "FEW_SPANS", 5)
    monkeypatch.setattr(correlate, "CALL_SECONDS", 0.0)  # one tenant in each call
    folded, calls = [], []
    fold, run = rig.traces.fold, Here.run

    def note(given: Any, cpu: Any) -> Any:
        folded.append((given.tenant, len(given)))
        return fold(given, cpu)

    async def count(self: Here, function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return await run(self, function, *args, **kwargs)

    monkeypatch.setattr(rig.traces, "fold", note)
    monkeypatch.setattr(Here, "run", count)
    batches = [
        rig.batch(*(S(n) for n in range(1, 10))),
        rig.batch(S(1), tenant="u"),
        rig.batch(S(1), S(2), tenant="v"),
        rig.batch(S(10)),
    ]
    assert await rig.stage.handle(batches) == batches
    assert folded == [("u", 1), ("v", 2), ("t", 10)]
    assert calls == ["_fold"] * 3


async def test_very_many_spans_wait_without_the_channel(rig, autojump_clock):
    batch = rig.batch(*(S(n) for n in range(1, 100)))
    await rig.stage.set_aside(batch)
    assert rig.stage.passed_by == 99
    assert rig.stage.waiting.is_set()
    later = rig.batch(S(100))
    assert await rig.stage.handle([later]) == []  # behind it
    for expected in (batch, later):
        assert await rig.stage.fold_waiting() == (expected, 0)
    assert rig.traces.counts.folded == 100


async def test_a_long_search_is_done_without_the_lock(rig, autojump_clock, monkeypatch):
    monkeypatch.setattr(correlate, "LONGEST_STEP", 0.0)
    monkeypatch.setattr(backlog, "SLICE_SECONDS", 1e-9)
    monkeypatch.setattr(correlate, "FIRST_SLICE", 0.0)
    monkeypatch.setattr(correlate, "LEAST_SLICE", 0.0)
    rig.rules["t"] = compiled([parse('count(a.where(x matches "^v.*[02468]$")) > 100')])
    locked = []
    search = rig.stage._search

    def note(tenant: str, work: Any) -> None:
        locked.append(rig.traces.lock.locked())
        search(tenant, work)

    monkeypatch.setattr(rig.stage, "_search", note)
    batch = rig.batch(*(S(n, "a", x=f"v{n}") for n in range(1, 21)))
    assert await rig.stage.handle([batch]) == []
    while (found := await rig.stage.fold_waiting()) is None:
        pass
    assert found == (batch, 0)
    assert locked == [False] * 20  # for each text
    assert rig.traces.counts.matched == 10
    assert rig.stage.backlog.cpu_seconds > 0


async def test_all_due_traces_have_a_ticket(rig, autojump_clock):
    await rig.send(S(1), S(2, complete=True))
    await rig.send(S(1, trace=b"\2" * 16))
    await trio.sleep(10)
    tickets = [due.ticket for due in rig.due()]
    assert len(set(tickets)) == len(tickets) == len(rig.in_flight) == 3
    assert all(tickets)


async def test_setting_the_clock_back_changes_nothing(rig, autojump_clock):
    await rig.send(S(1, "x"))
    await trio.sleep(2)
    rig.offset = -3600 * SECOND
    await trio.sleep(2)
    assert rig.due() == []
    await trio.sleep(2)
    (closed,) = rig.due()
    rig.in_flight.leave(closed.ticket)
    rig.offset = -7200 * SECOND
    await trio.sleep(590)
    assert rig.traces.tenants["t"].closed_count == 1
    await rig.send(S(2, "b"))  # late
    await trio.sleep(6)
    (again,) = rig.due()
    assert again.spans == 2


async def test_the_traces_idle_longest_are_closed_whatever_their_tenant(nursery, autojump_clock):
    rig = Rig(most_open=2)
    rig.stage.caught_up.set()
    nursery.start_soon(rig.stage.tick)
    for number, tenant in ((1, "first"), (2, "second"), (3, "first"), (4, "third")):
        await rig.send(S(1, "x", trace=bytes([number]) * 16), tenant=tenant)
        await rig.send(S(1, "x", trace=bytes([number]) * 16), tenant=tenant)
        await trio.sleep(0.01)
    await rig.send(S(2, "x", trace=b"\1" * 16), tenant="first")
    await trio.sleep(0.5)
    closed = [(due.tenant, due.trace_id(k)[:2]) for due in rig.due() for k in range(len(due))]
    assert sorted(closed) == [("first", "03"), ("second", "02")]


async def test_the_clock_stops_when_the_next_channel_is_gone(autojump_clock):
    rig = Rig()
    rig.stage.caught_up.set()
    await rig.send(S(1, "x"))
    rig.receive.close()
    with trio.fail_after(60):
        await rig.stage.tick()


async def test_changed_rules_are_used_for_new_traces(rig, autojump_clock):
    await rig.send(S(1, "x"))
    rig.rules["t"] = compiled([parse("a")], "v2")
    await rig.send(S(2, "x"), S(1, "x", trace=b"\2" * 16))
    await trio.sleep(10)
    versions = sorted((due.rules.version, due.spans) for due in rig.due())
    assert versions == [("v1", 2), ("v2", 1)]


async def test_the_survey_counts_the_traces_in_memory(rig, autojump_clock):
    await rig.send(S(1, "x"), S(2, "x"))
    await trio.sleep(1.5)
    assert rig.stage.clock.survey.open == 1
    assert rig.stage.clock.survey.spans == 2
    assert rig.stage.clock.survey.nbytes > 0
    await trio.sleep(10)
    assert (rig.stage.clock.survey.open, rig.stage.clock.survey.closed) == (0, 1)


async def test_closed_traces_are_kept_until_they_are_in_the_index(nursery, autojump_clock):
    rig = Rig(keep=2, keep_ns=SECOND)
    rig.behind = True
    rig.stage.caught_up.set()
    nursery.start_soon(rig.stage.tick)

    async def closed(first: int, last: int) -> int:
        for number in range(first, last):
            await rig.send(S(1, "x", trace=bytes([number]) * 16))
        await trio.sleep(20)
        return sum(traces.closed_count for traces in rig.traces.tenants.values())

    assert await closed(1, 11) == 10
    assert await closed(11, 41) == 0  # there are limits
    assert await closed(41, 51) == 10
    rig.behind = False
    await trio.sleep(5)
    assert await closed(0, 0) == 0


async def test_of_many_tenants_each_is_closed_in_time_and_the_totals_are_right(
    nursery, autojump_clock
):
    rig = Rig(keep=5)
    rig.stage.caught_up.set()
    nursery.start_soon(rig.stage.tick)
    last: dict[str, float] = {}
    for number in range(200):
        tenant = f"t{number * 7 % 13}"
        if number < 100 or tenant in ("t1", "t2"):
            await rig.send(S(number + 1, "x"), tenant=tenant)
            last[tenant] = trio.current_time()
        await trio.sleep(0.1 + number % 3)
        for due in rig.due():
            if len(due):  # others contain only log positions
                rig.in_flight.leave(due.ticket)
                assert 5 <= trio.current_time() - last.pop(due.tenant) <= 5.25 + 2.1
        assert set(last) == {n for n, t in rig.traces.tenants.items() if t.open_count}
        assert rig.traces.totals.open == len(last)
        kept = sum(traces.closed_count for traces in rig.traces.tenants.values())
        assert rig.traces.totals.closed == kept
    rig.stage.forget("t1")
    assert rig.traces.totals.open == sum(t.open_count for t in rig.traces.tenants.values())


async def test_thousands_of_tenants_are_searched_in_turn(nursery, autojump_clock):
    rig = Rig()
    rig.stage.caught_up.set()
    for number in range(3 * LOOKED_AT):
        await rig.send(S(number + 1), tenant=f"t{number}")
    await trio.sleep(5)
    nursery.start_soon(rig.stage.tick)
    await trio.sleep(0.1)  # between ticks of the clock
    found: list[DueTraces] = []
    for round_ in range(1, 4):
        await trio.sleep(0.25)
        found += [due for due in rig.due() if len(due)]
        assert len(found) == round_ * LOOKED_AT
    assert len({due.tenant for due in found}) == 3 * LOOKED_AT
    await rig.send(S(1000), tenant="t7")
    await trio.sleep(5 + 4 * 0.25)
    assert [due.tenant for due in rig.due() if due.closed] == ["t7"]


async def test_batches_of_different_rules_are_folded_apart_and_in_order(rig, monkeypatch):
    old, new = compiled([parse("count(a) > 1")], "old"), compiled([parse("always { b }")], "new")
    folds: list[list[int]] = []
    fold = rig.traces.fold

    def watched(batch: Any, cpu: Any) -> None:
        folds.append(batch.positions.tolist())
        fold(batch, cpu)

    monkeypatch.setattr(rig.traces, "fold", watched)
    batches = []
    for number, rules in enumerate([old, old, new, old], 1):
        made = rig.batch(S(number, trace=bytes([number]) * 16))
        made.rules = rules
        batches += [made, rig.batch(S(1), tenant="other")] if number == 1 else [made]
    await rig.stage.handle(batches)
    assert folds == [[10, 30], [20], [40], [50]]
    versions = {table.rules.version: table.open_count for table in rig.traces.tenants["t"].tables}
    assert versions == {"old": 3, "new": 1}
