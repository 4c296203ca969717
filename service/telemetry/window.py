"""Rates and latencies of the last minute or so, in bounded memory.

The window (``metrics.window_seconds``) is divided into :data:`PARTS`. Results cover the current
part and the last :data:`PARTS` complete ones. Each part has a DDSketch of latencies: buckets on a
logarithmic scale, so the relative error of a quantile is at most :data:`RELATIVE_ERROR` for any
distribution (Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile sketch with
relative-error guarantees", VLDB 2019). Rates are differences of existing counters, which are read
when a part ends. So a batch costs one addition to a sketch, and a span costs nothing. Everything
here runs on the Trio thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio
from ddsketch import LogCollapsingLowestDenseDDSketch

PARTS = 12
RELATIVE_ERROR = 0.01
_BUCKETS = 2048  # 1 ns to 10^8 s takes fewer at 1 %, so none ever collapse


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Latency quantiles in seconds; None if nothing was observed in the window."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None


class RecentLatency:
    """The latencies of one kind of work within the window."""

    def __init__(self) -> None:
        self._current = _sketch()
        self._whole: deque[LogCollapsingLowestDenseDDSketch] = deque(maxlen=PARTS)
        self._merged = _sketch()

    def observe(self, seconds: float) -> None:
        """Record one latency in seconds."""
        self._current.add(seconds)

    def end_part(self) -> None:
        """Begin the next part, and drop the oldest."""
        self._whole.append(self._current)
        self._current = _sketch()
        self._merged = _sketch()
        for part in self._whole:
            self._merged.merge(part)

    def quantiles(self) -> Quantiles:
        """The quantiles over the window."""
        found = _sketch()
        found.merge(self._merged)
        found.merge(self._current)
        p50, p95, p99 = (found.get_quantile_value(q) for q in (0.5, 0.95, 0.99))
        return Quantiles(int(found.count), p50, p95, p99)


def _sketch() -> LogCollapsingLowestDenseDDSketch:
    return LogCollapsingLowestDenseDDSketch(RELATIVE_ERROR, _BUCKETS)


class RecentRates:
    """The growth rates of counters, by name. ``read`` returns their current values."""

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read
        # One more than the parts, because the first is the start of the oldest part.
        self._past: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=PARTS + 1)

    def end_part(self) -> None:
        """Read the counters, and drop the oldest reading."""
        self._past.append((trio.current_time(), self._read()))

    def rates(self) -> dict[str, float]:
        """Growth per second over the window, or since the first :meth:`end_part` if that was later.
        The rate is 0 before it, and for a counter that did not exist then."""
        now, counters = trio.current_time(), self._read()
        then, before = self._past[0] if self._past else (now, counters)
        elapsed = now - then
        if elapsed <= 0:
            return dict.fromkeys(counters, 0.0)
        return {
            name: (value - before.get(name, value)) / elapsed for name, value in counters.items()
        }


class Recent:
    """All latencies and rates of a service over one window of ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._part_seconds = seconds / PARTS
        self._latencies: dict[str, RecentLatency] = {}
        self._rates: list[RecentRates] = []

    def latency(self, name: str) -> RecentLatency:
        """The latencies with this name, created on first use."""
        return self._latencies.setdefault(name, RecentLatency())

    def rates(self, read: Callable[[], Mapping[str, float]]) -> RecentRates:
        """The rates of the counters that ``read`` returns."""
        rates = RecentRates(read)
        self._rates.append(rates)
        return rates

    async def run(self) -> None:
        """Advance the window, forever."""
        while True:
            for rates in self._rates:
                rates.end_part()
            await trio.sleep(self._part_seconds)
            for latency in list(self._latencies.values()):
                latency.end_part()
                await trio.lowlevel.checkpoint()  # merging takes a millisecond or two
