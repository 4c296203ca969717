"""The query store: signals and the trace index of each tenant, in DuckDB.

It is a projection: the ledger is the record of signals, the span log that of spans, and a file
that is lost or damaged is made anew from those. All methods block and may be called from any
thread; they raise :exc:`StoreError` (:exc:`StoreCorrupt` where the tenant's file is damaged),
:exc:`PoolTimeout` where all of the tenant's connections are in use, :exc:`BadQuery` where a
filter, a cursor or an id is wrong and :exc:`ValueError` for a bad tenant name. Times are
nanoseconds since 1970, ids lower-case hex.
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
from betrace.service.storage.duck import queries as duckqueries
from betrace.service.storage.duck import write as duckwrite
from betrace.service.storage.duck.arrow import (
    MOST_POSITIONS,
    Columns,
    frames_table,
    trace_id_halves,
    trace_ids,
    traces_table,
)
from betrace.service.storage.duck.files import DuckFiles
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.queries import BadQuery, StoredSignal, SummaryRow, TraceRow
from betrace.service.storage.duck.schema import StoreCorrupt, StoreError
from betrace.service.storage.duck.search import TraceFilter, TracePage, search

__all__ = [
    "MOST_POSITIONS",
    "BadQuery",
    "Change",
    "DuckStore",
    "PoolTimeout",
    "RowCounts",
    "StoreCorrupt",
    "StoreError",
    "StoredSignal",
    "SummaryRow",
    "TracePage",
    "TraceRow",
]


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The rows of a tenant's tables."""

    signals: int
    traces: int
    frames: int


@dataclass(frozen=True, slots=True)
class Change:
    """What was written of a tenant in one transaction."""

    signals: Sequence[Signal]
    traces: pa.Table | None
    frames: pa.Table | None

    def trace_ids(self) -> set[str]:
        """The traces whose rows, positions or signals were written."""
        signalled = {signal.trace_id for signal in self.signals}
        return signalled | _ids(self.traces) | _ids(self.frames)

    def traces_closed(self) -> set[str]:
        """The traces whose rows of the index were written."""
        return _ids(self.traces)


class DuckStore:
    """The files of all tenants below ``directory``; see :class:`DuckFiles` for the limits."""

    def __init__(
        self,
        directory: Path,
        limits: DuckDb | None = None,
        *,
        attached_max: int = 1000,
        key_bytes: int = 128 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = DuckFiles(
            directory,
            limits or DuckDb(),
            attached_max=attached_max,
            key_bytes=key_bytes,
            clock=clock,
        )
        self.on_change: Callable[[str, Change | None], None] = _nobody
        """Told of every write, in its thread and before it returns, also where it failed: the
        tenant, and what was written, None where anything may have changed."""

    # Writing

    def write(
        self,
        tenant: str,
        *,
        signals: Sequence[Signal] = (),
        traces: Columns | None = None,
        frames: Columns | None = None,
    ) -> int:
        """Write all of it in one transaction, which is one commit; returns how many of the signals
        are new. See the methods for each."""
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
                    duckwrite.write_traces(db, known, traces)
                if frames is not None and len(frames):
                    duckwrite.write_frames(db, known, frames)
                return duckwrite.write_signals(db, known, signals) if signals else 0
        finally:
            self.on_change(tenant, Change(signals, traces, frames))

    def write_signals(self, tenant: str, signals: Sequence[Signal]) -> int:
        """Store signals, which are all of ``tenant``; how many are new. One that is there already
        is left as it is. A retraction also marks what it retracts, whichever comes first."""
        return self.write(tenant, signals=signals)

    def add_missing(self, tenant: str, signals: Sequence[Signal]) -> int:
        """Store those of the signals that are not there; how many. Cheaper than
        :meth:`write_signals` where most of them are."""
        ids = [duckqueries.id_bytes(signal.id, "signal id") for signal in signals]
        missing = set(ids)
        if self._files.has(tenant):
            with self._files.use(tenant) as db:
                missing = duckwrite.missing(db, ids)
        new = [signal for key, signal in zip(ids, signals, strict=True) if key in missing]
        return self.write_signals(tenant, new) if new else 0

    def write_traces(self, tenant: str, traces: Columns) -> int:
        """Insert traces, or replace those that are there but for their positions, to which the new
        ones are added: a trace that was closed before has its earlier frames still. How many rows
        were given; the columns are those of
        :func:`betrace.service.storage.duck.arrow.traces_table`."""
        table = traces_table(traces)
        self._write(tenant, (), table, None)
        return len(table)

    def write_frames(self, tenant: str, frames: Columns) -> int:
        """Store spilled log positions of long traces, in columns as for
        :func:`betrace.service.storage.duck.arrow.frames_table`; how many rows. A chunk that begins
        with the same position as one of its trace replaces it."""
        table = frames_table(frames)
        self._write(tenant, (), None, table)
        return len(table)

    def expire(self, tenant: str, before: int) -> int:
        """Delete the traces last seen before a time, with their positions; how many traces.
        Signals are kept."""
        if not self._files.has(tenant):
            return 0
        with self._files.use(tenant, write=True) as db:
            db.execute(
                "DELETE FROM trace_frames WHERE trace_id IN "
                "(SELECT trace_id FROM traces WHERE last_seen_ns < ?)",
                [before],
            ).fetchall()
            row = duckqueries.one(db, "DELETE FROM traces WHERE last_seen_ns < ?", [before])
        expired = int(row[0]) if row else 0
        if expired:
            self._files.forget_known(tenant)
            self.on_change(tenant, None)
        return expired

    # Reading

    def signals(
        self,
        tenant: str,
        *,
        rule: str | None = None,
        severity: str | None = None,
        trace_id: str | None = None,
        status: str | None = None,
        since: int | None = None,
        until: int | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> tuple[list[StoredSignal], str | None]:
        """The signals that all given filters let through, newest first, detected at ``since`` or
        later and before ``until``; and the cursor of the next page, None after the last. Rows
        that are stored meanwhile neither repeat nor hide others."""
        if not self._files.has(tenant):
            return [], None
        with self._files.use(tenant) as db:
            return duckqueries.signals(
                db,
                tenant,
                rule=rule,
                severity=severity,
                trace_id=trace_id,
                status=status,
                since=since,
                until=until,
                limit=limit,
                cursor=cursor,
            )

    def signal(self, tenant: str, signal_id: str) -> StoredSignal | None:
        """The signal of this id, if there is one."""
        if not self._files.has(tenant):
            return None
        with self._files.use(tenant) as db:
            return duckqueries.signal(db, tenant, signal_id)

    def signals_after(self, tenant: str, seq: int, limit: int = 1000) -> list[StoredSignal]:
        """The signals stored after the one numbered ``seq``, oldest first."""
        if not self._files.has(tenant):
            return []
        with self._files.use(tenant) as db:
            return duckqueries.signals_after(db, tenant, seq, limit)

    def summary(self, tenant: str, since: int, until: int, bucket: int) -> list[SummaryRow]:
        """Counts of raised signals detected from ``since`` to before ``until`` by rule, severity
        and bucket of ``bucket`` nanoseconds; buckets without any are left out."""
        duckqueries.check_summary(since, until, bucket)
        if not self._files.has(tenant):
            return []
        with self._files.use(tenant) as db:
            return duckqueries.summary(db, since, until, bucket)

    def trace(self, tenant: str, trace_id: str) -> TraceRow | None:
        """The trace with all positions of its frames, the spilled ones included."""
        return self.find_traces(tenant, [trace_id]).get(trace_id.lower())

    def spilled(self, tenant: str, trace_id: str) -> list[int]:
        """The positions that were spilled of a trace, whether the trace itself is there or not."""
        if not self._files.has(tenant):
            return []
        with self._files.use(tenant) as db:
            return duckqueries.spilled(db, trace_id)

    def find_traces(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, TraceRow]:
        """Those of the traces that are there, by id, each as :meth:`trace` gives it."""
        if not self._files.has(tenant):
            return {}
        with self._files.use(tenant) as db:
            return duckqueries.find_traces(db, trace_ids)

    def raised_of(
        self, tenant: str, trace_ids: Sequence[str]
    ) -> dict[str, list[tuple[str, str, int, int, str]]]:
        """For each of the traces that has signals, by rule: its id and version, how many were
        raised and how many retracted, and the clause of the last."""
        if not self._files.has(tenant):
            return {}
        with self._files.use(tenant) as db:
            return duckqueries.raised_of(db, trace_ids)

    def traces(
        self,
        tenant: str,
        *,
        service: str | None = None,
        name: str | None = None,
        min_duration: int | None = None,
        since: int | None = None,
        until: int | None = None,
        has_signal: bool | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> TracePage:
        """Traces by when they started, newest first, without their positions: those that started
        at ``since`` or later and before ``until``. ``service`` is any service in the trace,
        ``name`` its root span's, ``min_duration`` in nanoseconds; ``has_signal`` asks for an active
        signal. A page that takes long to find may end before it is full."""
        if not self._files.has(tenant):
            return TracePage([], None, None)
        wanted = TraceFilter(service, name, min_duration, has_signal)
        with self._files.use(tenant) as db:
            return search(db, wanted, since=since, until=until, limit=limit, cursor=cursor)

    def trace_ids(
        self, tenant: str, since: int = 0, upto: int | None = None
    ) -> npt.NDArray[np.int64]:
        """The ids of the traces last seen at ``since`` or later, as an (n, 2) array of their high
        and low halves; with ``upto`` only those that have a frame at that position or before."""
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

    def counts(self, tenant: str) -> RowCounts:
        """How many rows there are: fewer signals than the ledger has call for a rebuild."""
        if not self._files.has(tenant):
            return RowCounts(0, 0, 0)
        with self._files.use(tenant) as db:
            row = duckqueries.one(
                db,
                "SELECT (SELECT count(*) FROM signals), (SELECT count(*) FROM traces), "
                "(SELECT count(*) FROM trace_frames)",
            )
        assert row is not None
        return RowCounts(*row)

    # Files

    def tenants(self) -> list[str]:
        """The tenants that have a file, sorted."""
        return self._files.tenants()

    @property
    def attached(self) -> int:
        """How many tenants' files are open."""
        return self._files.attached

    def connections(self) -> dict[str, int]:
        """The open connections of each tenant whose file is open."""
        return self._files.connections()

    def sweep(self) -> int:
        """Close the files that were unused for long; how many. To be called every minute or so."""
        return self._files.sweep()

    def recreate(self, tenant: str) -> None:
        """Put a damaged file aside and begin an empty one; its rows are then to be written again,
        from the ledger and the log."""
        self._files.recreate(tenant)
        self.on_change(tenant, None)

    def remove(self, tenant: str) -> None:
        """Close the tenant's file and delete it; it need not be there. Who uses it is waited for up
        to the pool's timeout, then :exc:`PoolTimeout`. Writes that come later, of a thread that was
        left behind say, are refused until :meth:`reopen`."""
        self._files.delete(tenant)
        self.on_change(tenant, None)

    def reopen(self, tenant: str) -> None:
        """Take writes of a removed tenant again: it was created anew."""
        self._files.reopen(tenant)

    def close(self) -> None:
        """Close all files. Twice does no harm."""
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


def _nobody(tenant: str, change: Change | None) -> None:
    """Nobody wants to know."""


def _ids(table: pa.Table | None) -> set[str]:
    return set() if table is None else {key.hex() for key in trace_ids(table["trace_id"])}
