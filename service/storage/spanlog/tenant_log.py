"""One tenant's part of the span log: its segments, and where the next frame goes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from betrace.service.durable import sync_directory
from betrace.service.storage.disk import Disk
from betrace.service.storage.spanlog import frames as format_
from betrace.service.storage.spanlog.damage import TORN, Skipped
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing, LogWriteError
from betrace.service.storage.spanlog.frames import (
    FRAME_HEADER_BYTES,
    MAX_SEGMENT,
    Frame,
    Header,
    SegmentReader,
    pack_position,
    unpack_position,
)
from betrace.service.storage.spanlog.gaps import Gaps
from betrace.service.storage.spanlog.open_files import OpenFiles
from betrace.service.storage.spanlog.placement import Placement, SegmentWrite
from betrace.service.storage.spanlog.rule_markers import NAME, LoggedRules, RuleMarkers
from betrace.service.storage.spanlog.segments import Segment, covers, find_segments
from betrace.service.times import day_ns

_READ_FIRST = 1 << 12
# After a process crash, its last writes may not be on the disk yet. The kernel writes back what is
# older than 30 s; segments that changed within this time are synced again.
_UNCERTAIN_SECONDS = 600
_MARKERS = 0  # in place of a segment number, among what must be synced


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
        self._skipped = skipped
        self._opened = False
        self._paths: dict[int, Path] = {}
        # Where to stop reading segments that could not be truncated.
        self._limits: dict[int, int] = {}
        self._strays: set[Path] = set()  # files that are not segments and were reported
        self._dirty: dict[int, Path] = {}
        self._dirty_directories: dict[Path, None] = {}
        self.placement = Placement(tenant, directory, segment_bytes, floor)
        self.rules = RuleMarkers(tenant, directory / NAME, disk)
        """The rules that the frames were appended under."""
        self._marked: str | None = None  # the version of the last marker, which is on the disk

    # Files

    def refresh(self) -> None:
        """List the files again, because another process appends to the log."""
        with self.lock:
            self._paths = find_segments(self._directory, self._strays)

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
        current = self.placement.current
        if current is not None and current.number == number:
            return current.end
        limit = self._limits.get(number)
        return path.stat().st_size if limit is None else limit

    def _pread(self, path: Path, offset: int, length: int) -> bytes:
        with self._files.use(path) as descriptor:
            return os.pread(descriptor, length, offset)

    def _reader(
        self,
        number: int,
        path: Path,
        skipped: Callable[[int, int, str, Sequence[Header]], None] = lambda *_: None,
    ) -> SegmentReader:
        return SegmentReader(
            lambda offset, length: self._pread(path, offset, length), self.tenant, number, skipped
        )

    # Opening

    def open(self, recover: bool) -> None:
        """Find the segments, at the first call. With ``recover``, check the end of the last one: a
        torn frame is cut off; after other damage, which is reported, the segment stays as it is
        and the next append starts a new one."""
        if self._opened:
            return
        damaged = 0
        with self.lock:
            if self._opened:
                return
            self._paths = find_segments(self._directory, self._strays)
            self.placement.last = max(self._paths, default=self.placement.last)
            if self._paths and recover:
                damaged = self._recover()
            self._opened = True
        if damaged:
            for _ in self.frames(pack_position(damaged, 0), None, None, None):
                pass

    def continue_after(self, position: int) -> bool:
        """Append only at positions after this one, although the log ends before it, because its
        end was lost. Returns whether that is so."""
        with self.lock:
            if self.written >= position:
                return False
            number, _ = unpack_position(position)
            self.placement.last = max(self.placement.last, number)
            self.placement.current = None
        return True

    def _recover(self) -> int:
        """Returns the number of the last segment if its end is damaged, else 0."""
        number, path = next(reversed(self._paths.items()))
        size = path.stat().st_size
        self.written = pack_position(number, size)
        now = time.time()
        for each, file in {_MARKERS: self.rules.path, **self._paths}.items():
            with suppress(FileNotFoundError):  # a log of an earlier version has no markers
                if now - file.stat().st_mtime < _UNCERTAIN_SECONDS:
                    self._dirty[each] = file
                    self._dirty_directories[file.parent] = None
        self.recovered = bool(self._dirty)
        if not self._dirty:
            self.synced = self.written
        try:
            reader = self._reader(number, path)
        except ValueError:
            return number
        end, trouble = reader.tail(size)
        if trouble == "torn":
            self._skipped(Skipped(self.tenant, number, end, size - end, TORN))
            with self._files.use(path) as descriptor:
                self._disk.truncate(descriptor, end)
            self.written = pack_position(number, end)
        if trouble != "damaged" and reader.salt is not None:
            day = (date.fromisoformat(path.parent.name) - date(1970, 1, 1)).days
            self.placement.continue_at(number, day, path, reader.salt, end)
        return number if trouble == "damaged" and size else 0

    # Writing

    def append(self, frames: Sequence[Frame], rules: LoggedRules | None = None) -> list[int]:
        """Write the frames; the caller holds ``lock``. See :meth:`SpanLog.append`."""
        parts, positions = self.placement.plan(frames)
        begun: list[SegmentWrite] = []
        try:
            if rules is not None and rules.version != self._marked:
                self._mark(rules)
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
        self.placement.continue_at(last.number, last.day, last.path, last.salt, last.end)
        self.written = pack_position(last.number, last.end)
        return positions

    def _mark(self, rules: LoggedRules) -> None:
        """Note that the next frames belong to these rules."""
        if self.placement.current is None:
            self._make(self._directory)
        if self.rules.mark(self.written, rules):
            self._dirty[_MARKERS] = self.rules.path
            self._dirty_directories[self._directory] = None
        self._marked = rules.version

    def _write(self, part: SegmentWrite) -> None:
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

    def _undo(self, part: SegmentWrite) -> None:
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
            self.placement.current = None

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
                self.placement.current = None
                self.rules.doubt()
                self._marked = None
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
                    self._corrupt(number, offset, header, None)
                    raise FrameCorrupt(f"{header}: {where}")
                payload = data[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + header.length]
                if len(payload) < header.length:  # reading it again costs less than joining
                    payload = os.pread(descriptor, header.length, offset + FRAME_HEADER_BYTES)
        except FileNotFoundError:
            raise FrameMissing(f"the segment's file is gone: {where}") from None
        found = header.frame(payload)
        if isinstance(found, str):
            self._corrupt(number, offset, found, header)
            raise FrameCorrupt(f"{found}: {where}")
        return found

    def _corrupt(self, number: int, offset: int, reason: str, header: Header | None) -> None:
        """Report that the frame at an offset of a segment is damaged."""
        if pack_position(number, offset) >= (self.written or MAX_SEGMENT << 32):
            return  # the end of the log was lost, and with it what is asked for
        size = FRAME_HEADER_BYTES + (header.length if header else 0)
        at = header.received_ns if header else None
        spans = header.spans if header else 0
        self._skipped(
            Skipped(self.tenant, number, offset, size, reason, spans, at, at, bool(header))
        )

    def frames(
        self,
        start: int,
        stop: int | None,
        since_ns: int | None,
        until_ns: int | None,
        also_skipped: Callable[[Skipped], None] | None = None,
    ) -> Iterator[tuple[int, Frame]]:
        """See :meth:`SpanLog.frames`."""
        first, offset = unpack_position(start)
        last, last_offset = unpack_position(stop) if stop is not None else (MAX_SEGMENT, 0)

        def skipped(found: Skipped) -> None:
            self._skipped(found)
            if also_skipped is not None:
                also_skipped(found)

        gaps = Gaps(self.tenant, skipped)
        try:
            for segment in self.segments():
                if not first <= segment.number <= last:
                    continue
                if not covers(segment.day, since_ns, until_ns):
                    continue
                end = min(segment.bytes, last_offset) if segment.number == last else segment.bytes
                gaps.begin(segment.number, day_ns(segment.day))
                try:
                    reader = self._reader(segment.number, segment.path, gaps.add)
                except FileNotFoundError:  # released in the meantime
                    continue
                except ValueError as error:
                    gaps.add(0, end, str(error), ())
                    continue
                for at, frame in reader.frames(offset if segment.number == first else 0, end):
                    gaps.end(frame.received_ns)
                    if (since_ns is None or frame.received_ns >= since_ns) and (
                        until_ns is None or frame.received_ns < until_ns
                    ):
                        yield pack_position(segment.number, at), frame
        finally:
            gaps.end(None)

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
            if freed:
                self.rules.forget_before(pack_position(min(self._paths), 0))
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
        return self.placement.last
