"""Sliding windows over long traces: the context in which a breach was seen.

Verdicts need no windows, because the fold forgets nothing that matters. But the reader of a trace
of a million spans wants to know where the breach was. Windows of a fixed number of spans, in order
of arrival, each starting within the one before, number the places, and the ids of the spans that
arrived last are kept.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """Traces of more than ``long_lived`` spans have windows of ``size`` spans, each of which shares
    the fraction ``overlap`` with the one before."""

    long_lived: int = 1000
    size: int = 100
    overlap: float = 0.2

    @property
    def step(self) -> int:
        """Spans from the start of one window to the start of the next, at least 1."""
        return max(1, self.size - int(self.size * self.overlap))

    def at(self, spans: int) -> tuple[int, int]:
        """The window that shows the last of ``spans`` spans with the most spans before it, and the
        number of its first span; both count from 1."""
        behind = max(0, spans - self.size)
        number = -(-behind // self.step)
        return number + 1, number * self.step + 1
