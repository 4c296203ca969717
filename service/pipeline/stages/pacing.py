"""How often DuckDB commits: chosen by what a commit costs, not by a clock for each tenant.

A commit costs about the same whether it writes one row or fifty, so with hundreds of tenants the
commits are what writing costs. They may take a fixed share of a core; then a tenant's rows wait
the longer, the more tenants have rows. Commits that carry signals have a share of their own, so
that they do not wait behind those of closed traces.
"""

from __future__ import annotations

import trio

URGENT_SHARES = 5  # of the plain ones
_WEIGHT = 0.05  # of a new measurement in the mean
_FIRST_COST = 0.003  # seconds, until some were measured
_ROWS_OF_A_COMMIT = 300  # that cost about as much as an empty commit


class CommitPace:
    """A :class:`channels.Pace` that lets commits have ``cores`` of CPU time, five times as much
    those that carry signals. On the Trio thread."""

    def __init__(self, cores: float) -> None:
        self._cores = {False: cores, True: URGENT_SHARES * cores}
        self._next = {False: 0.0, True: 0.0}
        self.held = False
        """False until the log's tail was read after a restart: its late spans ask for the rows."""
        self.cost = _FIRST_COST
        """CPU seconds of a commit apart from its rows: a moving mean."""

    def due(self, urgent: bool) -> float:
        """When the next commit may begin."""
        return self._next[urgent] if self.held else 0.0

    def taken(self, urgent: bool) -> None:
        """A commit begins now."""
        self._next[urgent] = trio.current_time() + self.cost / self._cores[urgent]

    def observe(self, seconds: float, rows: int) -> None:
        """A commit of so many rows took so much CPU time."""
        cost = seconds * _ROWS_OF_A_COMMIT / (_ROWS_OF_A_COMMIT + rows)
        self.cost += _WEIGHT * (cost - self.cost)
