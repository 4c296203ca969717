"""Commits have a share of a core, and those with signals one of their own."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from betrace.service.pipeline.stages.pacing import URGENT_SHARES, CommitPace


async def test_the_pause_grows_with_the_cost(autojump_clock: MockClock) -> None:
    pace = CommitPace(0.05)
    pace.held = True
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


async def test_rows_do_not_make_a_commit_dear() -> None:
    few, many = CommitPace(0.05), CommitPace(0.05)
    for _ in range(200):
        few.observe(0.003, 3)
        many.observe(0.0075, 450)
    assert few.cost == pytest.approx(many.cost, rel=0.05)


async def test_nothing_is_held_back_until_the_log_was_read(autojump_clock: MockClock) -> None:
    pace = CommitPace(0.0001)
    pace.taken(urgent=False)
    assert pace.due(urgent=False) <= trio.current_time()
    pace.held = True
    assert pace.due(urgent=False) > trio.current_time() + 10
