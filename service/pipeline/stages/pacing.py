"""How often DuckDB commits: decided by the cost of a commit, not by a timer for each tenant.

A commit costs about the same whether it writes one row or fifty, so the number of commits decides
what writing costs, both with hundreds of tenants and when there is little to do. Commits share a
budget of CPU time, a token bucket. It earns a fraction of the CPU time that the process uses, up to
``cores``, and holds enough for a burst: after a quiet time rows are written at once, under a steady
load they wait until there are many. Commits with signals have a budget of their own, so they do not
wait behind commits of closed traces.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

URGENT_SHARES = 5  # times the budget of other commits
BURST_SECONDS = 0.1  # of CPU time
_FRACTION = 0.03  # of the CPU time that the process uses
_LEAST_CORES = 0.001
_ROUNDING = 1e-9
_PERIOD = 1.0  # seconds between two measurements of the CPU that the process uses
_WEIGHT = 0.05  # of a new measurement in the mean
_FIRST_COST = 0.003  # seconds, until some were measured
_ROWS_OF_A_COMMIT = 300  # that cost about as much as an empty commit


class CommitPace:
    """A :class:`betrace.channels.Pace` that limits the CPU time of commits to ``cores``, and that
    of commits with signals to five times as much. ``cpu_seconds`` returns the CPU time that the
    process has used. Use it on the Trio thread."""

    def __init__(self, cores: float, cpu_seconds: Callable[[], float] = time.process_time) -> None:
        self._most = cores
        self._cpu_seconds = cpu_seconds
        self._rate = min(cores, _LEAST_CORES)
        self._looked: tuple[float, float] | None = None  # time, CPU seconds
        self._budgets = {False: _Budget(1), True: _Budget(URGENT_SHARES)}
        self.active = False
        """False until the log was read after a restart, because its late spans need the rows."""
        self.cost = _FIRST_COST
        """CPU seconds of a commit without its rows, as a moving average."""

    def due(self, urgent: bool) -> float:
        """The time from which the next commit may start; 0 if it may start now."""
        if not self.active:
            return 0.0
        now = trio.current_time()
        self._look(now)
        return self._budgets[urgent].reaches(self.cost, now, self._rate)

    def taken(self, urgent: bool) -> None:
        """Note that a commit starts now."""
        self._budgets[urgent].spend(self.cost, trio.current_time(), self._rate)

    def observe(self, seconds: float, rows: int) -> None:
        """Note that a commit of so many rows took so much CPU time."""
        cost = seconds * _ROWS_OF_A_COMMIT / (_ROWS_OF_A_COMMIT + rows)
        self.cost += _WEIGHT * (cost - self.cost)

    def _look(self, now: float) -> None:
        """Set the rate from the CPU time used since the last measurement."""
        if self._looked is not None and now - self._looked[0] < _PERIOD:
            return
        used = self._cpu_seconds()
        if self._looked is not None:
            cores = (used - self._looked[1]) / (now - self._looked[0])
            self._rate = min(self._most, _LEAST_CORES + _FRACTION * cores)
        self._looked = now, used


class _Budget:
    """A token bucket of CPU seconds that earns ``shares`` times the rate."""

    def __init__(self, shares: int) -> None:
        self._shares = shares
        self._seconds = BURST_SECONDS
        self._at = -1.0

    def reaches(self, cost: float, now: float, rate: float) -> float:
        """The time when the budget reaches ``cost`` seconds; 0 if it has them."""
        self._earn(now, rate)
        missing = min(cost, BURST_SECONDS) - self._seconds
        return 0.0 if missing <= _ROUNDING else now + missing / (self._shares * rate)

    def spend(self, cost: float, now: float, rate: float) -> None:
        self._earn(now, rate)
        self._seconds -= cost

    def _earn(self, now: float, rate: float) -> None:
        if self._at >= 0:
            earned = self._seconds + (now - self._at) * self._shares * rate
            self._seconds = min(earned, BURST_SECONDS)
        self._at = now
