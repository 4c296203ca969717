"""projection: signals and closed traces go to DuckDB, which answers queries.

With many tenants DuckDB's commits are the scarce resource, so rows wait until there are many of
them. The stage writes one tenant at a time, at the pace of
:class:`betrace.service.pipeline.stages.pacing.CommitPace`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from betrace.channels import TransientError
from betrace.service.pipeline import letter_codec
from betrace.service.pipeline.breakers import PoisonError
from betrace.service.pipeline.fallback import Fallback, GuardedStore
from betrace.service.pipeline.progress import InFlight
from betrace.service.pipeline.stages.pacing import CommitPace
from betrace.service.pipeline.trace_rows import frame_columns, trace_tables
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreCorrupt, StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.telemetry.latencies import Latencies
from betrace.service.traces.verdicts import Decided

STAGE = "projection"


class ProjectStage:
    """The handler of the projection stage: a batch holds the rows of one tenant.

    Rows that DuckDB does not accept now go to its fallback files; rows that can never be written
    become dead letters.
    """

    def __init__(
        self,
        duckdb: GuardedStore[DuckStore],
        in_flight: InFlight,
        pace: CommitPace,
        latencies: Latencies,
    ) -> None:
        self._duckdb = duckdb
        self._in_flight = in_flight
        self.pace = pace
        self._latencies = latencies
        self.rows = 0
        """Signals and traces written to DuckDB."""
        self.fallback: Fallback[Decided] = Fallback(
            "duckdb",
            duckdb.files,
            letter_codec.decided_to_bytes,
            letter_codec.decided_from_bytes,
            self._write_back,
            latencies.fallback.labels("duckdb").observe,
        )

    async def handle(self, batch: list[Decided]) -> None:
        """Write a tenant's signals, traces and positions in one transaction."""
        unavailable = (StoreError, PoolTimeout, OSError)
        await self.fallback.store_or_put(batch, self._insert, unavailable)
        for decided in batch:
            self._in_flight.leave(decided.ticket)

    async def _write_back(self, batch: list[Decided]) -> None:
        by_tenant: dict[str, list[Decided]] = {}
        for decided in batch:
            by_tenant.setdefault(decided.tenant, []).append(decided)
        for rows in by_tenant.values():
            try:
                await self._insert(rows)
            except (StoreError, PoolTimeout) as error:
                raise TransientError(str(error)) from error
            except PoisonError:
                await self._write_one_by_one(rows)

    async def _write_one_by_one(self, rows: list[Decided]) -> None:
        for decided in rows:
            try:
                await self._insert([decided])
            except (StoreError, PoolTimeout) as error:
                raise TransientError(str(error)) from error
            except PoisonError as error:
                await self._duckdb.bury(STAGE, [decided], error, 1)

    async def _insert(self, batch: Sequence[Decided]) -> None:
        written = await self._duckdb.breaker.call(self._call, batch)
        self.rows += written  # after the call, because other batches are counted during it

    async def _call(self, batch: Sequence[Decided]) -> int:
        started = time.perf_counter()
        rows, cpu = await self._duckdb.threads.run(self._write, batch, abandon_on_cancel=True)
        self._latencies.duckdb.observe(time.perf_counter() - started)
        self.pace.observe(cpu, rows)
        return rows

    def _write(self, batch: Sequence[Decided]) -> tuple[int, float]:
        """The number of rows written, and the CPU seconds that this took."""
        began = time.thread_time()
        signals = [signal for decided in batch for signal in decided.signals]
        closed = [d.closed for d in batch if d.closed is not None]
        spilled = [d.spilled for d in batch if d.spilled is not None]
        try:
            self._duckdb.store.write(
                batch[0].tenant,
                signals=signals,
                traces=trace_tables(closed) if closed else None,
                frames=frame_columns(np.concatenate(spilled)) if spilled else None,
            )
        except StoreError as error:
            if error.transient or isinstance(error, StoreCorrupt):  # which is rebuilt
                raise
            raise PoisonError(str(error)) from error  # of this tenant's file, or of these rows
        rows = len(signals) + sum(map(len, closed))
        return rows, time.thread_time() - began
