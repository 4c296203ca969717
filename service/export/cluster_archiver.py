"""Archives finished days of a cluster's log as Parquet. One node does it at a time.

The messages of a day are copied to a temporary local log, and each of its segments becomes a file.
The progress is in the configuration bucket, so another node can continue: it replaces the files of
a day that was not finished.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import trio

from betrace.channels import TransientError
from betrace.service.cluster.query.tenant_names import read_names
from betrace.service.cluster.tenant_entries import TenantEntryError
from betrace.service.export.archiver import ArchiveResult
from betrace.service.export.parquet import Archived, ArchiveError, archive_segment
from betrace.service.storage.jetstream.archive_progress import (
    ArchiveProgress,
    read_progress,
    write_progress,
)
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict
from betrace.service.storage.jetstream.history import SpanHistory
from betrace.service.storage.jetstream.local_copy import LocalCopy
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.paths import tenant_archive
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.segments import Segment
from betrace.service.times import SECOND, day_ns

SETTLED_NS = 300 * SECOND
"""How long after its end a day is archived, because the clocks of servers differ."""


class ClusterArchiver:
    """Like :class:`~betrace.service.export.archiver.Archiver`. Methods block; :meth:`stop` is
    thread-safe.

    Args:
      partitions: returns how many there are, former ones included; they may grow.
      config: the cluster's configuration.
      directory: of the archive.
      work: where a day is copied to; its content is deleted.
      max_body_bytes: limit on a decompressed request body.
      pause: called between pieces of work.
    """

    def __init__(
        self,
        spans: SpanStreams,
        partitions: Callable[[], int],
        config: ConfigBucket,
        directory: Path,
        work: Path,
        max_body_bytes: int,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._spans = spans
        self._partitions = partitions
        self._config = config
        self._directory = directory
        self._work = work
        self._max_body = max_body_bytes
        self._pause = pause
        self._stopped = False
        self.done = ArchiveResult()

    def stop(self) -> None:
        """End the current run after the segment in progress."""
        self._stopped = True

    def archive(self, before: date, tenants: list[str] | None = None) -> Iterator[Archived]:
        """Archive the days before ``before`` that are not archived. Failures are added to
        :attr:`done` and end the run. ``tenants`` must be None: days are archived as a whole."""
        assert tenants is None
        try:
            progress = trio.run(self._progress)
            while progress is not None and not self._stopped:
                day = progress.day + timedelta(days=1)
                if day >= before or day_ns(day + timedelta(days=1)) + SETTLED_NS > time.time_ns():
                    break
                ranges = trio.run(self._ranges, progress)
                if any(ranges):
                    yield from self._archive_day(day, ranges)
                    if self._stopped or self.done.failures:
                        break
                following = {p: each.stop for p, each in enumerate(ranges)}
                progress = replace(progress, day=day, next=following)
                revision = trio.run(write_progress, self._config, progress)
                progress = replace(progress, revision=revision)
        except Conflict:
            self.done.failures.append("another node archives; there must be only one")
        except (TransientError, TenantEntryError, ArchiveError, OSError) as error:
            self.done.failures.append(f"the log cannot be archived: {error}")
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def release(self, before: date, *, archived: bool, tenants: list[str] | None = None) -> None:
        """Do nothing: evaluators delete what is past retention."""

    async def _progress(self) -> ArchiveProgress | None:
        """The progress; at the beginning, as if the day before the first message were archived.
        None if there are no messages."""
        found = await read_progress(self._config)
        if found is not None:
            return found
        begin = await SpanHistory(self._spans, self._partitions()).begin_ns()
        if begin is None:
            return None
        first = datetime.fromtimestamp(begin // SECOND, UTC).date()
        return ArchiveProgress(first - timedelta(days=1), {})

    async def _ranges(self, progress: ArchiveProgress) -> list[range]:
        """The messages of the next day."""
        history = SpanHistory(self._spans, self._partitions())
        end = day_ns(progress.day + timedelta(days=2))
        return await history.ranges(until_ns=end, starts=progress.next)

    def _archive_day(self, day: date, ranges: list[range]) -> Iterator[Archived]:
        shutil.rmtree(self._work, ignore_errors=True)
        with SpanLog(self._work) as log:
            copy = LocalCopy(log, trio.run(read_names, self._config).tenant)
            trio.run(copy.run, SpanHistory(self._spans, len(ranges)), ranges)
            self.done.damaged += copy.damaged
            for tenant in log.tenants():
                self._forget_unfinished(tenant, day)
                for segment in log.segments(tenant):
                    if self._stopped:
                        return
                    file = self._path(tenant, day, segment)
                    found = archive_segment(
                        self._directory, log, tenant, segment, self._max_body, self._pause, file
                    )
                    self.done.files += 1
                    self.done.spans += found.spans
                    yield found

    def _path(self, tenant: str, day: date, segment: Segment) -> Path:
        return self._day(tenant, day) / f"cluster-{segment.number:08d}.parquet"

    def _day(self, tenant: str, day: date) -> Path:
        return tenant_archive(self._directory, tenant) / f"date={day.isoformat()}"

    def _forget_unfinished(self, tenant: str, day: date) -> None:
        """Delete what an interrupted run left of this day."""
        for pattern in ("cluster-*.parquet", ".cluster-*.new"):
            for path in self._day(tenant, day).glob(pattern):
                path.unlink(missing_ok=True)
