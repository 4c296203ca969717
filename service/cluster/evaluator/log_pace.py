"""The pace of early judging on a cluster: a function of the log, so that every owner of a partition
decides alike."""

from __future__ import annotations

from typing import Any

from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import POSITION_COUNT, SPANS
from betrace.service.traces.reading_pace import ReadingPace

FRAME_SECONDS = 0.02  # of log time, for each frame that is read
SPAN_SECONDS = 0.0005  # and for each span of the trace
BURST_SECONDS = 4.0
OPEN_REMEMBERED = 20_000  # traces


class LogPace(ReadingPace):
    """Its clock is log time; what reading costs is estimated from frames and spans."""

    def __init__(self) -> None:
        self.log_ns = 0
        """Log time now."""
        super().__init__(1.0, BURST_SECONDS, lambda: self.log_ns / 1e9, OPEN_REMEMBERED)

    def _expected(self, due: DueTraces, k: int) -> float:
        frames, spans = due.rows[k, [POSITION_COUNT, SPANS]].tolist()
        return float(frames * FRAME_SECONDS + spans * SPAN_SECONDS)

    def saved(self) -> dict[str, Any]:
        """The state as JSON, for a snapshot."""
        known = [[*key, spans, sorted(rules)] for key, (spans, rules) in self._known.items()]
        return {"left": self._left, "since": self._since, "known": known}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what :meth:`saved` returned."""
        self._left, self._since = saved["left"], saved["since"]
        self._known = {
            (tenant, hi, lo): (spans, frozenset(rules))
            for tenant, hi, lo, spans, rules in saved["known"]
        }
