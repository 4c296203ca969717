"""The traces of a partition: those of the embedded engine, with log time as their clock.

In one process, tenants share the processor in slices, and what does not fit waits. A partition has
no slices, because its log determines the order in which spans are folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from betrace.service.config.settings import Settings
from betrace.service.otlp.columns import Rows, SpanBatch
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.stages.backlog import Backlog
from betrace.service.pipeline.stages.trace_clock import TraceClock
from betrace.service.rules.compile import CompiledRules
from betrace.service.signals import Signal
from betrace.service.traces.checkpoint import Snapshot
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import CLOSED, FIRST_SEEN, LAST_SEEN, STATE
from betrace.service.traces.limits import LateSpans, TraceLimits
from betrace.service.traces.tenant_traces import History, Recalled

Wanted = npt.NDArray[np.bool_]

INDEX_LAG_NS = 5_000_000_000
"""Closed traces stay in memory at least for this log time. By then query nodes should have them, so
that late spans need not wait."""
LEAST_FILTER_BYTES = 1 << 16


def partition_limits(settings: Settings, partitions: int) -> TraceLimits:
    """A partition's share of the limits in the settings. All evaluators must have the same."""
    limits = TraceLimits.of(settings)
    return replace(
        limits,
        keep=math.ceil(limits.keep / partitions),
        most_open=math.ceil(limits.most_open / partitions),
        index_lag_ns=INDEX_LAG_NS,
    )


class PartitionTraces:
    """Open and closed traces. ``history`` reads closed traces back, with times at the server."""

    def __init__(
        self,
        limits: TraceLimits,
        filter_bytes: int,
        rules_of: Callable[[str], CompiledRules],
        history: History,
    ) -> None:
        self.now_ns = 0
        """Log time of what is done next."""
        self.ahead_ns = 0
        """How much the server's time is ahead of log time."""
        self.recalled = 0
        self._history = history
        self._closed = ClosedTraces(max(filter_bytes, LEAST_FILTER_BYTES), b"")
        self._traces = OpenTraces(
            rules_of,
            limits,
            LateSpans(self._closed, self._recall),
            LogProgress(),
            InFlight(),
            lambda: self.now_ns,
        )
        self._clock = TraceClock(self._traces, Backlog())
        self.counts = self._traces.counts

    def seed(self, secret: bytes) -> None:
        """Set the secret of the filter. It is the same for all owners of the partition, because a
        false positive changes the order in which traces are opened."""
        self._closed.restore(self._closed.saved() | {"secret": secret.hex()}, self._closed.filters)

    def fold(self, batch: SpanBatch) -> None:
        """Fold a batch. If that fails, the same batch continues where it stopped."""
        with self._traces.lock:
            self._traces.fold(batch, None)

    def take_due(self, due: list[DueTraces]) -> None:
        """Add to ``due`` what became due since then, and enforce the limits."""
        with self._traces.lock:
            self._traces.pass_on(due)
            self._clock.enforce_limits(self.now_ns, due)

    def close(self, due: list[DueTraces]) -> None:
        """Close traces that are idle or too old, and add them to ``due``."""
        with self._traces.lock:
            self._clock.close_due(due)

    def forget(self, tenant: str) -> None:
        """Drop all traces of a tenant, because it was deleted."""
        with self._traces.lock:
            self._traces.forget(tenant)
            self._clock.forget(tenant)
        self._traces.progress.forget(tenant)

    def look_up(self, tenant: str, trace_id: str) -> DueTraces | None:
        """A copy of a trace, with the server's times. May be called from any thread; waits while a
        batch is folded."""
        found = self._traces.look_up(tenant, trace_id)
        if found is not None:
            found.rows[:, [FIRST_SEEN, LAST_SEEN]] += self.ahead_ns
        return found

    def reconsider(self, signals: Iterable[Signal]) -> None:
        """Give stored signals to their traces, and open those again that are closed and in memory:
        when they close, what does not hold is retracted."""
        signals = [each for each in signals if not each.early]
        self._traces.note_raised(signals)
        with self._traces.lock:
            for signal in signals:
                found = self._traces.find(signal.tenant, signal.trace_id)
                if found is not None:
                    table, slot = found
                    if table.arrays.slots[slot, STATE] == CLOSED:
                        table.reopen(slot, self.now_ns)
                        table.count()

    @property
    def open_count(self) -> int:
        """The number of open traces."""
        return sum(table.open_count for table in self._traces.tables())

    def rules_in_use(self) -> list[CompiledRules]:
        """The rules that traces were opened under."""
        return [table.rules for table in self._traces.tables()]

    def saved(self) -> tuple[Snapshot, Rows, dict[str, Any]]:
        """The traces, the filter's bits, and the rest as JSON, for a snapshot."""
        rest = {"filter": self._closed.saved(), "clock": self._clock.saved()}
        return self._traces.snapshot(), self._closed.filters.copy(), rest

    def restore(self, snapshot: Snapshot, filters: Rows, rest: dict[str, Any]) -> None:
        """Continue from what :meth:`saved` returned. Raises what
        :meth:`~betrace.service.pipeline.open_traces.OpenTraces.restore` raises."""
        self._traces.restore(snapshot)
        self._closed.restore(rest["filter"], filters)
        self._clock.restore(rest["clock"])
        self.now_ns = snapshot.taken_ns

    def keep(self, wanted: Callable[[str, Rows], Wanted]) -> None:
        """Drop all traces, open or closed, but those that are wanted: ``wanted`` returns for rows
        (hi, lo) of a tenant which of them are."""
        with self._traces.lock:
            self._traces.keep(wanted)

    def _recall(self, tenant: str, ids: Rows) -> Iterator[Recalled]:
        """Read closed traces back, with times as log time."""
        for found in self._history(tenant, ids):
            self.recalled += len(found.ids)
            if found.batch is None:
                yield found
                continue
            batches = map(self._in_log_time, chain([found.batch], found.more))
            yield replace(found, batch=next(batches), more=batches)

    def _in_log_time(self, batch: SpanBatch) -> SpanBatch:
        batch.received_ns -= self.ahead_ns
        return batch
