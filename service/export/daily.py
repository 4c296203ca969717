"""The daily task: days that are over are archived, and what is past retention is deleted."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta

import trio

from betrace.channels import ThreadRunner
from betrace.service.config.settings import Settings
from betrace.service.export.archiver import Keeper, Kept, Pace, archive_directory, log_until, today
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.telemetry import events

_log = logging.getLogger("betrace.service.export")

FIRST_AFTER_SECONDS = 60.0
AGAIN_AFTER_SECONDS = 3600.0
_LONGEST_SLEEP = 600.0  # the wall clock may be set meanwhile
_DAY_NS = 86_400 * 1_000_000_000


class Daily:
    """Runs a minute after the start, and then every day at ``archive.hour_utc``; after an hour
    again where something failed."""

    def __init__(self, settings: Settings, log: SpanLog, store: DuckStore) -> None:
        self._settings = settings
        self._log = log
        self._store = store
        self._directory = archive_directory(settings)
        self._threads = ThreadRunner("archive", 1)
        self._keeper: Keeper | None = None
        self.spans = 0
        """Archived since the start."""
        self.files = 0
        self.released_bytes = 0
        """Of the log, since the start."""
        self.expired_traces = 0
        """Deleted from the index since the start."""
        self.failures = 0
        """Runs that could not do everything."""
        self.succeeded_at: float | None = None
        """When a run last did everything, seconds since 1970."""

    @property
    def wanted(self) -> bool:
        """Whether the settings leave anything to do."""
        retention = self._settings.retention
        return bool(self._settings.archive.enabled or retention.log_days or retention.trace_days)

    async def every_day(self) -> None:
        """Run, for ever."""
        if not self.wanted:
            return
        await trio.sleep(FIRST_AFTER_SECONDS)
        while True:
            good = await self.run()
            await _wait_until(self._next() if good else time.time() + AGAIN_AFTER_SECONDS)

    def _next(self) -> float:
        now = datetime.fromtimestamp(time.time(), UTC)
        at = now.replace(hour=self._settings.archive.hour_utc, minute=5, second=0, microsecond=0)
        return (at if at > now else at + timedelta(days=1)).timestamp()

    async def run(self) -> bool:
        """Do everything now; whether that worked."""
        settings = self._settings
        keeper = self._keeper = Keeper(
            self._log,
            self._directory,
            settings.storage.path / "checkpoints",
            settings.ingest.max_body_bytes,
            Pace(),
        )
        try:
            await self._threads.run(self._work, keeper, abandon_on_cancel=True)
        except trio.Cancelled:
            keeper.stop()
            raise
        except OSError as error:
            keeper.done.failures.append(f"{error}: check the disk")
        self._note(keeper.done)
        return not keeper.done.failures

    def _work(self, keeper: Keeper) -> None:
        settings = self._settings
        if settings.archive.enabled:
            for _ in keeper.archive(today()):
                pass
        until = log_until(settings, today())
        if until is not None:
            keeper.release(until, archived=settings.archive.enabled)
        days = settings.retention.trace_days
        if days:
            before = time.time_ns() - days * _DAY_NS
            for tenant in self._store.tenants():
                try:
                    self.expired_traces += self._store.expire(tenant, before)
                except (StoreError, PoolTimeout) as error:
                    keeper.done.failures.append(f"traces of {tenant} cannot be deleted: {error}")

    def _note(self, done: Kept) -> None:
        self.spans += done.spans
        self.files += done.files
        self.released_bytes += done.released_bytes
        if done.failures:
            self.failures += 1
            events.ARCHIVE_FAILED(failures=len(done.failures), first=done.failures[0])
        else:
            self.succeeded_at = time.time()
        if done.damaged:
            _log.warning(
                "segments with damage stay in the log although they are archived: %s",
                ", ".join(done.damaged[:5]),
            )
        events.ARCHIVED(
            files=done.files,
            spans=done.spans,
            released=done.released_bytes,
            directory=self._directory,
        )

    def close(self) -> None:
        """End the thread."""
        if self._keeper is not None:
            self._keeper.stop()
        self._threads.close()


async def _wait_until(at: float) -> None:
    """Wait for a time of the wall clock, which may be set meanwhile."""
    left = at - time.time()
    while True:
        await trio.sleep(min(max(left, 0), _LONGEST_SLEEP))
        left = at - time.time()
        if left <= 0:
            return
