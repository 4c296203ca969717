"""Restarts with growing pauses."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from betrace.channels import supervise
from betrace.channels.supervisor import backoff


def test_backoff_doubles_up_to_a_limit() -> None:
    pauses = [backoff(failures, 0.1, 5.0) for failures in (1, 2, 3, 6, 7, 10_000)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 3.2, 5.0, 5.0])


async def test_restarts_with_growing_pauses_until_it_returns(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    starts: list[float] = []
    crashes: list[Exception] = []

    async def crash_six_times() -> None:
        starts.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if len(starts) <= 6:
            raise ValueError(len(starts))

    with caplog.at_level(logging.ERROR):
        await supervise(
            crash_six_times, "it", first_pause=1.0, longest_pause=10.0, on_crash=crashes.append
        )
    assert starts == [0.0, 1.0, 3.0, 7.0, 15.0, 25.0, 35.0]
    assert [error.args for error in crashes] == [(n,) for n in range(1, 7)]
    assert caplog.messages[1] == "it crashed; restarting it in 2.0 s"
    assert all(record.exc_info for record in caplog.records)


async def test_a_run_longer_than_the_pause_resets_it(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    starts: list[float] = []
    durations = iter([0.0, 0.0, 3.0, 0.0])

    async def crash() -> None:
        starts.append(trio.current_time())
        for duration in durations:
            await trio.sleep(duration)
            raise ValueError

    await supervise(crash, "it", first_pause=1.0, longest_pause=10.0)
    assert starts == [0.0, 1.0, 3.0, 7.0, 9.0]  # pauses of 1, 2, then 1 again after 3 s, 2


async def test_cancellation_passes_through(autojump_clock: MockClock) -> None:
    with trio.move_on_after(1.0) as scope:
        await supervise(trio.sleep_forever, "it")
    assert scope.cancelled_caught
