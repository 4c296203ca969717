"""Sliding windows over long traces: the context in which a breach was seen.

Verdicts need no windows, since the fold forgets nothing that matters. But of a trace of a million
spans a reader wants to know where the breach was: windows of a fixed number of spans, in the order
of their arrival, each beginning within the one before, number the places; and the spans that
arrived last are kept by id.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """Traces of more than ``long_lived`` spans have windows of ``size`` spans, of which the share
    ``overlap`` lies in the window before."""

    long_lived: int = 1000
    size: int = 100
    overlap: float = 0.2

    @property
    def step(self) -> int:
        """Spans from the beginning of a window to that of the next, at least 1."""
        return max(1, self.size - int(self.size * self.overlap))

    def at(self, spans: int) -> tuple[int, int]:
        """The window, counted from 1, in which the last of ``spans`` spans lies with the most spans
        before it; and the number of the first span in it, from 1."""
        behind = max(0, spans - self.size)
        number = -(-behind // self.step)
        return number + 1, number * self.step + 1
