"""Commits share a budget of CPU time, and commits with signals have one of their own."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from betrace.service.pipeline.stages.pacing import BURST_SECONDS, URGENT_SHARES, CommitPace


def paced(cores: float, used: float = 0.0) -> CommitPace:
    """A pace that limits commits, of a process that uses ``used`` cores."""
    pace = CommitPace(cores, lambda: used * trio.current_time())
    pace.active = True
    return pace


def spend(pace: CommitPace, *, urgent: bool) -> int:
    """Commit until the pace makes the next commit wait; returns how many were made."""
    commits = 0
    while pace.due(urgent) <= trio.current_time():
        pace.taken(urgent)
        commits += 1
        assert commits < 1000
    return commits


async def test_a_burst_after_a_quiet_time_is_committed_at_once(autojump_clock: MockClock) -> None:
    pace = paced(0.05)
    first = spend(pace, urgent=False)
    assert first * pace.cost == pytest.approx(BURST_SECONDS, abs=pace.cost)
    await trio.sleep(1)
    assert spend(pace, urgent=False) <= 1
    await trio.sleep(1000)
    assert spend(pace, urgent=False) == first


async def test_the_budget_is_a_fraction_of_what_the_process_uses(autojump_clock: MockClock) -> None:
    waits = []
    for used in (0.0, 0.1, 1.0, 2.0):
        pace = paced(0.02, used)
        pace.due(urgent=False)
        await trio.sleep(1)
        spend(pace, urgent=False)
        waits.append(pace.due(urgent=False) - trio.current_time())
    idle, low, high, full = waits
    assert idle > 2 * low > 4 * high
    assert high == pytest.approx(full, rel=0.8)  # the limit in cores


async def test_the_pause_grows_with_the_cost(autojump_clock: MockClock) -> None:
    pace = paced(0.05, used=2.0)
    for _ in range(200):
        pace.observe(0.01, 0)
    assert pace.cost == pytest.approx(0.01, rel=0.01)
    pace.due(urgent=False)
    await trio.sleep(1)
    for urgent, wait in ((False, 0.2), (True, 0.2 / URGENT_SHARES)):
        spend(pace, urgent=urgent)
        while pace.due(urgent) > trio.current_time():
            await trio.sleep(pace.due(urgent) - trio.current_time())
        pace.taken(urgent)
        assert pace.due(urgent) - trio.current_time() == pytest.approx(wait, rel=0.02)


async def test_signals_do_not_wait_behind_other_commits(autojump_clock: MockClock) -> None:
    pace = paced(0.0001)
    spend(pace, urgent=False)
    assert pace.due(urgent=False) > trio.current_time() + 10
    assert pace.due(urgent=True) <= trio.current_time()


async def test_rows_do_not_make_a_commit_expensive() -> None:
    few, many = CommitPace(0.05), CommitPace(0.05)
    for _ in range(200):
        few.observe(0.003, 3)
        many.observe(0.0075, 450)
    assert few.cost == pytest.approx(many.cost, rel=0.05)


async def test_nothing_waits_until_the_log_was_read(autojump_clock: MockClock) -> None:
    pace = CommitPace(0.0001)
    for _ in range(100):
        pace.taken(urgent=False)
    assert pace.due(urgent=False) <= trio.current_time()
    pace.active = True
    assert pace.due(urgent=False) > trio.current_time() + 10
