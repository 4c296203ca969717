"""A survey of the traces in memory, for people and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from betrace.service.traces.layout import NEVER, TraceTotals
from betrace.service.traces.table import TraceTable


@dataclass(frozen=True, slots=True)
class MemorySurvey:
    """The traces in memory at one time (nanoseconds)."""

    taken_ns: int = 0
    open: int = 0
    closed: int = 0
    """Closed traces kept for late spans."""
    long_lived: int = 0
    """Open traces long enough to have windows."""
    spans: int = 0
    """Span ids of open traces, kept to recognize repeated spans."""
    nbytes: int = 0
    oldest_ns: int = NEVER
    """When the first span of the oldest open trace arrived; ``NEVER`` without open traces."""


def survey_tables(tables: Sequence[TraceTable], totals: TraceTotals, now: int) -> MemorySurvey:
    """The survey at ``now``. Costs a pass over the slots of all tables."""
    found = [table.survey() for table in tables]
    return MemorySurvey(
        now,
        open=totals.open,
        closed=totals.closed,
        long_lived=sum(each.long_lived for each in found),
        spans=sum(each.spans for each in found),
        nbytes=sum(each.nbytes for each in found),
        oldest_ns=min((each.oldest_ns for each in found), default=NEVER),
    )
