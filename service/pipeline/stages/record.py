"""storage-write: signals go to the ledger, which is the record of them, then signals and closed
traces to DuckDB, the projection that is queried.

The ledger is written as soon as something is there: what arrives while a write runs makes the next
batch. DuckDB's commits are what is scarce with many tenants, so its rows wait to be many: they go
through a channel of their own to the projection stage, which writes a tenant at a time, at the pace
of :class:`betrace.service.pipeline.stages.pacing.CommitPace`.

Each store is called under a circuit breaker. What it does not take, whatever the reason, goes to
local files and from there to the store when it is back (:mod:`service.fallback`); where the files
cannot be written either, the stage waits, and the channels before it fill up to the edge, which
refuses. Only an item that a store can never take becomes a dead letter.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import orjson
import trio
from cachetools import LRUCache

from betrace.channels import (
    Breaker,
    BreakerOpen,
    BreakerTimeout,
    SendChannel,
    ThreadRunner,
    ThreadTimeout,
    TransientError,
)
from betrace.service.pipeline import letter_codec as letters
from betrace.service.pipeline.breakers import PoisonError
from betrace.service.pipeline.fallback import RETRY_SECONDS, Fallback
from betrace.service.pipeline.progress import InFlight
from betrace.service.pipeline.stages.evaluate import Decided
from betrace.service.pipeline.stages.pacing import CommitPace
from betrace.service.pipeline.trace_rows import frame_columns, trace_tables
from betrace.service.signals import Signal
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.fallback_files import FallbackFiles, FallbackFull
from betrace.service.storage.ledger.base import Ledger, LedgerError, RefusedError, transfer
from betrace.service.telemetry.latencies import Latencies

STORAGE = "storage-write"
PROJECTION = "projection"

MOST_UNSURE = 100_000  # signals of failed calls that are remembered
_REFUSED = (BreakerOpen, BreakerTimeout, ThreadTimeout)


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
    """The handler of the storage-write stage. ``stored`` is told of new signals; ``files`` take
    what the ledger does not; ``bury`` what it never takes, of what was in the files."""

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
        breaker: Breaker,
        files: FallbackFiles,
        bury: Callable[[str, list[Decided], Exception, int], Awaitable[None]],
    ) -> None:
        self._ledger = ledger
        self._bury = bury
        self._threads = threads
        self._onward = onward
        self._stored = stored
        self._batch = batch_signals
        self.counts = counts
        self._latencies = latencies
        self._clock_ns = clock_ns
        self._breaker = breaker
        self._unsure: LRUCache[str, None] = LRUCache(MOST_UNSURE)  # recorded, but nobody said so
        self.fallback: Fallback[Signal] = Fallback(
            "ledger",
            files,
            _to_line,
            _from_line,
            self._write_back,
            latencies.fallback.labels("ledger").observe,
        )

    async def handle(self, batch: list[Decided]) -> None:
        """Make the signals of a batch safe, then pass it on to the projection."""
        signals = [signal for decided in batch for signal in decided.signals]
        for start in range(0, len(signals), self._batch):
            await self._keep(signals[start : start + self._batch])
        now = self._clock_ns()
        for decided in batch:
            if decided.signals:
                self._latencies.end_to_end.observe((now - decided.due_ns) / 1e9)
            await self._onward.send(decided)

    async def _keep(self, chunk: list[Signal]) -> None:
        """Return when the ledger or its files have the signals."""
        while True:
            if not self.fallback.pending:
                try:
                    refused = await self._record(chunk)
                except (*_REFUSED, LedgerError, OSError):
                    pass
                else:
                    if refused:
                        raise PoisonError("; ".join(f"signal {s.id}: {r}" for s, r in refused))
                    return
            try:
                await self.fallback.put(chunk)
            except (FallbackFull, OSError):
                await self.fallback.room(RETRY_SECONDS)
            else:
                return

    async def _write_back(self, signals: list[Signal]) -> None:
        for start in range(0, len(signals), self._batch):
            try:
                refused = await self._record(signals[start : start + self._batch])
            except LedgerError as error:
                raise TransientError(str(error)) from error
            for signal, reason in refused:
                alone = Decided(signal.tenant, [signal], None)
                await self._bury(STORAGE, [alone], PoisonError(f"signal {signal.id}: {reason}"), 1)

    async def _record(self, chunk: list[Signal]) -> list[tuple[Signal, str]]:
        """Record signals; those that the ledger refuses for ever, and why. What a call that failed
        may have recorded is new when it is found there."""
        try:
            new, refused = await self._breaker.call(self._call, chunk)
        except (BreakerTimeout, ThreadTimeout, LedgerError, OSError):
            self._unsure.update(dict.fromkeys(signal.id for signal in chunk))
            raise
        unsure = self._unsure
        fresh = [
            signal
            for signal, is_new in zip(chunk, new, strict=True)
            if (signal.id in unsure and unsure.pop(signal.id, True) is None) or is_new
        ]
        self.counts.signals += len(fresh)
        self.counts.repeated += len(chunk) - len(fresh) - len(refused)
        if fresh:
            self._stored(fresh)
        return [(chunk[index], reason) for index, reason in refused.items()]

    async def _call(self, chunk: list[Signal]) -> tuple[list[bool], dict[int, str]]:
        started, began = time.perf_counter(), time.monotonic()
        try:
            outcome = await self._threads.run(self._try, chunk, abandon_on_cancel=True)
        except trio.Cancelled:
            self._ledger.replace(began)
            raise
        self._latencies.ledger.observe(time.perf_counter() - started)
        return outcome

    def _try(self, chunk: list[Signal]) -> tuple[list[bool], dict[int, str]]:
        try:
            return self._ledger.record(chunk), {}
        except RefusedError as error:  # the ledger works
            return error.new, error.refused
        except LedgerError as error:
            if not error.transient:  # is it the ledger, or one of the signals?
                for signal in chunk:
                    _check(signal)
            raise


def _check(signal: Signal) -> bytes:
    """The signal as JSON. Raises :exc:`PoisonError` where no ledger can take it."""
    try:
        transfer(signal)
        return orjson.dumps(signal)
    except (LedgerError, orjson.JSONEncodeError) as error:
        raise PoisonError(f"signal {signal.id}: {error}") from error


def _to_line(signal: Signal) -> bytes:
    return _check(signal)


def _from_line(line: bytes) -> Signal:
    signal = Signal.from_json(orjson.loads(line))
    try:
        _check(signal)
    except PoisonError as error:
        raise ValueError(str(error)) from error
    return signal


class ProjectStage:
    """The handler of the projection stage: batches hold one tenant's rows. ``files`` take what
    DuckDB does not; ``bury`` what can never be written, of what was in the files."""

    def __init__(
        self,
        store: DuckStore,
        threads: ThreadRunner,
        counts: StoreCounts,
        in_flight: InFlight,
        latencies: Latencies,
        breaker: Breaker,
        files: FallbackFiles,
        bury: Callable[[str, list[Decided], Exception, int], Awaitable[None]],
        pace: CommitPace,
    ) -> None:
        self.pace = pace
        self._store = store
        self._threads = threads
        self._counts = counts
        self._in_flight = in_flight
        self._latencies = latencies
        self._breaker = breaker
        self._bury = bury
        self.fallback: Fallback[Decided] = Fallback(
            "duckdb",
            files,
            letters.decided_to_bytes,
            letters.decided_from_bytes,
            self._write_back,
            latencies.fallback.labels("duckdb").observe,
        )

    async def handle(self, batch: list[Decided]) -> None:
        """Write a tenant's signals, traces and positions in one transaction."""
        while True:
            if not self.fallback.pending:
                try:
                    await self._insert(batch)
                except (*_REFUSED, StoreError, PoolTimeout, OSError):
                    pass
                else:
                    break
            try:
                await self.fallback.put(batch)
            except (FallbackFull, OSError):
                await self.fallback.room(RETRY_SECONDS)
            else:
                break
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
                await self._bury(PROJECTION, [decided], error, 1)

    async def _insert(self, batch: list[Decided]) -> None:
        self._counts.rows += await self._breaker.call(self._call, batch)

    async def _call(self, batch: list[Decided]) -> int:
        started = time.perf_counter()
        rows, cpu = await self._threads.run(self._write, batch, abandon_on_cancel=True)
        self._latencies.duckdb.observe(time.perf_counter() - started)
        self.pace.observe(cpu, rows)
        return rows

    def _write(self, batch: list[Decided]) -> tuple[int, float]:
        """The rows written, and the CPU seconds that this took."""
        began = time.thread_time()
        signals = [signal for decided in batch for signal in decided.signals]
        closed = [d.closed for d in batch if d.closed is not None]
        spilled = [d.spilled for d in batch if d.spilled is not None]
        try:
            self._store.write(
                batch[0].tenant,
                signals=signals,
                traces=trace_tables(closed) if closed else None,
                frames=frame_columns(np.concatenate(spilled)) if spilled else None,
            )
        except StoreError as error:
            if error.transient:
                raise
            raise PoisonError(str(error)) from error  # of this tenant's file, or of these rows
        rows = len(signals) + sum(map(len, closed))
        return rows, time.thread_time() - began
