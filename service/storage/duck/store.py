"""The query store: signals and the trace index of each tenant, in DuckDB.

It is a projection: the ledger is the record of signals, the span log is the record of spans, and a
file that is lost or damaged is rebuilt from them. All methods block and may be called from any
thread. They raise :exc:`betrace.service.storage.duck.schema.StoreError` (``StoreCorrupt`` if the
tenant's file is damaged), :exc:`betrace.service.storage.duck.pool.PoolTimeout` if all of the
tenant's connections are in use, :exc:`betrace.service.storage.duck.queries.BadQuery` for an invalid
filter, cursor or id, and :exc:`ValueError` for a bad tenant name. Times are nanoseconds since 1970,
ids lower-case hex.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from betrace.service.config.stores import DuckDb
from betrace.service.signals import Signal
from betrace.service.storage.duck import queries, write
from betrace.service.storage.duck.arrow import (
    Columns,
    frames_table,
    trace_id_halves,
    trace_ids,
    traces_table,
)
from betrace.service.storage.duck.files import DuckFiles, attachable
from betrace.service.storage.duck.queries import SignalFilter, StoredSignal, SummaryRow, TraceRow
from betrace.service.storage.duck.schema import TABLES, StoreCorrupt
from betrace.service.storage.duck.search import TraceFilter, TracePage, search

_ALL_SIGNALS = SignalFilter()
_ALL_TRACES = TraceFilter()


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The number of rows in a tenant's tables."""

    signals: int
    traces: int
    frames: int


@dataclass(frozen=True, slots=True)
class StoreChange:
    """What one transaction wrote for a tenant."""

    signals: Sequence[Signal]
    traces: pa.Table | None
    frames: pa.Table | None

    def trace_ids(self) -> set[str]:
        """The traces whose rows, positions or signals were written."""
        signalled = {signal.trace_id for signal in self.signals}
        return signalled | _ids(self.traces) | _ids(self.frames)

    def traces_closed(self) -> set[str]:
        """The traces whose rows of the trace index were written."""
        return _ids(self.traces)


class DuckStore:
    """The files of all tenants below ``directory``; see :class:`DuckFiles` for the parameters."""

    def __init__(
        self,
        directory: Path,
        limits: DuckDb | None = None,
        *,
        attached_max: int | None = None,
        key_bytes: int = 128 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = DuckFiles(
            directory,
            limits or DuckDb(),
            attached_max=attachable() if attached_max is None else attached_max,
            key_bytes=key_bytes,
            clock=clock,
        )
        self.on_change: Callable[[str, StoreChange | None], None] = _ignore
        """Called for every write, in its thread and before it returns, even if it failed, with the
        tenant and what was written; None if anything may have changed."""
        self.incomplete: set[str] = set()
        """Tenants whose files lack rows until they are rebuilt."""

    def on_damaged(self, call: Callable[[StoreCorrupt], None]) -> None:
        """Have ``call`` called whenever damage in a file is met, in the thread that met it."""
        self._files.on_damaged = call

    # Writing

    def write(
        self,
        tenant: str,
        *,
        signals: Sequence[Signal] = (),
        traces: Columns | None = None,
        frames: Columns | None = None,
    ) -> int:
        """Write everything in one transaction. Returns how many of the signals are new. See the
        methods for each kind of rows."""
        return self._write(
            tenant,
            signals,
            None if traces is None else traces_table(traces),
            None if frames is None else frames_table(frames),
        )

    def _write(
        self,
        tenant: str,
        signals: Sequence[Signal],
        traces: pa.Table | None,
        frames: pa.Table | None,
    ) -> int:
        try:
            with self._files.append(tenant) as (db, known):
                if traces is not None and len(traces):
                    write.write_traces(db, known, traces)
                if frames is not None and len(frames):
                    write.write_frames(db, known, frames)
                return write.write_signals(db, known, signals) if signals else 0
        finally:
            self.on_change(tenant, StoreChange(signals, traces, frames))

    def write_signals(self, tenant: str, signals: Sequence[Signal]) -> int:
        """Store signals, all of ``tenant``; returns how many are new. An existing signal stays as
        it is. A retraction also marks the signal it retracts, whichever is stored first."""
        return self.write(tenant, signals=signals)

    def add_missing(self, tenant: str, signals: Sequence[Signal]) -> int:
        """Store the signals that are missing; returns how many. Cheaper than :meth:`write_signals`
        if most of them exist."""
        ids = [queries.id_bytes(signal.id, "signal id") for signal in signals]
        missing = set(ids)
        if self._files.has(tenant):
            with self._files.use(tenant) as db:
                missing = write.missing(db, ids)
        new = [signal for key, signal in zip(ids, signals, strict=True) if key in missing]
        return self.write_signals(tenant, new) if new else 0

    def write_traces(self, tenant: str, traces: Columns) -> int:
        """Insert traces or replace existing ones. New positions are added to existing ones, because
        a trace that was closed before still has its earlier frames. Takes the columns of
        :func:`betrace.service.storage.duck.arrow.traces_table`; returns the number of
        rows given."""
        table = traces_table(traces)
        self._write(tenant, (), table, None)
        return len(table)

    def write_frames(self, tenant: str, frames: Columns) -> int:
        """Store spilled log positions of long traces, in the columns of
        :func:`betrace.service.storage.duck.arrow.frames_table`; returns the number of rows. A chunk
        replaces one of the same trace that begins with the same position."""
        table = frames_table(frames)
        self._write(tenant, (), None, table)
        return len(table)

    def expire(self, tenant: str, before: int) -> int:
        """Delete the traces last seen before a time, with their positions; returns how many.
        Signals stay."""
        if not self._files.has(tenant):
            return 0
        with self._files.use(tenant, write=True) as db:
            db.execute(
                "DELETE FROM trace_frames WHERE trace_id IN "
                "(SELECT trace_id FROM traces WHERE last_seen_ns < ?)",
                [before],
            ).fetchall()
            row = queries.one(db, "DELETE FROM traces WHERE last_seen_ns < ?", [before])
        expired = int(row[0]) if row else 0
        if expired:
            self._files.forget_known(tenant)
            self.on_change(tenant, None)
        return expired

    # Reading

    def signals(
        self,
        tenant: str,
        wanted: SignalFilter = _ALL_SIGNALS,
        *,
        limit: int = 100,
        cursor: str | None = None,
    ) -> tuple[list[StoredSignal], str | None]:
        """A page of the wanted signals, newest first, and the cursor of the next page, None after
        the last one. Rows stored in the meantime neither repeat nor hide others."""
        if not self._files.has(tenant):
            return [], None
        with self._files.use(tenant) as db:
            return queries.signals(db, tenant, wanted, limit, cursor)

    def signal(self, tenant: str, signal_id: str) -> StoredSignal | None:
        """The signal with this id, None if it does not exist."""
        if not self._files.has(tenant):
            return None
        with self._files.use(tenant) as db:
            return queries.signal(db, tenant, signal_id)

    def signals_after(self, tenant: str, seq: int, limit: int = 1000) -> list[StoredSignal]:
        """The signals stored after the one numbered ``seq``, oldest first."""
        if not self._files.has(tenant):
            return []
        with self._files.use(tenant) as db:
            return queries.signals_after(db, tenant, seq, limit)

    def summary(self, tenant: str, since: int, until: int, bucket: int) -> list[SummaryRow]:
        """Counts of raised signals detected from ``since`` to before ``until``, by rule, severity
        and bucket of ``bucket`` nanoseconds. Empty buckets are omitted."""
        queries.check_summary(since, until, bucket)
        if not self._files.has(tenant):
            return []
        with self._files.use(tenant) as db:
            return queries.summary(db, since, until, bucket)

    def trace(self, tenant: str, trace_id: str) -> TraceRow | None:
        """The trace with all positions of its frames, including spilled ones; None if missing."""
        return self.find_traces(tenant, [trace_id]).get(trace_id.lower())

    def spilled(self, tenant: str, trace_id: str) -> list[int]:
        """The spilled positions of a trace, whether it has a row in the index or not."""
        if not self._files.has(tenant):
            return []
        with self._files.use(tenant) as db:
            return queries.spilled(db, trace_id)

    def find_traces(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, TraceRow]:
        """The traces that exist, by id, each as returned by :meth:`trace`."""
        if not self._files.has(tenant):
            return {}
        with self._files.use(tenant) as db:
            return queries.find_traces(db, trace_ids)

    def raised_of(
        self, tenant: str, trace_ids: Sequence[str]
    ) -> dict[str, list[tuple[str, str, int, int, str]]]:
        """For each trace that has signals, by rule: the rule's id and version, how many signals
        were raised and retracted, and the clause of the last one."""
        if not self._files.has(tenant):
            return {}
        with self._files.use(tenant) as db:
            return queries.raised_of(db, trace_ids)

    def traces(
        self,
        tenant: str,
        wanted: TraceFilter = _ALL_TRACES,
        *,
        limit: int = 100,
        cursor: str | None = None,
    ) -> TracePage:
        """A page of the wanted traces by start time, newest first, without their positions. A page
        that takes long to find may end before it is full."""
        if not self._files.has(tenant):
            return TracePage([], None, None)
        with self._files.use(tenant) as db:
            return search(db, wanted, limit=limit, cursor=cursor)

    def trace_ids(
        self, tenant: str, since: int = 0, upto: int | None = None
    ) -> npt.NDArray[np.int64]:
        """The ids of the traces last seen at ``since`` or later, as an (n, 2) array of their high
        and low halves. With ``upto``, only traces with a frame at that position or before."""
        if not self._files.has(tenant):
            return np.zeros((0, 2), np.int64)
        with self._files.use(tenant) as db:
            table: pa.Table = db.sql(
                "SELECT trace_id FROM traces WHERE last_seen_ns >= $since AND ($upto IS NULL "
                "OR list_min(positions) <= $upto OR trace_id IN "
                '(SELECT trace_id FROM trace_frames WHERE "first" <= $upto))',
                params={"since": since, "upto": upto},
            ).to_arrow_table()
        return trace_id_halves(table["trace_id"].combine_chunks())

    def count_traces(self, tenant: str, since: int) -> int:
        """The number of traces last seen at ``since`` or later."""
        if not self._files.has(tenant):
            return 0
        with self._files.use(tenant) as db:
            row = queries.one(db, "SELECT count(*) FROM traces WHERE last_seen_ns >= ?", [since])
        return int(row[0]) if row else 0

    def counts(self, tenant: str) -> RowCounts:
        """The number of rows. Fewer signals than in the ledger means that a rebuild is needed."""
        if not self._files.has(tenant):
            return RowCounts(0, 0, 0)
        with self._files.use(tenant) as db:
            row = queries.one(
                db,
                "SELECT (SELECT count(*) FROM signals), (SELECT count(*) FROM traces), "
                "(SELECT count(*) FROM trace_frames)",
            )
        assert row is not None
        return RowCounts(*row)

    def verify(self, tenant: str) -> None:
        """Read everything in the tenant's file. Raises ``StoreCorrupt`` if any of it is damaged."""
        if not self._files.has(tenant):
            return
        with self._files.use(tenant) as db:
            for table in TABLES:
                queries.one(db, f"SELECT bit_xor(hash(t)) FROM {table} AS t")

    # Files

    def tenants(self) -> list[str]:
        """The tenants that have a file, sorted."""
        return self._files.tenants()

    @property
    def attached(self) -> int:
        """The number of open files of tenants."""
        return self._files.attached

    def connections(self) -> dict[str, int]:
        """The number of open connections of each tenant whose file is open."""
        return self._files.connections()

    def sweep(self) -> int:
        """Close the files that have been unused for long; returns how many. Call this about once a
        minute."""
        return self._files.sweep()

    def recreate(self, tenant: str) -> None:
        """Set a damaged file aside and start an empty one, whose rows must then be written again
        from the ledger and the log."""
        self._files.recreate(tenant)
        self.on_change(tenant, None)

    def remove(self, tenant: str) -> None:
        """Close and delete the tenant's file, if it exists. Waits for its users up to the pool's
        timeout, then raises ``PoolTimeout``. Later writes, such as from a thread that was left
        behind, are refused until :meth:`reopen`."""
        self._files.delete(tenant)
        self.on_change(tenant, None)

    def reopen(self, tenant: str) -> None:
        """Accept writes for a removed tenant again, because it was created again."""
        self._files.reopen(tenant)

    def close(self) -> None:
        """Close all files. Idempotent."""
        self._files.close()

    def __enter__(self) -> DuckStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _ignore(tenant: str, change: StoreChange | None) -> None:
    """The default of ``on_change``."""


def _ids(table: pa.Table | None) -> set[str]:
    return set() if table is None else {key.hex() for key in trace_ids(table["trace_id"])}
