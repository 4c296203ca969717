"""The span log: every accepted request body as it was received. It is the source of truth.

Layout: ``<data>/<tenant>/log/<YYYY-MM-DD>/<segment>.seg``; the format of a segment is described in
:mod:`betrace.service.storage.spanlog.frames`. The file ``<data>/<tenant>/log/rules`` says which
rules the frames were appended under (:mod:`betrace.service.storage.spanlog.rule_markers`).
``<data>/log.floor`` holds the highest segment number that a deleted tenant used, as text. All
methods block and may be called from any thread; appends to one tenant exclude each other.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from betrace.service.durable import write_atomically
from betrace.service.storage.disk import Disk
from betrace.service.storage.lockfile import LockFile
from betrace.service.storage.paths import tenant_directory, tenants_with
from betrace.service.storage.spanlog.damage import Damage, Skipped
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing, LogWriteError
from betrace.service.storage.spanlog.frames import Frame, unpack_position
from betrace.service.storage.spanlog.open_files import OpenFiles
from betrace.service.storage.spanlog.rule_markers import LoggedRules
from betrace.service.storage.spanlog.segments import Segment
from betrace.service.storage.spanlog.sync import LogSyncer
from betrace.service.storage.spanlog.tenant_log import TenantLog

_LOG = "log"
_DELETED = "log.deleted"
LOCK_FILE = "log.lock"
"""In the data directory; the process that locks it owns the log and the directory."""
_FLOOR = "log.floor"


class LogSyncError(OSError):
    """The disk failed to make frames durable. ``tenants`` are those affected: their frames written
    since the last sync may be lost."""

    def __init__(self, tenants: Sequence[str], cause: OSError) -> None:
        super().__init__(
            cause.errno,
            f"the span log could not be synced for {', '.join(tenants[:5])}"
            f"{' and others' if len(tenants) > 5 else ''} ({cause.strerror or cause}): "
            "check the disk",
        )
        self.tenants = frozenset(tenants)


@dataclass(frozen=True, slots=True)
class SpanLogStatistics:
    """Counters since the log was opened."""

    bytes: int
    """Written, including headers."""
    frames: int
    """Appended."""
    spans: int
    """Accepted spans in the appended frames."""
    write_failures: int
    """Appends that failed."""
    sync_failures: int
    """Syncs that failed, one per tenant."""
    unsynced_bytes: int
    """Bytes written and not yet synced."""
    last_sync_seconds: float
    """Duration of the last sync that had something to sync."""
    open_files: int


class SpanLog:
    """The log in ``directory``.

    A segment is closed at ``segment_bytes`` (a larger frame gets a segment of its own); at most
    ``open_files`` files are kept open. Raises
    :exc:`betrace.service.storage.lockfile.LockedError` if another process owns the log. With
    ``read_only`` the log is not owned, and another process may be appending to it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        segment_bytes: int = 128 << 20,
        open_files: int = 128,
        read_only: bool = False,
        disk: Disk | None = None,
    ) -> None:
        if not 4096 <= segment_bytes <= 2 << 30:
            raise ValueError("segment_bytes must be between 4096 and 2 GiB")
        self.damage = Damage()
        """What could not be read."""
        self.on_skipped: Callable[[Skipped], None] = _ignore
        """Called once for each place that cannot be read, in the thread that met it."""
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._files = OpenFiles(open_files, os.O_RDONLY if read_only else os.O_RDWR)
        self._read_only = read_only
        self._disk = disk or Disk()
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._tenants: dict[str, TenantLog] = {}
        self._bytes = self._frames = self._spans = 0
        self._write_failures = self._sync_failures = 0
        self._last_sync = 0.0
        self._owner: LockFile | None = None
        self._syncer: LogSyncer | None = None
        if not read_only:
            directory.mkdir(parents=True, exist_ok=True)
            self._owner = LockFile(directory / LOCK_FILE)
            self._syncer = LogSyncer(directory, self._disk)
            for tenant in tenants_with(directory, _DELETED):
                shutil.rmtree(tenant_directory(directory, tenant) / _DELETED)
        floor = directory / _FLOOR
        self._floor = int(floor.read_text()) if floor.exists() else 0

    @property
    def skipped(self) -> deque[Skipped]:
        """The last places that could not be read."""
        return self.damage.skipped

    def _skip(self, skipped: Skipped) -> None:
        if self.damage.add(skipped):
            self.on_skipped(skipped)

    def _tenant(self, tenant: str) -> TenantLog:
        log = self._tenants.get(tenant)
        if log is None:
            directory = tenant_directory(self._directory, tenant) / _LOG
            with self._lock:
                log = self._tenants.setdefault(
                    tenant,
                    TenantLog(
                        tenant,
                        directory,
                        self._files,
                        self._disk,
                        self._segment_bytes,
                        self._floor,
                        self._skip,
                    ),
                )
        log.open(recover=not self._read_only)
        return log

    def _existing(self, tenant: str) -> TenantLog | None:
        """The log of ``tenant`` if it has one; queries for other tenants must not use memory."""
        directory = tenant_directory(self._directory, tenant) / _LOG
        if tenant not in self._tenants and not directory.is_dir():
            return None
        log = self._tenant(tenant)
        if self._read_only:
            log.refresh()
        return log

    def _own(self) -> None:
        if self._owner is None:
            raise RuntimeError("the span log is closed, or was opened read-only")

    # Writing

    def is_ready(self, tenant: str, size: int) -> bool:
        """Whether an append of ``size`` bytes now only writes to an existing segment: it creates no
        file and syncs no directory. Does not block."""
        log = self._tenants.get(tenant)
        return log is not None and log.placement.has_capacity(size)

    def append(
        self, tenant: str, frames: Sequence[Frame], rules: LoggedRules | None = None
    ) -> list[int]:
        """Write frames and return their positions, in order. Written frames survive a process
        crash; after :meth:`sync` they survive a machine crash. The log remembers that they were
        appended under ``rules``; without, under those of the frames before.

        All or nothing: if the disk is full or fails, removes what it wrote and raises
        :exc:`LogWriteError`. Raises :exc:`ValueError` for a bad tenant name or a frame over 1 GiB.
        """
        self._own()
        if not frames:
            return []
        while True:
            log = self._tenant(tenant)
            with log.lock:
                if log.gone:
                    continue
                try:
                    positions = log.append(frames, rules)
                except LogWriteError:
                    with self._lock:
                        self._write_failures += 1
                    raise
            with self._lock:
                self._frames += len(frames)
                for frame in frames:
                    self._bytes += frame.stored_bytes
                    self._spans += frame.spans
            return positions

    def sync(self, tenants: Iterable[str] | None = None) -> int:
        """Make durable what was appended to ``tenants`` (default: all) before the call; returns the
        number of bytes. Several tenants are synced at once (:class:`LogSyncer`). Raises
        :exc:`LogSyncError` after trying all of them."""
        self._own()
        with self._lock:
            logs = (
                list(self._tenants.values())
                if tenants is None
                else [
                    self._tenants[name] for name in dict.fromkeys(tenants) if name in self._tenants
                ]
            )
        with self._sync_lock:
            logs = [log for log in logs if log.dirty]
            if not logs:
                return 0
            assert self._syncer is not None
            start = time.perf_counter()
            results = self._syncer.sync(logs)
            self._last_sync = time.perf_counter() - start
        failed = [
            (log.tenant, result)
            for log, result in zip(logs, results, strict=True)
            if isinstance(result, OSError)
        ]
        if failed:
            with self._lock:
                self._sync_failures += len(failed)
            raise LogSyncError([name for name, _ in failed], failed[0][1])
        return sum(result for result in results if isinstance(result, int))

    def continue_after(self, tenant: str, position: int) -> bool:
        """Append only after ``position``, which the log contained once. Returns whether it ends
        before: its end was lost, which is reported as damage."""
        self._own()
        log = self._tenant(tenant)
        end = log.written
        if not log.continue_after(position):
            return False
        number, offset = unpack_position(position)
        start = unpack_position(end)[1] if end >> 32 == number else 0
        self._skip(Skipped(tenant, number, start, offset - start, "the end of the log is missing"))
        return True

    # Reading

    def end(self, tenant: str) -> int:
        """The position after the last frame, 0 without any. The next frame is here or later."""
        log = self._existing(tenant)
        if log is None:
            return 0
        return log.end() if self._read_only else log.written

    written = end

    def synced(self, tenant: str) -> int:
        """The position up to which frames survive a machine crash."""
        log = self._existing(tenant)
        return log.synced if log else 0

    def read(self, tenant: str, position: int) -> Frame:
        """The frame at ``position``, after checking its checksum. Raises :exc:`FrameMissing` if
        there is no such segment, :exc:`FrameCorrupt` if there is no whole frame."""
        found = self.read_many(tenant, [position])[0]
        if isinstance(found, Exception):
            raise found
        return found

    def read_many(
        self, tenant: str, positions: Sequence[int]
    ) -> list[Frame | FrameMissing | FrameCorrupt]:
        """The frames at ``positions``, in the same order; in place of a frame that cannot be read,
        the error."""
        log = self._existing(tenant)
        if log is None:
            return [FrameMissing(f"tenant {tenant} has no log") for _ in positions]
        found: dict[int, Frame | FrameMissing | FrameCorrupt] = {}
        for position in sorted(set(positions)):
            try:
                found[position] = log.read(position)
            except (FrameMissing, FrameCorrupt) as error:
                found[position] = error
        return [found[position] for position in positions]

    def frames(
        self,
        tenant: str,
        start: int | None = None,
        stop: int | None = None,
        since_ns: int | None = None,
        until_ns: int | None = None,
        skipped: Callable[[Skipped], None] | None = None,
    ) -> Iterator[tuple[int, Frame]]:
        """The frames from position ``start`` (default: the first) to before ``stop`` (default: the
        present end), received at ``since_ns`` or later and before ``until_ns``, each with its
        position, in order of position.

        Damaged places are skipped and reported in :attr:`damage`, and to ``skipped`` even if they
        were known.
        """
        log = self._existing(tenant)
        if log is None:
            return iter(())
        if stop is None and not self._read_only:
            stop = log.written
        return log.frames(start or 0, stop, since_ns, until_ns, skipped)

    def rules_at(self, tenant: str, position: int) -> LoggedRules | None:
        """The rules that the frame at ``position`` was appended under; None if the log does not
        know them, as before version 0.3."""
        log = self._existing(tenant)
        return log.rules.at(position) if log else None

    def rules_version_at(self, tenant: str, position: int) -> str | None:
        """The version of :meth:`rules_at`; costs much less."""
        log = self._existing(tenant)
        return log.rules.version_at(position) if log else None

    def tenants(self) -> list[str]:
        """The tenants that have a log, sorted."""
        return tenants_with(self._directory, _LOG)

    def segments(self, tenant: str) -> list[Segment]:
        """The tenant's segments, in order."""
        log = self._existing(tenant)
        return log.segments() if log else []

    def statistics(self) -> SpanLogStatistics:
        with self._lock:
            return SpanLogStatistics(
                bytes=self._bytes,
                frames=self._frames,
                spans=self._spans,
                write_failures=self._write_failures,
                sync_failures=self._sync_failures,
                unsynced_bytes=sum(log.unsynced for log in self._tenants.values()),
                last_sync_seconds=self._last_sync,
                open_files=len(self._files),
            )

    # Deleting

    def release(self, tenant: str, segments: Collection[int]) -> int:
        """Delete segments of ``tenant`` (archived, or past retention) by number; returns the bytes
        freed. The newest segment stays, so that numbering continues from it."""
        self._own()
        log = self._existing(tenant)
        return log.release(segments) if log else 0

    def delete_tenant(self, tenant: str) -> None:
        """Delete the tenant's whole log. If the tenant is created again, its segment numbers
        continue, so that no old position points into the new log."""
        self._own()
        log = self._existing(tenant)
        if log is None:
            return
        directory = tenant_directory(self._directory, tenant)
        with log.lock:
            if log.gone:  # deleted by another thread in the meantime
                return
            last = log.retire()
            with self._lock:
                self._floor = max(self._floor, last)
                write_atomically(self._directory / _FLOOR, f"{self._floor}\n".encode())
                if (directory / _LOG).exists():
                    (directory / _LOG).rename(directory / _DELETED)
                del self._tenants[tenant]
        shutil.rmtree(directory / _DELETED, ignore_errors=True)
        with suppress(OSError):  # other stores have files there
            directory.rmdir()

    def close(self) -> None:
        """Sync, close the files and release the lock. Idempotent."""
        if self._owner is not None:
            try:
                self.sync()
            finally:
                assert self._syncer is not None
                self._syncer.close()
                self._owner.release()
                self._owner = None
        self._files.close()

    def __enter__(self) -> SpanLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _ignore(skipped: Skipped) -> None:
    """The default of ``on_skipped``."""
