"""Rebuilds DuckDB files that are missing or damaged: signals from the ledger, the trace index from
the span log.

DuckDB checks a block when it reads it, so most damage is met while the service runs. The file is
then read as a whole, to be sure, set aside and rebuilt.

A mark in the tenant's directory says that a rebuild is due. It is written before a new DuckDB file
is created and deleted when the rebuild is complete, so a stop in between starts the rebuild again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from pathlib import Path

import numpy as np
import orjson

from betrace.service.durable import write_atomically
from betrace.service.pipeline.history import TraceHistory
from betrace.service.pipeline.recovery.replay import Replay, Stretch
from betrace.service.pipeline.trace_rows import frame_columns, trace_table
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreCorrupt, StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import PAGE, LedgerEntries, LedgerError
from betrace.service.storage.paths import tenant_directory
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.telemetry import events
from betrace.service.traces.due import DueTraces

_log = logging.getLogger("service.rebuild")

MARK = "rebuild.json"
AT_ONCE_BYTES = 1 << 30
"""Log size of all tenants up to which files are rebuilt before spans are accepted. Above it they
are rebuilt while the service runs; until then, late spans of traces closed long ago start new
ones."""
_REPORT_SECONDS = 5.0


class Rebuild:
    """Finds missing files and rebuilds them. Methods block; :meth:`run` for long."""

    def __init__(
        self,
        data: Path,
        log: SpanLog,
        ledger: LedgerEntries,
        store: DuckStore,
        rules_of: Callable[[str], CompiledRules],
        max_body_bytes: int,
        closed: Container[str] = frozenset(),
        reread: Callable[[], None] | None = None,
    ) -> None:
        self._closed = closed  # tenants that are deleted
        # Of a query node: has the traces read again from elsewhere than the span log.
        self._reread = reread
        self.working: str | None = None
        """The tenant whose file is being rebuilt."""
        self._data = data
        self._log = log
        self._ledger = ledger
        self._store = store
        self._rules_of = rules_of
        self._max_body = max_body_bytes
        self._stopped = False
        self.pending: list[str] = []
        """Tenants whose files must be rebuilt."""
        self._damaged: dict[str, StoreCorrupt] = {}  # met, and not rebuilt yet
        store.on_damaged(self.suspect)

    @property
    def due(self) -> bool:
        """Whether damage was met that :meth:`repair` should look at."""
        return bool(self._damaged)

    def suspect(self, error: StoreCorrupt) -> None:
        """Note that a file seems to be damaged; called in any thread. :meth:`repair` looks at
        it."""
        if error.tenant not in self._store.incomplete:
            self._damaged.setdefault(error.tenant, error)

    def find(self) -> bool:
        """Find and mark missing and damaged files; call it before anything else uses the store.
        Returns whether the rebuild is small enough to run at once."""
        size = 0
        known = set(self._store.tenants())
        recorded = set(self._recorded())
        for tenant in sorted(recorded | known | set(self._log.tenants())):
            if tenant in self._closed:
                continue
            missing = self._missing(tenant, tenant in known, tenant in recorded)
            if missing or self._mark(tenant).exists():
                self._add(tenant, anew=missing)
                size += sum(segment.bytes for segment in self._log.segments(tenant))
        self._damaged.clear()
        return size <= AT_ONCE_BYTES

    def _add(self, tenant: str, anew: bool) -> None:
        """Note durably that a file must be rebuilt; ``anew`` if an interrupted rebuild of it must
        not be continued."""
        mark = self._mark(tenant)
        if anew or not mark.exists():
            mark.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(mark, orjson.dumps({"stop": self._log.end(tenant)}))
        if tenant not in self.pending:
            self.pending.append(tenant)
        self._store.incomplete.add(tenant)

    def repair(self) -> None:
        """Rebuild the files in which damage was met."""
        for tenant, error in list(self._damaged.items()):
            try:
                if tenant not in self._closed and self._is_damaged(tenant):
                    events.DUCKDB_DAMAGED(tenant=tenant, error=error)
                    self._add(tenant, anew=True)
                    self._store.recreate(tenant)
                    self._add(tenant, anew=True)  # with what was written to the old file meanwhile
            except (StoreError, PoolTimeout, OSError) as failure:
                _log.warning("DuckDB of %s cannot be rebuilt yet: %s", tenant, failure)
                continue
            self._damaged.pop(tenant, None)
        self.run()

    def _is_damaged(self, tenant: str) -> bool:
        """Whether a file is still damaged; it may have been rebuilt since the damage was met."""
        try:
            self._store.verify(tenant)
        except StoreCorrupt:
            return True
        return False

    def compare(self) -> None:
        """Find tenants with more signals in the ledger than in DuckDB; call it once the tail of the
        log, which has the last process's work in progress, is read."""
        for tenant in set(self._recorded()) - set(self.pending):
            try:
                if self._store.counts(tenant).signals < self._ledger.count(tenant):
                    self.pending.append(tenant)
            except (LedgerError, StoreError, PoolTimeout) as error:
                _log.warning("cannot check whether DuckDB has all signals of %s: %s", tenant, error)

    def _recorded(self) -> list[str]:
        try:
            return self._ledger.tenants()
        except LedgerError as error:
            _log.warning("cannot check whether DuckDB has all signals: %s", error)
            return []

    def _missing(self, tenant: str, has_file: bool, has_signals: bool) -> bool:
        if not has_file:
            return has_signals or self._log.end(tenant) > 0
        try:
            self._store.counts(tenant)
        except StoreCorrupt as error:
            events.DUCKDB_DAMAGED(tenant=tenant, error=error)
            self._store.recreate(tenant)
            return True
        except (StoreError, PoolTimeout) as error:
            _log.warning("the DuckDB file of %s cannot be read: %s", tenant, error)
        return False

    def run(self) -> None:
        """Rebuild the pending files; files that fail stay marked for the next start."""
        for tenant in list(self.pending):
            if self._stopped:
                return
            self.working = tenant
            try:
                mark = self._mark(tenant)
                signals = self._signals(tenant)
                traces = 0
                if mark.exists() and self._reread is not None:
                    self._reread()
                elif mark.exists():
                    traces = self._traces(tenant, int(orjson.loads(mark.read_bytes())["stop"]))
                if self._over(tenant):
                    continue
                mark.unlink(missing_ok=True)
                self.pending.remove(tenant)
                self._store.incomplete.discard(tenant)
                events.DUCKDB_REBUILT(
                    tenant=tenant, signals=signals, traces=traces, missing=self._gone(tenant)
                )
            except (LedgerError, StoreError, PoolTimeout, OSError, ValueError, KeyError) as error:
                events.DUCKDB_INCOMPLETE(tenant=tenant, error=error)

    def stop(self) -> None:
        """Make :meth:`run` return soon."""
        self._stopped = True

    def forget(self, tenant: str) -> None:
        """Drop the pending rebuild of a deleted tenant."""
        if tenant in self.pending:
            self.pending.remove(tenant)
        self._damaged.pop(tenant, None)
        self._store.incomplete.discard(tenant)

    def _gone(self, tenant: str) -> str:
        """What the log no longer has for the index."""
        if self._reread is not None:
            return "; its traces are applied again from OUT"
        segments = self._log.segments(tenant)
        if not segments:
            return "; there is no span log, so no traces"
        if segments[0].number > 1:
            return f"; traces from before {segments[0].day} are no longer in the span log"
        return ""

    def _over(self, tenant: str) -> bool:
        return self._stopped or tenant in self._closed

    def _signals(self, tenant: str) -> int:
        found = after = 0
        while not self._over(tenant) and (page := self._ledger.entries(tenant, after, PAGE)):
            after = page[-1][0]
            found += self._store.add_missing(tenant, [signal for _, signal in page])
        return found

    def _traces(self, tenant: str, stop: int) -> int:
        """Write the index rows of the frames before a position; returns how many traces."""
        version = self._rules_of(tenant).version
        replay = Replay(
            self._log,
            Stretch(tenant, stop=stop),
            compile_rules([], version),
            self._max_body,
            history=TraceHistory(self._store, self._log, self._max_body).load,
        )
        reported = time.monotonic()
        for due in replay.due():
            if self._over(tenant):
                break
            if due.closed:
                self._write(due)
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                _log.info("the trace index of %s: %d traces so far", tenant, replay.traces)
        return replay.traces

    def _write(self, due: DueTraces) -> None:
        spilled = due.spilled
        self._store.write(
            due.tenant,
            traces=trace_table(due) if len(due) else None,
            frames=frame_columns(np.asarray(spilled)) if spilled is not None else None,
        )

    def _mark(self, tenant: str) -> Path:
        return tenant_directory(self._data, tenant) / MARK
