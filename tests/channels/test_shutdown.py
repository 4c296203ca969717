"""Ordered shutdown: in order, within its time, and saying what remains."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from betrace.channels.shutdown import Step, shut_down


def slow_steps(log: list[tuple[float, str]], *durations: float) -> list[Step]:
    def step(name: str, seconds: float) -> Step:
        async def finished() -> None:
            await trio.sleep(seconds)
            log.append((trio.current_time(), f"{name} finished"))

        return Step(name, lambda: log.append((trio.current_time(), f"{name} told")), finished)

    return [step("abc"[n], seconds) for n, seconds in enumerate(durations)]


async def test_each_part_ends_before_the_next_is_told(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log: list[tuple[float, str]] = []
    assert await shut_down(slow_steps(log, 3.0, 8.0), 20.0) == []
    assert log == [(0.0, "a told"), (3.0, "a finished"), (3.0, "b told"), (11.0, "b finished")]
    assert caplog.messages == [
        "shutting down; waiting for b",
        "shutting down; waiting for b",
    ]


async def test_what_is_not_finished_in_time_is_told_and_named(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[tuple[float, str]] = []
    assert await shut_down(slow_steps(log, 1.0, 9.0, 1.0), 4.0) == ["b", "c"]
    assert log == [(0.0, "a told"), (1.0, "a finished"), (1.0, "b told"), (4.0, "c told")]
    assert caplog.messages == ["shutting down; not finished: b, c"]


async def test_a_part_that_fails_does_not_keep_the_others_from_ending(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise OSError("broken")

    log: list[tuple[float, str]] = []
    steps = [Step("bad", lambda: None, fail), *slow_steps(log, 1.0)]
    assert await shut_down(steps, 4.0) == ["bad"]
    assert log == [(0.0, "a told"), (1.0, "a finished")]
    assert caplog.messages == ["shutting down: bad failed", "shutting down; not finished: bad"]
