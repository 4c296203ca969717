"""The daily task: archives past days and deletes data past retention."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import trio

from betrace.channels import ThreadRunner, TransientError
from betrace.service.config.settings import Settings
from betrace.service.export.archiver import (
    Archiver,
    ArchiveResult,
    archive_directory,
    log_until,
    today,
)
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.telemetry import events

if TYPE_CHECKING:
    from betrace.service.cluster.duty import Duty
    from betrace.service.export.cluster_archiver import ClusterArchiver

_log = logging.getLogger("service.archive")

FIRST_AFTER_SECONDS = 60.0
AGAIN_AFTER_SECONDS = 3600.0
_LONGEST_SLEEP = 600.0  # because the wall clock may be set
_DAY_NS = 86_400 * 1_000_000_000


@dataclass(frozen=True, slots=True)
class ArchiveKeeping:
    """How a query node of a cluster takes part: it archives while it has ``duty``, None if there is
    no archive, and keeps traces that are not archived; ``archived_ns`` returns up to when they are,
    and blocks."""

    duty: Duty | None
    archived_ns: Callable[[], int]


class Daily:
    """Runs a minute after the start and then every day at ``archive.hour_utc``. A run that failed
    is repeated after an hour.

    ``make_archiver`` makes the archiver of a run. ``keeping`` is for a query node of a cluster.
    """

    def __init__(
        self,
        settings: Settings,
        store: DuckStore,
        make_archiver: Callable[[], Archiver | ClusterArchiver],
        keeping: ArchiveKeeping | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._make_archiver = make_archiver
        self._keeping = keeping
        self._directory = archive_directory(settings)
        self._threads = ThreadRunner("archive", 1)
        self._archiver: Archiver | ClusterArchiver | None = None
        self.spans = 0
        """Spans archived since the start."""
        self.files = 0
        self.released_bytes = 0
        """Bytes deleted from the log since the start."""
        self.expired_traces = 0
        """Traces deleted from the index since the start."""
        self.failures = 0
        """Runs with at least one failure."""
        self.succeeded_at: float | None = None
        """Time of the last run without failures, seconds since 1970."""

    @property
    def wanted(self) -> bool:
        """Whether the settings ask for any of this."""
        retention = self._settings.retention
        return bool(self._settings.archive.enabled or retention.log_days or retention.trace_days)

    async def every_day(self) -> None:
        """Run every day until cancelled; return at once if nothing is wanted."""
        if not self.wanted:
            return
        if self._keeping is None:
            await self._repeat(self.run)
            return
        async with trio.open_nursery() as nursery:
            if self._settings.retention.trace_days:
                nursery.start_soon(self._repeat, self.expire)
            if self._keeping.duty is not None:
                nursery.start_soon(self._keeping.duty.perform, partial(self._repeat, self.archive))

    async def _repeat(self, run: Callable[[], Awaitable[bool]]) -> None:
        await trio.sleep(FIRST_AFTER_SECONDS)
        while True:
            good = await run()
            await _wait_until(self._next() if good else time.time() + AGAIN_AFTER_SECONDS)

    def _next(self) -> float:
        now = datetime.fromtimestamp(time.time(), UTC)
        at = now.replace(hour=self._settings.archive.hour_utc, minute=5, second=0, microsecond=0)
        return (at if at > now else at + timedelta(days=1)).timestamp()

    async def run(self) -> bool:
        """Archive, and delete what is past retention; return whether everything succeeded."""
        return await self._work(self._archive, self._expire)

    async def archive(self) -> bool:
        """Archive now; return whether everything succeeded."""
        return await self._work(self._archive)

    async def expire(self) -> bool:
        """Delete traces past retention; return whether everything succeeded."""
        return await self._work(self._expire)

    async def _work(self, *parts: Callable[[Archiver | ClusterArchiver], None]) -> bool:
        archiver = self._archiver = self._make_archiver()

        def work() -> None:
            for part in parts:
                part(archiver)

        try:
            await self._threads.run(work, abandon_on_cancel=True)
        except trio.Cancelled:
            archiver.stop()
            raise
        except OSError as error:
            archiver.done.failures.append(f"{error}; check the disk")
        self._note(archiver.done)
        return not archiver.done.failures

    def _archive(self, archiver: Archiver | ClusterArchiver) -> None:
        settings = self._settings
        if settings.archive.enabled:
            for _ in archiver.archive(today()):
                pass
        until = log_until(settings, today())
        if until is not None:
            archiver.release(until, archived=settings.archive.enabled)

    def _expire(self, archiver: Archiver | ClusterArchiver) -> None:
        days = self._settings.retention.trace_days
        if not days:
            return
        before = time.time_ns() - days * _DAY_NS
        try:
            if self._keeping is not None and self._keeping.duty is not None:
                before = min(before, self._keeping.archived_ns())
        except TransientError as error:
            archiver.done.failures.append(f"the progress of the archive cannot be read: {error}")
            return
        for tenant in self._store.tenants():
            try:
                self.expired_traces += self._store.expire(tenant, before)
            except (StoreError, PoolTimeout) as error:
                archiver.done.failures.append(f"traces of {tenant} cannot be deleted: {error}")

    def _note(self, done: ArchiveResult) -> None:
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
                "damaged segments stay in the log; their readable part is archived: %s",
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
        if self._archiver is not None:
            self._archiver.stop()
        self._threads.close()


async def _wait_until(at: float) -> None:
    """Wait for a time of the wall clock, even if the clock is set meanwhile."""
    left = at - time.time()
    while True:
        await trio.sleep(min(max(left, 0), _LONGEST_SLEEP))
        left = at - time.time()
        if left <= 0:
            return
