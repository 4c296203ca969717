"""Syncing the span log: once for all waiting callers (group commit), and on a schedule."""

from __future__ import annotations

import time
from collections.abc import Iterable

import trio

from betrace.channels import ThreadRunner
from betrace.service.storage.spanlog.log import LogSyncError, SpanLog
from betrace.service.telemetry import events


class GroupSync:
    """Makes the log durable. Callers that arrive during a sync share the next one."""

    def __init__(self, log: SpanLog, threads: ThreadRunner) -> None:
        self._log = log
        self._threads = threads
        self._lock = trio.Lock()
        self._waiting: set[str] = set()
        self._generation = 0
        self._failed: dict[int, LogSyncError] = {}
        self.last_seconds = 0.0
        self.failures = 0
        self._failing = 0  # since the last success
        self.running = False
        """Whether the log is being synced, which may delay writes to it."""

    @property
    def failing(self) -> bool:
        """Whether the last sync failed."""
        return self._failing > 0

    async def sync(self, tenants: Iterable[str]) -> None:
        """Return when everything these tenants wrote before the call is durable.

        Raises :exc:`LogSyncError` if the disk failed for one of them.
        """
        wanted = set(tenants)
        self._waiting |= wanted
        ticket = self._generation  # the sync with this number starts after this call
        async with self._lock:
            if self._generation == ticket:
                await self._run()
            error = self._failed.get(ticket)
        if error is not None and error.tenants & wanted:
            raise error

    async def _run(self) -> None:
        number, self._generation = self._generation, self._generation + 1
        tenants, self._waiting = self._waiting, set()
        self._failed.pop(number - 64, None)  # the lock is fair, so nobody waits that long
        started = time.perf_counter()
        # Failed until it succeeds, so that callers who share the sync see a failure when this task
        # is cancelled or something unexpected is raised.
        self._failed[number] = LogSyncError(sorted(tenants), OSError("the sync did not finish"))
        try:
            await self._call(tenants)
            del self._failed[number]
        except LogSyncError as error:
            self._failed[number] = error
            self._note(error)
        else:
            self._note(None)
        finally:
            self.last_seconds = time.perf_counter() - started

    async def _call(self, tenants: set[str] | None) -> None:
        self.running = True
        try:
            await self._threads.run(self._log.sync, tenants)
        finally:
            self.running = False

    def _note(self, error: LogSyncError | None) -> None:
        if error is not None:
            self.failures += 1
            if not self._failing:
                events.SYNC_FAILED(error=error)
            self._failing += 1
        elif self._failing:
            events.SYNC_WORKS(failures=self._failing)
            self._failing = 0

    async def every(self, seconds: float) -> None:
        """Sync everything that is not durable, forever."""
        while True:
            await trio.sleep(seconds)
            started = time.perf_counter()
            try:
                await self._call(None)
            except LogSyncError as error:
                self._note(error)
            else:
                self._note(None)
            self.last_seconds = time.perf_counter() - started
