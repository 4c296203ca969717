"""Log time: the clock of a partition, made of the server's timestamps of its messages.

Each step from one message to the next is clamped, so a server's clock that jumps, a new leader with
another clock, and an outage neither stop this clock nor let it run ahead. Log time therefore lags
behind the wall clock after outages; what people see is shifted by the difference.
"""

from __future__ import annotations

BOUNDARY_NS = 250_000_000
"""Groups of messages end at multiples of this."""
CLOSE_EVERY = 4
"""Traces are closed once in this many boundaries, before the message that crosses the boundary is
folded. Deciding few traces costs as much as deciding many."""
MOST_STEP_NS = 2_000_000_000
EARLY_NS = 60_000_000_000
"""Messages of a new partition that were stored before its parent's last one are at most this much
older, unless the server's clock was set back."""


class LogTime:
    """The clock. It begins with the timestamp of the first message."""

    __slots__ = ("_inherited_ns", "now_ns", "server_ns")

    def __init__(self) -> None:
        self.now_ns = 0
        """Log time of the last message."""
        self.server_ns = 0
        """The server's timestamp of that message."""
        self._inherited_ns = 0  # of the parent's last message, until a later one comes

    def of(self, server_ns: int) -> int:
        """The log time of the next message."""
        if not self.server_ns:
            return server_ns
        if self._is_early(server_ns):
            return self.now_ns
        return self.now_ns + min(max(server_ns - self.server_ns, 0), MOST_STEP_NS)

    def advance(self, server_ns: int) -> int:
        """Move to the next message; returns by how much."""
        before, self.now_ns = self.now_ns, self.of(server_ns)
        if not self._is_early(server_ns):
            self.server_ns = server_ns
            self._inherited_ns = 0
        return self.now_ns - before

    def _is_early(self, server_ns: int) -> bool:
        """Whether a message was stored while the parent's log was still read: its time has passed
        already, and must not be counted again."""
        return self._inherited_ns - EARLY_NS < server_ns < self._inherited_ns

    def inherit(self, saved: list[int]) -> None:
        """Continue the clock of another log, of which :meth:`saved` returned this."""
        self.restore(saved)
        self._inherited_ns = self.server_ns

    def saved(self) -> list[int]:
        """The clock as JSON, for a snapshot."""
        return [self.now_ns, self.server_ns, self._inherited_ns]

    def restore(self, saved: list[int]) -> None:
        """Continue from what :meth:`saved` returned."""
        self.now_ns, self.server_ns = saved[:2]
        self._inherited_ns = sum(saved[2:])  # former snapshots do not have it
