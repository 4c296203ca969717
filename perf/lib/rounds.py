"""Measures calls in rounds: some to warm up, then those that count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from perf.lib.quantiles import value_at
from perf.report import output

WARM_UP, ROUNDS = 3, 5
ROUND_SECONDS = 0.2

Json = dict[str, Any]


class Rounds:
    """Measured rounds: wall-clock time and CPU of this process, and single calls for
    percentiles."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []
        self._single: list[float] = []

    def add(self, wall: float, cpu: float, calls: Sequence[float]) -> None:
        """Add a measured round; all times in seconds."""
        self._wall.append(wall / len(calls))
        self._cpu.append(cpu / len(calls))
        self._single.extend(calls)

    def result(self, items: int) -> Json:
        """Return microseconds a call, and items a second."""
        ordered = sorted(self._single)
        return {
            "items": items,
            "wall_us": output.spread([1e6 * w for w in self._wall], 1),
            "cpu_us": output.spread([1e6 * c for c in self._cpu], 1),
            "p50_us": round(1e6 * value_at(ordered, 0.5), 1),
            "p99_us": round(1e6 * value_at(ordered, 0.99), 1),
            "calls": len(ordered),
            "items_per_second": round(items / statistics.median(self._wall)),
        }


Taken = tuple[float, float]  # seconds of wall clock, of CPU


def timed(call: Callable[[], object]) -> Taken:
    """Call, and return the time taken."""
    cpu, began = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - began, time.process_time() - cpu


def rounds(items: int, call: Callable[[], Taken | None], seconds: float | None = None) -> Json:
    """Measure calls in rounds. A call of which only a part counts returns that part's time."""
    found = Rounds()
    for i in range(WARM_UP + ROUNDS):
        taken: list[float] = []
        own_cpu = 0.0
        cpu = time.process_time()
        end = time.perf_counter() + (ROUND_SECONDS if seconds is None else seconds)
        while time.perf_counter() < end or not taken:
            began = time.perf_counter()
            own = call()
            taken.append(time.perf_counter() - began if own is None else own[0])
            own_cpu += own[1] if own is not None else 0.0
        cpu = own_cpu or time.process_time() - cpu
        if i >= WARM_UP:
            found.add(sum(taken), cpu, taken)
    return found.result(items)


async def async_rounds(items: int, call: Callable[[], Awaitable[None]]) -> Json:
    """Like :func:`rounds`, for an async call."""
    found = Rounds()
    for i in range(WARM_UP + ROUNDS):
        taken: list[float] = []
        cpu = time.process_time()
        end = time.perf_counter() + ROUND_SECONDS
        while time.perf_counter() < end or not taken:
            began = time.perf_counter()
            await call()
            taken.append(time.perf_counter() - began)
        if i >= WARM_UP:
            found.add(sum(taken), time.process_time() - cpu, taken)
    return found.result(items)
