"""The pace of early judging on a cluster: a function of the log, so that every owner of a partition
decides alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import POSITION_COUNT, SPANS
from betrace.service.traces.reading_pace import ReadingPace

FRAME_NS = 20_000_000  # of log time, for each frame that is read
SPAN_NS = 500_000  # and for each span of the trace
BURST_NS = 4_000_000_000
OPEN_REMEMBERED = 20_000  # traces


class LogPace(ReadingPace):
    """Its clock is log time; what reading costs is estimated from frames and spans."""

    def __init__(self) -> None:
        self.log_ns = 0
        """Log time now."""
        super().__init__(1, BURST_NS, lambda: self.log_ns, OPEN_REMEMBERED)

    def _expected_ns(self, due: DueTraces, k: int) -> int:
        frames, spans = due.rows[k, [POSITION_COUNT, SPANS]].tolist()
        return int(frames * FRAME_NS + spans * SPAN_NS)

    def _cost_ns(self, due: DueTraces, read: Iterable[int], seconds: float) -> int:
        return sum(self._expected_ns(due, k) for k in read)

    def saved(self) -> dict[str, Any]:
        """The state as JSON, for a snapshot."""
        known = [[*key, spans, sorted(rules)] for key, (spans, rules) in self._known.items()]
        return {"left_ns": self._left_ns, "since_ns": self._since_ns, "known": known}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what :meth:`saved` returned."""
        self._left_ns, self._since_ns = saved["left_ns"], saved["since_ns"]
        self._known = {
            (tenant, hi, lo): (spans, frozenset(rules))
            for tenant, hi, lo, spans, rules in saved["known"]
        }
