"""Latencies that the service observes of itself."""

from __future__ import annotations

import time

import trio

from betrace.service.telemetry.latencies import Latencies


async def test_a_task_that_keeps_the_thread_delays_timers(nursery, autojump_clock):
    latencies = Latencies()

    def value(name: str, **labels: str) -> float:
        found = latencies.registry.get_sample_value(f"betrace_timer_delay_seconds_{name}", labels)
        assert found is not None
        return found

    def observed(least: str) -> float:
        return value("count") - value("bucket", le=least)

    nursery.start_soon(latencies.watch_timers)
    await trio.sleep(1.05)
    assert observed("0.001") == 0
    assert value("count") == 10
    autojump_clock.jump(0.3)  # as if a task had kept the thread for that long
    await trio.sleep(0.05)
    assert observed("0.1") == 1


def test_the_clock_of_the_delays_is_that_of_the_timers() -> None:
    """A task that really keeps the thread is noticed."""
    latencies = Latencies()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(latencies.watch_timers)
            await trio.sleep(0.05)
            time.sleep(0.5)
            await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)
    total = latencies.registry.get_sample_value("betrace_timer_delay_seconds_sum")
    assert total is not None
    assert total > 0.1
