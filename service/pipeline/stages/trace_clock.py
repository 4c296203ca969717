"""The clock of trace-correlation: which traces are due because time passed or there are too many.

A trace is due at its end, when it was idle for a while or is too old. Above the limit of open
traces, those that were idle longest are closed early. Closed traces stay in memory for late spans,
and are forgotten when they were closed long ago or are too many.
"""

from __future__ import annotations

from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.stages.backlog import Backlog
from betrace.service.traces.due import DueTraces
from betrace.service.traces.eviction import forget_closed, idle_longest
from betrace.service.traces.survey import MemorySurvey, survey_tables
from betrace.service.traces.table import TraceTable

SURVEY_NS = 1_000_000_000
MOST_KEPT = 10  # multiple of the configured closed traces that is kept while stores are behind
LOOKED_AT = 128  # tables searched in one tick: each due piece costs as much as ten traces


class TraceClock:
    """Finds what is due by the clock. All methods are called with the lock of ``traces`` held.

    Traces with spans in the ``backlog`` are not idle.
    """

    def __init__(self, traces: OpenTraces, backlog: Backlog) -> None:
        self._traces = traces
        self._limits = traces.limits
        self._backlog = backlog
        self._last_sweep_ns = 0
        self._next_table = 0  # where the search for idle traces continues
        self._resumed_ns = 0
        self._rested_ns: dict[str, int] = {}  # when the backlog of a tenant ended
        self.survey = MemorySurvey()
        """Updated once a second."""
        traces.on_set_back = self._set_back

    def resumed(self) -> None:
        """Idle times start now."""
        self._resumed_ns = self._traces.time()

    def rested(self, tenant: str) -> None:
        """The backlog of a tenant ended: the idle times of its traces start now."""
        self._rested_ns[tenant] = self._traces.time()

    def forget(self, tenant: str) -> None:
        """Drop what is known of a tenant."""
        self._rested_ns.pop(tenant, None)

    def saved(self) -> list[int]:
        """The places where the searches continue, for a snapshot."""
        return [self._last_sweep_ns, self._next_table]

    def restore(self, saved: list[int]) -> None:
        """Continue from what :meth:`saved` returned."""
        self._last_sweep_ns, self._next_table = saved

    def close_due(self, found: list[DueTraces]) -> None:
        """Close traces that are idle or, at times, too old, and enforce the limits. What is due is
        added to ``found``."""
        traces, limits = self._traces, self._limits
        now = traces.time()
        traces.pass_on(found)
        before = len(found)
        sweep = now - self._last_sweep_ns >= limits.sweep_ns
        if sweep:
            self._last_sweep_ns = now
        if not 0 <= now - self._resumed_ns < limits.idle_ns:
            tables = [table for table in traces.tables() if not self._is_waiting(table, now)]
            for table in self._in_turn(tables):
                table.close_idle(now - limits.idle_ns, now, found)
            for table in tables if sweep else ():
                table.close_old(now - limits.max_age_ns, now, found)
        traces.counts.closed += sum(len(due) for due in found[before:])
        self.enforce_limits(now, found)
        for tenant, its in list(traces.tenants.items()) if sweep else ():
            if not its.open_count and not its.closed_count:
                del traces.tenants[tenant]
        if not 0 <= now - self.survey.taken_ns < SURVEY_NS:
            self.survey = survey_tables(traces.tables(), traces.totals, now)

    def enforce_limits(self, now: int, found: list[DueTraces]) -> None:
        """Close open traces above the limit; forget traces closed long ago, and the oldest closed
        ones above the limit."""
        traces, limits = self._traces, self._limits
        totals, late = traces.totals, traces.late
        tables = traces.tables()
        excess = totals.open - limits.most_open
        for table, slots in idle_longest(tables, excess) if excess > 0 else ():
            found.append(table.close(slots, now))
            traces.counts.closed_for_room += len(slots)
            traces.counts.closed += len(slots)
        excess = totals.closed - limits.keep
        lag_ns = limits.index_lag_ns
        # Above MOST_KEPT even closed traces that are not in the index yet may be forgotten.
        if totals.closed <= MOST_KEPT * limits.keep:
            lag_ns += traces.in_flight.oldest_ns()
            if late.behind():
                excess, lag_ns = 0, now
        long_ago = now - max(limits.keep_ns, lag_ns)
        forget_closed(tables, long_ago, now - lag_ns, excess, late.closed)
        for its in traces.tenants.values() if len(tables) > len(traces.tenants) else ():
            its.drop_empty()

    def _is_waiting(self, table: TraceTable, now: int) -> bool:
        """Whether spans of the table's traces may be in the backlog, or were until now: such traces
        are not idle."""
        if table.tenant in self._backlog:
            return True
        rested = self._rested_ns.get(table.tenant)
        if rested is None:
            return False
        if not 0 <= now - rested < self._limits.idle_ns:
            del self._rested_ns[table.tenant]
            return False
        return True

    def _in_turn(self, tables: list[TraceTable]) -> list[TraceTable]:
        """The tables to search in this tick: all if there are few, each once in two seconds if
        there are thousands."""
        start = self._next_table if self._next_table < len(tables) else 0
        self._next_table = start + max(LOOKED_AT, len(tables) // 8)
        return tables[start : self._next_table]

    def _set_back(self, by: int) -> None:
        self._last_sweep_ns += by
        self._rested_ns = {tenant: at + by for tenant, at in self._rested_ns.items()}
        self._resumed_ns += by
