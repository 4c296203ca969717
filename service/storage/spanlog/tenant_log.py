"""One tenant's part of the span log: its segments, and where the next frame goes."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from betrace.service.durable import sync_directory
from betrace.service.storage.disk import Buffer, Disk
from betrace.service.storage.spanlog import frames as format_
from betrace.service.storage.spanlog.frames import (
    FILE_HEADER_BYTES,
    FRAME_HEADER_BYTES,
    MAX_SEGMENT,
    Frame,
    SegmentReader,
    Skipped,
    pack_position,
    unpack_position,
)
from betrace.service.storage.spanlog.open_files import OpenFiles

_log = logging.getLogger("service.spanlog")

_NAME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}/[0-9]{8,10}\.seg")
_DAY_NS = 86_400 * 10**9
_LATE_NS = 3600 * 10**9  # a segment accepts frames received this much before its day
_READ_FIRST = 1 << 16
# After a process crash, its last writes may not be on the disk yet. The kernel writes back what is
# older than 30 s; segments that changed within this time are synced again.
_UNCERTAIN_SECONDS = 600


class LogWriteError(OSError):
    """Frames could not be written; none of them is in the log."""


class FrameMissing(LookupError):  # noqa: N818
    """No segment contains this position; it may have been released."""


class FrameCorrupt(ValueError):  # noqa: N818
    """There is no whole frame at this position."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the log. ``day`` is the UTC day on which its frames were received."""

    number: int
    day: date
    path: Path
    bytes: int


@dataclass(slots=True)
class _Part:
    """What one append writes to one segment."""

    number: int
    day: int
    path: Path
    salt: bytes
    start: int  # the previous end of the segment
    end: int
    new: bool
    buffers: list[Buffer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Dirty:
    """What one sync makes durable."""

    files: list[Path]
    directories: list[Path]
    bytes: int
    written: int  # the position after the last frame


class TenantLog:
    """The segments of one tenant. Thread-safe; appends exclude each other, reads do not.

    ``directory`` is the tenant's log directory; a tenant without segments starts numbering after
    ``floor``. Call :meth:`open` first.
    """

    def __init__(
        self,
        tenant: str,
        directory: Path,
        files: OpenFiles,
        disk: Disk,
        segment_bytes: int,
        floor: int,
        skipped: Callable[[Skipped], None],
    ) -> None:
        self.tenant = tenant
        self.lock = threading.Lock()
        self.gone = False  # deleted; a new instance is needed
        self.recovered = False  # whether unsynced frames include some from before the start
        self.unsynced = 0
        self.written = 0
        self.synced = 0
        self._directory = directory
        self._files = files
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._skipped = skipped
        self._opened = False
        self._paths: dict[int, Path] = {}
        # Where to stop reading segments that could not be truncated.
        self._limits: dict[int, int] = {}
        self._strays: set[Path] = set()  # files that are not segments and were reported
        self._dirty: dict[int, Path] = {}
        self._dirty_directories: dict[Path, None] = {}
        self._current: _Part | None = None  # None if the next append starts a segment
        self._last = floor

    # Files

    def _list(self) -> dict[int, Path]:
        found: dict[int, Path] = {}
        for path in sorted(self._directory.glob("*/*.seg")):
            number = _segment_number(path)
            if number and number not in found:
                found[number] = path
            elif path not in self._strays:
                self._strays.add(path)
                _log.warning(
                    "%s is not a segment of the span log (its name should be "
                    "YYYY-MM-DD/NNNNNNNN.seg with an unused number) and is ignored: move it "
                    "away",
                    path,
                )
        return dict(sorted(found.items()))

    def refresh(self) -> None:
        """List the files again, because another process appends to the log."""
        with self.lock:
            self._paths = self._list()

    def segments(self) -> list[Segment]:
        """The segments in order."""
        with self.lock:
            paths = list(self._paths.items())
        found = []
        for number, path in paths:
            with suppress(FileNotFoundError):
                day = date.fromisoformat(path.parent.name)
                found.append(Segment(number, day, path, self._end(number, path)))
        return found

    def _end(self, number: int, path: Path) -> int:
        """The offset up to which the segment may be read."""
        current = self._current
        if current is not None and current.number == number:
            return current.end
        limit = self._limits.get(number)
        return path.stat().st_size if limit is None else limit

    def _pread(self, path: Path, offset: int, length: int) -> bytes:
        with self._files.use(path) as descriptor:
            return os.pread(descriptor, length, offset)

    def _reader(self, number: int, path: Path) -> SegmentReader:
        return SegmentReader(
            lambda offset, length: self._pread(path, offset, length),
            self.tenant,
            number,
            lambda offset, size, reason: self._skipped(
                Skipped(self.tenant, number, offset, size, reason)
            ),
        )

    # Opening

    def open(self, recover: bool) -> None:
        """Find the segments, at the first call. With ``recover``, check the end of the last one: a
        torn frame is cut off; after other damage the segment stays as it is and the next append
        starts a new one."""
        if self._opened:
            return
        with self.lock:
            if self._opened:
                return
            self._paths = self._list()
            self._last = max(self._paths, default=self._last)
            if self._paths and recover:
                self._recover()
            self._opened = True

    def _recover(self) -> None:
        number, path = next(reversed(self._paths.items()))
        size = path.stat().st_size
        self.written = pack_position(number, size)
        now = time.time()
        for each, file in self._paths.items():
            if now - file.stat().st_mtime < _UNCERTAIN_SECONDS:
                self._dirty[each] = file
                self._dirty_directories[file.parent] = None
        self.recovered = bool(self._dirty)
        if not self._dirty:
            self.synced = self.written
        try:
            reader = self._reader(number, path)
        except ValueError:
            return
        end, trouble = reader.tail(size)
        if trouble == "torn":
            self._skipped(Skipped(self.tenant, number, end, size - end, "torn frame, cut off"))
            with self._files.use(path) as descriptor:
                self._disk.truncate(descriptor, end)
            self.written = pack_position(number, end)
        if trouble != "damaged" and reader.salt is not None:
            day = (date.fromisoformat(path.parent.name) - date(1970, 1, 1)).days
            self._current = _Part(number, day, path, reader.salt, end, end, False)

    # Writing

    def has_capacity(self, size: int) -> bool:
        """Whether ``size`` bytes fit in the current segment."""
        part = self._current
        return part is not None and part.end + size <= self._segment_bytes

    def append(self, frames: Sequence[Frame]) -> list[int]:
        """Write the frames; the caller holds ``lock``. See :meth:`SpanLog.append`."""
        parts, positions = self._plan(frames)
        begun: list[_Part] = []
        try:
            for part in parts:
                begun.append(part)
                self._write(part)
        except OSError as error:
            for part in reversed(begun):
                self._undo(part)
            raise LogWriteError(
                error.errno,
                f"the span log of tenant {self.tenant} cannot be written "
                f"({error.strerror or error}): check the disk's free space and health",
            ) from error
        for part in parts:
            self.unsynced += part.end - part.start
            self._paths[part.number] = self._dirty[part.number] = part.path
        last = parts[-1]
        last.start, last.new, last.buffers = last.end, False, []
        self._current = last
        self.written = pack_position(last.number, last.end)
        return positions

    def _plan(self, frames: Sequence[Frame]) -> tuple[list[_Part], list[int]]:
        """Decide which frames go where, without writing."""
        parts: list[_Part] = []
        positions = []
        part = self._current
        if part is not None:
            part = _Part(part.number, part.day, part.path, part.salt, part.end, part.end, False)
            parts.append(part)
        for frame in frames:
            size = frame.stored_bytes
            if part is None or self._rolls(part, frame.received_ns, size):
                part = self._begin(frame.received_ns // _DAY_NS)
                parts.append(part)
            position = pack_position(part.number, part.end)
            part.buffers.append(format_.frame_header(frame, part.salt, position))
            if len(frame.payload):
                part.buffers.append(frame.payload)
            part.end += size
            positions.append(position)
        return [part for part in parts if part.buffers], positions

    def _rolls(self, part: _Part, received_ns: int, size: int) -> bool:
        early = received_ns - part.day * _DAY_NS
        return not (-_LATE_NS <= early < _DAY_NS) or (
            part.end > FILE_HEADER_BYTES and part.end + size > self._segment_bytes
        )

    def _begin(self, day: int) -> _Part:
        if self._last >= MAX_SEGMENT:
            raise LogWriteError(
                errno.EFBIG,
                f"the span log of tenant {self.tenant} has no segment numbers left: delete the "
                "tenant, or use another one",
            )
        self._last += 1
        salt = os.urandom(8)
        name = (date(1970, 1, 1) + timedelta(days=day)).isoformat()
        return _Part(
            self._last,
            day,
            self._directory / name / f"{self._last:08d}.seg",
            salt,
            0,
            FILE_HEADER_BYTES,
            True,
            [format_.file_header(self.tenant, day, self._last, salt)],
        )

    def _write(self, part: _Part) -> None:
        flags = 0
        if part.new:
            self._make(part.path.parent)
            flags = os.O_CREAT | os.O_EXCL
        with self._files.use(part.path, flags) as descriptor:
            self._disk.write_all(descriptor, part.buffers, part.start)

    def _make(self, directory: Path) -> None:
        """Create a directory and its parents, and have the next sync make them durable."""
        self._dirty_directories[directory] = None
        if not directory.exists():
            self._make(directory.parent)
            directory.mkdir(exist_ok=True)

    def _undo(self, part: _Part) -> None:
        """Undo a part of a failed append; if that fails, stop using its segment."""
        if part.new:
            self._files.forget(part.path)
            with suppress(OSError):
                part.path.unlink(missing_ok=True)
            return
        try:
            with self._files.use(part.path) as descriptor:
                self._disk.truncate(descriptor, part.start)
        except OSError:
            self._limits[part.number] = part.start
            self._current = None

    def take_dirty(self) -> Dirty:
        """What must be synced. The caller must then call :meth:`sync_files` or :meth:`settle`."""
        with self.lock:
            taken = Dirty(
                list(self._dirty.values()),
                list(self._dirty_directories),
                self.unsynced,
                self.written,
            )
            self._dirty, self._dirty_directories, self.unsynced = {}, {}, 0
            self.recovered = False
        return taken

    def sync_files(self, dirty: Dirty) -> int:
        """Sync each file; returns the number of bytes that became durable. Raises :exc:`OSError` if
        the disk fails; the segment then takes no more frames, because its contents are
        uncertain."""
        try:
            for path in dirty.files:
                self._sync_file(path)
            for directory in dirty.directories:
                with suppress(FileNotFoundError):
                    sync_directory(directory)
        except OSError:
            with self.lock:
                self._current = None
                self._dirty_directories |= dict.fromkeys(dirty.directories)
            raise
        return self.settle(dirty)

    def settle(self, dirty: Dirty) -> int:
        """Note that everything is durable; returns the number of bytes."""
        self.synced = max(self.synced, dirty.written)
        return dirty.bytes

    def on_device(self, device: int) -> bool:
        """Whether the log is on the filesystem with this number (``st_dev``)."""
        try:
            return self._directory.stat().st_dev == device
        except FileNotFoundError:  # deleted in the meantime
            return False

    def _sync_file(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # released in the meantime
            return
        try:
            self._disk.sync(descriptor)
        finally:
            os.close(descriptor)

    @property
    def dirty(self) -> bool:
        """Whether there is something to sync."""
        return bool(self._dirty or self._dirty_directories)

    # Reading

    def read(self, position: int) -> Frame:
        """See :meth:`SpanLog.read`."""
        number, offset = unpack_position(position)
        path = self._paths.get(number)
        where = f"segment {number}, offset {offset} of tenant {self.tenant}"
        if path is None:
            raise FrameMissing(f"no such segment: {where}")
        try:
            with self._files.use(path) as descriptor:
                data = os.pread(descriptor, _READ_FIRST, offset)
                header = format_.read_header(data, position, None)
                if isinstance(header, str):
                    raise FrameCorrupt(f"{header}: {where}")
                payload = data[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + header.length]
                if len(payload) < header.length:
                    payload += os.pread(
                        descriptor, header.length - len(payload), offset + len(data)
                    )
        except FileNotFoundError:
            raise FrameMissing(f"the segment's file is gone: {where}") from None
        found = header.frame(payload)
        if isinstance(found, str):
            raise FrameCorrupt(f"{found}: {where}")
        return found

    def frames(
        self, start: int, stop: int | None, since_ns: int | None, until_ns: int | None
    ) -> Iterator[tuple[int, Frame]]:
        """See :meth:`SpanLog.frames`."""
        first, offset = unpack_position(start)
        last, last_offset = unpack_position(stop) if stop is not None else (MAX_SEGMENT, 0)
        for segment in self.segments():
            if not first <= segment.number <= last or not _covers(segment.day, since_ns, until_ns):
                continue
            end = min(segment.bytes, last_offset) if segment.number == last else segment.bytes
            try:
                reader = self._reader(segment.number, segment.path)
            except FileNotFoundError:  # released in the meantime
                continue
            except ValueError as error:
                self._skipped(Skipped(self.tenant, segment.number, 0, end, str(error)))
                continue
            for at, frame in reader.frames(offset if segment.number == first else 0, end):
                if (since_ns is None or frame.received_ns >= since_ns) and (
                    until_ns is None or frame.received_ns < until_ns
                ):
                    yield pack_position(segment.number, at), frame

    # Deleting

    def release(self, numbers: Collection[int]) -> int:
        """See :meth:`SpanLog.release`."""
        freed = 0
        with self.lock:
            newest = max(self._paths, default=0)
            for number in sorted(set(numbers) & set(self._paths) - {newest}):
                path = self._paths.pop(number)
                self._dirty.pop(number, None)
                self._limits.pop(number, None)
                freed += path.stat().st_size
                self._files.forget(path)
                path.unlink()
                with suppress(OSError):  # other segments are still in it
                    path.parent.rmdir()
        return freed

    def end(self) -> int:
        """The position after the last frame, according to the files."""
        segments = self.segments()
        return pack_position(segments[-1].number, segments[-1].bytes) if segments else 0

    def retire(self) -> int:
        """Close all files for good; returns the highest segment number used. The caller holds
        ``lock``."""
        self.gone = True
        for path in self._paths.values():
            self._files.forget(path)
        return self._last


def _segment_number(path: Path) -> int:
    """The number of a segment, 0 if ``path`` cannot be one."""
    if _NAME.fullmatch(f"{path.parent.name}/{path.name}") is None or not path.is_file():
        return 0
    try:
        date.fromisoformat(path.parent.name)
    except ValueError:
        return 0
    number = int(path.stem)
    return number if number <= MAX_SEGMENT else 0


def _covers(day: date, since_ns: int | None, until_ns: int | None) -> bool:
    """Whether a segment of ``day`` can hold frames from that time."""
    start = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 10**9
    return (since_ns is None or since_ns < start + _DAY_NS) and (
        until_ns is None or until_ns > start - _LATE_NS
    )
