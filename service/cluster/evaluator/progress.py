"""Which steps are stored in ``OUT_p``, and which of them the trace index needs."""

from __future__ import annotations

from collections import deque


class StoredSteps:
    """Traces that are in memory no longer were closed at least ``lag_ns`` of log time ago. The
    index must have the outputs of the steps until then."""

    def __init__(self, lag_ns: int) -> None:
        self._lag_ns = lag_ns
        self._taken: deque[tuple[int, int]] = deque()  # (log time, step) since then
        self._stored: deque[tuple[int, int]] = deque()  # (step, sequence in OUT_p)
        self._needed = 0  # step
        self._step = 0  # stored
        self.sequence = 0
        """The sequence of ``OUT_p`` that the index needs."""

    def begin(self, step: int, sequence: int) -> None:
        """Everything up to this step is stored at this sequence at the latest."""
        self._step = max(self._step, step)
        self.sequence = max(self.sequence, sequence)

    def taken(self, step: int, log_time_ns: int) -> None:
        """Note a step."""
        self._taken.append((log_time_ns, step))
        while self._taken[0][0] < log_time_ns - self._lag_ns:
            self._needed = self._taken.popleft()[1]
        self._update()

    def stored(self, step: int, sequence: int) -> None:
        """Note that ``OUT_p`` has all steps up to this one in the messages up to ``sequence``."""
        self._step = max(self._step, step)
        self._stored.append((step, sequence))
        self._update()

    def _update(self) -> None:
        while self._stored and self._stored[0][0] < self._needed:
            self._stored.popleft()
        if self._needed and self._stored and self._needed <= self._stored[0][0]:
            self.sequence = max(self.sequence, self._stored[0][1])

    def missing(self) -> str | None:
        """Why the index cannot be complete yet, or None."""
        if self._step >= self._needed:
            return None
        return f"step {self._needed} is not stored yet, only {self._step}"
