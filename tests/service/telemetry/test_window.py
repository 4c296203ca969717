"""Rates and latencies cover exactly the window, within the promised error."""

from __future__ import annotations

import math

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.telemetry.window import (
    PARTS,
    RELATIVE_ERROR,
    Recent,
    RecentLatency,
    RecentRates,
)

# From 10 ns to 11 days: all that a stage could take.
latencies = st.floats(1e-8, 1e6) | st.sampled_from([0.0, 1e-3, 2.5])
parts = st.lists(st.lists(latencies, max_size=40), min_size=1, max_size=2 * PARTS)


def exact(values: list[float], quantile: float) -> float:
    """The lower quantile as DDSketch defines it, with rank floor(q * (n - 1))."""
    return sorted(values)[math.floor(quantile * (len(values) - 1))]


@given(parts)
def test_quantiles_are_within_the_relative_error(observed):
    recent = RecentLatency()
    for number, part in enumerate(observed):
        for seconds in part:
            recent.observe(seconds)
        if number < len(observed) - 1:
            recent.end_part()
    kept = [seconds for part in observed[-PARTS - 1 :] for seconds in part]
    found = recent.quantiles()
    assert found.count == len(kept)
    for quantile, value in ((0.5, found.p50), (0.95, found.p95), (0.99, found.p99)):
        if not kept:
            assert value is None
        else:
            right = exact(kept, quantile)
            assert value == pytest.approx(right, rel=RELATIVE_ERROR * 1.001, abs=1e-12)


def test_the_number_of_buckets_is_bounded():
    recent = RecentLatency()
    for number in range(100_000):
        recent.observe(1.0001**number * 1e-6)
    bins = recent._current._store.bins
    assert len(bins) <= 2048


async def test_the_window_advances(autojump_clock):
    recent = Recent(60)
    latency = recent.latency("a")
    assert recent.latency("a") is latency
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recent.run)
        await trio.sleep(1)
        latency.observe(7)
        await trio.sleep(59)
        assert latency.quantiles().count == 1
        await trio.sleep(10)
        assert latency.quantiles().count == 0
        nursery.cancel_scope.cancel()


async def test_rates_cover_the_window(autojump_clock):
    count = {"a": 100.0}
    recent = Recent(60)
    rates = recent.rates(lambda: dict(count))
    assert rates.rates() == {"a": 0}  # nothing to compare with yet
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recent.run)
        await trio.sleep(2)
        count["a"] += 50
        assert rates.rates() == {"a": 25}  # of the time since the start, while that is shorter
        await trio.sleep(59)
        assert rates.rates() == {"a": pytest.approx(50 / 61)}
        await trio.sleep(9)
        assert rates.rates() == {"a": 0}
        for _ in range(120):
            await trio.sleep(1)
            count["a"] += 10
        assert rates.rates()["a"] == pytest.approx(10, rel=0.02)
        nursery.cancel_scope.cancel()


async def test_a_new_counter_has_no_rate_yet(autojump_clock):
    count = {"a": 1.0}
    rates = RecentRates(lambda: dict(count))
    rates.end_part()
    await trio.sleep(1)
    count["b"] = 1000.0
    assert rates.rates() == {"a": 0, "b": 0}
