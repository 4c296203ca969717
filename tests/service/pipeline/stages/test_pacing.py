"""Commits have a share of a core; commits with signals have a share of their own."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from betrace.service.pipeline.stages.pacing import URGENT_SHARES, CommitPace


async def test_the_pause_grows_with_the_cost(autojump_clock: MockClock) -> None:
    pace = CommitPace(0.05)
    pace.active = True
    for _ in range(200):
        pace.observe(0.01, 0)
    assert pace.cost == pytest.approx(0.01, rel=0.01)
    await trio.sleep(1)
    assert pace.due(urgent=False) <= trio.current_time()
    pace.taken(urgent=False)
    assert pace.due(urgent=False) - trio.current_time() == pytest.approx(0.2, rel=0.01)
    assert pace.due(urgent=True) <= trio.current_time()
    pace.taken(urgent=True)
    wait = pace.due(urgent=True) - trio.current_time()
    assert wait == pytest.approx(0.2 / URGENT_SHARES, rel=0.01)


async def test_rows_do_not_count_as_the_cost_of_a_commit() -> None:
    few, many = CommitPace(0.05), CommitPace(0.05)
    for _ in range(200):
        few.observe(0.003, 3)
        many.observe(0.0075, 450)
    assert few.cost == pytest.approx(many.cost, rel=0.05)


async def test_commits_are_not_paced_until_the_log_is_read(autojump_clock: MockClock) -> None:
    pace = CommitPace(0.0001)
    pace.taken(urgent=False)
    assert pace.due(urgent=False) <= trio.current_time()
    pace.active = True
    assert pace.due(urgent=False) > trio.current_time() + 10
