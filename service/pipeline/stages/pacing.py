"""How often DuckDB commits: this depends on the cost of a commit, not on a timer per tenant.

A commit costs about the same whether it writes one row or fifty, so with hundreds of tenants most
of the cost of writing is commits. They may use a fixed share of a core: the more tenants have rows,
the longer each one's rows wait. Commits with signals have a share of their own, so that they do not
wait behind commits of closed traces.
"""

from __future__ import annotations

import trio

URGENT_SHARES = 5  # share of commits with signals, in shares of the others
_WEIGHT = 0.05  # of a new measurement in the moving mean
_FIRST_COST = 0.003  # seconds, before the first measurements
_ROWS_OF_A_COMMIT = 300  # rows that cost about as much as an empty commit


class CommitPace:
    """A :class:`betrace.channels.Pace` that limits commits to ``cores`` of CPU time; commits with
    signals may use five times as much. Used on the Trio thread."""

    def __init__(self, cores: float) -> None:
        self._cores = {False: cores, True: URGENT_SHARES * cores}
        self._next = {False: 0.0, True: 0.0}
        self.active = False
        """False until the log's tail is read after a restart: its late spans need the rows soon."""
        self.cost = _FIRST_COST
        """CPU seconds of a commit without its rows: a moving mean."""

    def due(self, urgent: bool) -> float:
        """When the next commit may start."""
        return self._next[urgent] if self.active else 0.0

    def taken(self, urgent: bool) -> None:
        """Note that a commit starts now."""
        self._next[urgent] = trio.current_time() + self.cost / self._cores[urgent]

    def observe(self, seconds: float, rows: int) -> None:
        """Note the CPU seconds that a commit of ``rows`` took."""
        cost = seconds * _ROWS_OF_A_COMMIT / (_ROWS_OF_A_COMMIT + rows)
        self.cost += _WEIGHT * (cost - self.cost)
