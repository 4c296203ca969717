"""Limits of open and closed traces, and what late spans need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from betrace.service.config.settings import Settings
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.tenant_traces import INDEX_LAG_NS, History
from betrace.service.traces.window import Windows

_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """When traces close, how long closed ones are kept (nanoseconds), how many of both there may
    be, and the windows of long traces."""

    idle_ns: int
    max_age_ns: int
    sweep_ns: int
    """Interval of the search for traces that are too old, and for tenants without traces."""
    keep_ns: int
    keep: int
    most_open: int
    windows: Windows = field(default_factory=Windows)
    index_lag_ns: int = INDEX_LAG_NS
    """How long closed traces are kept at least, because the index may not have them yet."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The limits in the settings."""
        traces, caches = settings.traces, settings.caches
        return cls(
            idle_ns=int(traces.idle_seconds * _SECOND),
            max_age_ns=int(traces.max_age_seconds * _SECOND),
            sweep_ns=int(traces.sweep_seconds * _SECOND),
            keep_ns=int(caches.trace_metadata_ttl_seconds * _SECOND),
            keep=caches.trace_metadata,
            most_open=traces.max_open,
            windows=Windows(traces.long_lived_spans, traces.window_spans, traces.window_overlap),
        )


@dataclass(frozen=True, slots=True)
class LateSpans:
    """What late spans need: a filter of closed traces, what the stores know of them, and whether
    the stores are behind, so that closed traces must stay in memory longer."""

    closed: ClosedTraces
    history: History
    behind: Callable[[], bool] = lambda: False
