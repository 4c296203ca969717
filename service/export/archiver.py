"""Archives past days as Parquet, and deletes their log once retention is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from betrace.service.config.settings import Settings
from betrace.service.export.parquet import (
    Archived,
    ArchiveError,
    archive_segment,
    delete_stale,
    find_archived,
)
from betrace.service.storage.spanlog.frames import pack_position
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.segments import Segment
from betrace.service.traces.checkpoint import checkpoint_files, read_checkpoint


def today() -> date:
    """The current day in UTC."""
    return datetime.now(UTC).date()


def archive_directory(settings: Settings) -> Path:
    """The archive's directory: ``archive.directory``, or ``archive`` in ``storage.path``."""
    given = settings.archive.directory
    return Path(given) if given else settings.storage.path / "archive"


@dataclass(slots=True)
class ArchiveResult:
    """What a run of :class:`Archiver` did."""

    files: int = 0
    spans: int = 0
    damaged: list[str] = field(default_factory=list)
    """Segments with unreadable parts, as ``tenant/number``; they stay in the log."""
    failures: list[str] = field(default_factory=list)
    released_segments: int = 0
    released_bytes: int = 0


class Archiver:
    """Archives and releases segments of the span log. Methods block; :meth:`stop` is thread-safe.

    Args:
      directory: of the archive.
      checkpoints: directory of the checkpoints.
      max_body_bytes: limit on a decompressed request body.
      pause: called between pieces of work.
    """

    def __init__(
        self,
        log: SpanLog,
        directory: Path,
        checkpoints: Path,
        max_body_bytes: int,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._log = log
        self._directory = directory
        self._checkpoints = checkpoints
        self._max_body = max_body_bytes
        self._pause = pause
        self._stopped = False
        self.done = ArchiveResult()

    def stop(self) -> None:
        """End the current run after the segment in progress."""
        self._stopped = True

    def archive(self, before: date, tenants: list[str] | None = None) -> Iterator[Archived]:
        """Archive each segment of days before ``before`` whose current content is not archived.

        Failures are added to :attr:`done`, and the run goes on with the next segment. Temporary
        files of an earlier process that was killed are deleted first.
        """
        for tenant in self._tenants(tenants):
            delete_stale(self._directory, tenant)
        for tenant, segment in self._segments(before, tenants):
            found = find_archived(self._directory, tenant, segment)
            if found is None:
                try:
                    found = archive_segment(
                        self._directory, self._log, tenant, segment, self._max_body, self._pause
                    )
                except ArchiveError as error:
                    self.done.failures.append(str(error))
                    continue
                self.done.files += 1
                self.done.spans += found.spans
                yield found
            if found.damaged_bytes:
                self.done.damaged.append(f"{tenant}/{segment.number:08d}")

    def release(self, before: date, *, archived: bool, tenants: list[str] | None = None) -> None:
        """Delete the segments of days before ``before`` that no restart needs from the log.

        With ``archived``, only segments that are archived in full. A tenant's newest segment
        always stays.
        """
        safe = covered(self._checkpoints)
        wanted: dict[str, list[int]] = {}
        for tenant, segment in self._segments(before, tenants):
            if pack_position(segment.number + 1, 0) > safe.get(tenant, 0):
                continue
            if archived:
                found = find_archived(self._directory, tenant, segment)
                if found is None or found.damaged_bytes:
                    continue
            wanted.setdefault(tenant, []).append(segment.number)
        for tenant, numbers in wanted.items():
            before_bytes = len(self._log.segments(tenant))
            self.done.released_bytes += self._log.release(tenant, numbers)
            self.done.released_segments += before_bytes - len(self._log.segments(tenant))

    def _tenants(self, wanted: list[str] | None) -> list[str]:
        return self._log.tenants() if wanted is None else wanted

    def _segments(self, before: date, tenants: list[str] | None) -> Iterator[tuple[str, Segment]]:
        for tenant in self._tenants(tenants):
            for segment in self._log.segments(tenant):
                if self._stopped:
                    return
                if segment.day < before:
                    yield tenant, segment


def covered(checkpoints: Path) -> dict[str, int]:
    """By tenant: the log position before which no restart reads, whichever checkpoint it uses.

    A tenant is missing if its position is unknown.
    """
    safe: dict[str, int] | None = None
    for path in checkpoint_files(checkpoints):
        try:
            progress = read_checkpoint(path).progress
        except (OSError, ValueError, KeyError):
            continue  # a restart skips it too
        found = {
            tenant: min(pending, default=last + 1) for tenant, (last, pending) in progress.items()
        }
        if safe is None:
            safe = found
        else:
            safe = {t: min(safe[t], found[t]) for t in safe.keys() & found.keys()}
    return safe or {}


def log_until(settings: Settings, day: date) -> date | None:
    """The first day that the log keeps, as of ``day``; None if it keeps all days."""
    days = settings.retention.log_days
    return day - timedelta(days=days) if days else None


class Throttle:
    """Sleeps as long as the work before it took (1 s at most), so that archiving uses at most
    half a core."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self) -> None:
        time.sleep(min(time.monotonic() - self._since, 1.0))
        self._since = time.monotonic()
