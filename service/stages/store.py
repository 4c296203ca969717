"""storage-write: signals go to the ledger, which is the record of them, then signals and closed
traces to DuckDB, the projection that is queried.

The ledger is written as soon as something is there: what arrives while a write runs makes the next
batch. DuckDB's commits are what is scarce with many tenants, so its rows wait to be many: they go
through a channel of their own to the projection stage, which writes a tenant at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from channels import SendChannel, ThreadRunner, TransientError
from service.ledger.base import Ledger, LedgerError
from service.metrics import Latencies
from service.signals import Signal
from service.stages.evaluate import Decided
from service.storage.duck import DuckStore, PoolTimeout, StoreError
from service.traces.index import frame_columns, trace_table
from service.traces.progress import InFlight


@dataclass(slots=True)
class StoreCounts:
    """What the two stages have done."""

    signals: int = 0
    """New in the ledger."""
    repeated: int = 0
    """Signals that the ledger had already."""
    rows: int = 0
    """Signals and traces written to DuckDB."""


class StoreStage:
    """The handler of the storage-write stage. ``stored`` is told of new signals."""

    def __init__(
        self,
        ledger: Ledger,
        threads: ThreadRunner,
        onward: SendChannel[Decided],
        stored: Callable[[list[Signal]], None],
        batch_signals: int,
        counts: StoreCounts,
        latencies: Latencies,
        clock_ns: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._threads = threads
        self._onward = onward
        self._stored = stored
        self._batch = batch_signals
        self.counts = counts
        self._latencies = latencies
        self._clock_ns = clock_ns

    async def handle(self, batch: list[Decided]) -> None:
        """Record the signals of a batch, then pass it on to the projection."""
        signals = [signal for decided in batch for signal in decided.signals]
        for start in range(0, len(signals), self._batch):
            chunk = signals[start : start + self._batch]
            started = time.perf_counter()
            try:
                new = await self._threads.run(self._ledger.record, chunk)
            except LedgerError as error:
                if error.transient:
                    raise TransientError(str(error)) from error
                raise
            self._latencies.ledger.observe(time.perf_counter() - started)
            fresh = [signal for signal, is_new in zip(chunk, new, strict=True) if is_new]
            self.counts.signals += len(fresh)
            self.counts.repeated += len(chunk) - len(fresh)
            if fresh:
                self._stored(fresh)
        now = self._clock_ns()
        for decided in batch:
            if decided.signals:
                self._latencies.end_to_end.observe((now - decided.due_ns) / 1e9)
            await self._onward.send(decided)


class ProjectStage:
    """The handler of the projection stage: batches hold one tenant's rows."""

    def __init__(
        self,
        store: DuckStore,
        threads: ThreadRunner,
        counts: StoreCounts,
        in_flight: InFlight,
        latencies: Latencies,
    ) -> None:
        self._store = store
        self._threads = threads
        self._counts = counts
        self._in_flight = in_flight
        self._latencies = latencies

    async def handle(self, batch: list[Decided]) -> None:
        """Write a tenant's signals, traces and positions in one transaction."""
        started = time.perf_counter()
        try:
            self._counts.rows += await self._threads.run(self._write, batch)
        except (StoreError, PoolTimeout) as error:
            if isinstance(error, PoolTimeout) or error.transient:
                raise TransientError(str(error)) from error
            raise
        self._latencies.duckdb.observe(time.perf_counter() - started)
        for decided in batch:
            self._in_flight.leave(decided.ticket)

    def _write(self, batch: list[Decided]) -> int:
        signals = [signal for decided in batch for signal in decided.signals]
        traces = [trace_table(d.closed) for d in batch if d.closed is not None]
        spilled = [d.spilled for d in batch if d.spilled is not None]
        self._store.write(
            batch[0].tenant,
            signals=signals,
            traces=pa.concat_tables(traces) if traces else None,
            frames=frame_columns(np.concatenate(spilled)) if spilled else None,
        )
        return len(signals) + sum(len(table) for table in traces)
