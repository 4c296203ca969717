"""Local files for what a store did not accept: lines of JSON, synced, read back in order.

A directory contains files ``<number>.jsonl``, the lowest number being the oldest. What
:meth:`FallbackFiles.append` was given survives a machine crash once it returns. Lines are read in
the order in which they were written, and are *consumed* when the store has them; a consumed file is
deleted. After a restart the files are read from the beginning again, so the store must accept a
repeated line.

A last line without a newline was never acknowledged and is cut off. An invalid line is set aside in
``damaged.txt`` and counted; it does not block the rest.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from betrace.service.durable import replacing, sync_directory
from betrace.service.storage.disk import Disk

_SUFFIX = ".jsonl"
_NEW = ".new"
_DAMAGED = "damaged.txt"
_BLOCK = 1 << 20


class FallbackFull(Exception):  # noqa: N818
    """The files have reached their greatest size; nothing was written."""


@dataclass(slots=True, eq=False)
class _LineFile:
    number: int
    path: Path
    size: int  # bytes of whole lines
    lines: int
    read: int = 0  # consumed bytes
    sealed: bool = False  # no more lines are appended


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines of one file, without newlines, that were read but are not consumed yet."""

    number: int
    end: int
    lines: list[bytes]


@dataclass(frozen=True, slots=True)
class FallbackStatistics:
    """What the files contain, and counters since they were opened."""

    files: int
    lines: int
    bytes: int
    max_bytes: int
    appended: int
    """Lines."""
    consumed: int
    """Lines."""
    damaged: int
    """Lines set aside, and incomplete lines cut off."""


class FallbackFiles:
    """The files in ``directory``, which is created if missing. All methods block and may be called
    from any thread; they raise :exc:`OSError` if the disk fails.

    Args:
      directory: used for these files only.
      max_bytes: of all files together.
      file_bytes: after this size, lines go to a new file.
      disk: the calls that change files.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        file_bytes: int = 8 << 20,
        disk: Disk | None = None,
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._file_bytes = file_bytes
        self._disk = disk or Disk()
        self._lock = threading.Lock()
        self._files: deque[_LineFile] = deque()
        self._descriptor = -1  # of the last file, where more may be appended
        self._appended = self._consumed = self._damaged = 0
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"*{_NEW}"):  # left by a crash within drop()
            left.unlink()
        numbered = [path for path in directory.glob(f"*{_SUFFIX}") if path.stem.isdigit()]
        self._next = max((int(path.stem) for path in numbered), default=0) + 1
        for path in sorted(numbered, key=lambda path: int(path.stem)):
            self._open(path)

    def _open(self, path: Path) -> None:
        """Add an existing file."""
        size = lines = end = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                lines += block.count(b"\n")
                last = block.rfind(b"\n")
                if last >= 0:
                    end = size + last + 1
                size += len(block)
        if end < size:
            self._damaged += 1
            os.truncate(path, end)
        if end:
            self._files.append(_LineFile(int(path.stem), path, end, lines, sealed=True))
        else:
            path.unlink()

    @property
    def pending(self) -> int:
        """Bytes that are not consumed yet."""
        return sum(file.size - file.read for file in tuple(self._files))

    def append(self, lines: Sequence[bytes]) -> None:
        """Write lines, each JSON without line breaks. All are durable when this returns, and none
        is kept after an error. Raises :exc:`FallbackFull`."""
        data = [part for line in lines for part in (line, b"\n")]
        size = sum(len(part) for part in data)
        if not size:
            return
        with self._lock:
            total = sum(file.size for file in self._files)
            if total + size > self._max_bytes:
                raise FallbackFull(
                    f"{self._directory} has {total} of at most {self._max_bytes} bytes: repair the "
                    "store to which they are to be written, or raise fallback.max_bytes"
                )
            file = self._last()
            try:
                self._disk.write_all(self._descriptor, data, file.size)
                self._disk.sync(self._descriptor)
            except OSError:
                # Bytes left after the end may reappear after a crash, as a repetition.
                with suppress(OSError):
                    self._disk.truncate(self._descriptor, file.size)
                self._seal(file)
                raise
            file.size += size
            file.lines += len(lines)
            self._appended += len(lines)
            if file.size >= self._file_bytes:
                self._seal(file)

    def _last(self) -> _LineFile:
        """The file to append to."""
        if self._files and not self._files[-1].sealed:
            return self._files[-1]
        path = self._directory / f"{self._next:06d}{_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        try:
            sync_directory(self._directory)
        except OSError:
            os.close(self._descriptor)
            raise
        file = _LineFile(self._next, path, 0, 0)
        self._next += 1
        self._files.append(file)
        return file

    def _seal(self, file: _LineFile) -> None:
        os.close(self._descriptor)
        file.sealed = True
        if file.read == file.size:
            self._remove(file)

    def read(self, max_lines: int, max_bytes: int) -> Chunk | None:
        """The oldest lines that are not consumed yet, None without any. Returns at least one line,
        and otherwise stays within the limits."""
        with self._lock:
            while self._files and self._files[0].read == self._files[0].size:
                if not self._files[0].sealed:
                    return None
                self._remove(self._files[0])
            if not self._files:
                return None
            file = self._files[0]
            number, path, start, size = file.number, file.path, file.read, file.size
        with path.open("rb") as source:
            source.seek(start)
            lines: list[bytes] = []
            end = start
            while end < size and len(lines) < max_lines:
                line = source.readline()
                if lines and end - start + len(line) > max_bytes:
                    break
                if not line:  # somebody truncated the file
                    end = size
                    break
                end += len(line)
                lines.append(line.rstrip(b"\n"))
        return Chunk(number, end, lines)

    def consume(self, chunk: Chunk) -> None:
        """Mark a chunk as consumed; deletes its file after the last chunk."""
        with self._lock:
            file = self._files[0] if self._files else None
            if file is None or file.number != chunk.number or chunk.end <= file.read:
                return
            file.read = chunk.end
            file.lines -= len(chunk.lines)
            self._consumed += len(chunk.lines)
            if file.read == file.size:
                if not file.sealed:
                    os.close(self._descriptor)
                self._remove(file)

    def set_aside(self, line: bytes) -> None:
        """Keep an invalid line in ``damaged.txt`` for inspection."""
        with self._lock, (self._directory / _DAMAGED).open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._damaged += 1

    def drop(self, unwanted: Callable[[bytes], bool]) -> int:
        """Delete the ``unwanted`` lines, including those set aside; returns how many. The others
        keep their order. Must not be called between :meth:`read` and :meth:`consume`."""
        with self._lock:
            if self._files and not self._files[-1].sealed:
                self._seal(self._files[-1])
            dropped = 0
            for file in list(self._files):
                gone, kept, size = self._rewrite(file.path, file.read, file.size, unwanted)
                if gone:
                    dropped += gone
                    file.read, file.lines, file.size = 0, kept, size
                    if not kept:
                        self._remove(file)
            damaged = self._directory / _DAMAGED
            if damaged.exists():
                dropped += self._rewrite(damaged, 0, damaged.stat().st_size, unwanted)[0]
            return dropped

    def _rewrite(
        self, path: Path, start: int, end: int, unwanted: Callable[[bytes], bool]
    ) -> tuple[int, int, int]:
        """Remove the unwanted lines from a part of a file; the part before it goes too. Returns
        the lines removed, the lines kept, and the bytes kept. Without unwanted lines the file
        stays as it is."""
        gone = kept = size = 0
        for line in _lines(path, start, end):
            if unwanted(line.rstrip(b"\n")):
                gone += 1
            else:
                kept += 1
                size += len(line)
        if gone:
            with replacing(path) as target:
                target.writelines(
                    line for line in _lines(path, start, end) if not unwanted(line.rstrip(b"\n"))
                )
        return gone, kept, size

    def pages(self, lines: int) -> Iterator[list[bytes]]:
        """All lines that are not consumed yet, oldest first, in pages of up to ``lines``. Skips
        files that are consumed in the meantime."""
        with self._lock:
            files = [(file.path, file.read, file.size) for file in self._files]
        for path, start, end in files:
            with suppress(FileNotFoundError), path.open("rb") as source:
                source.seek(start)
                while source.tell() < end:
                    page = [line.rstrip(b"\n") for line in islice(source, lines)]
                    if not page:
                        break
                    yield page

    def statistics(self) -> FallbackStatistics:
        """The present contents and counters."""
        with self._lock:
            return FallbackStatistics(
                files=len(self._files),
                lines=sum(file.lines for file in self._files),
                bytes=sum(file.size for file in self._files),
                max_bytes=self._max_bytes,
                appended=self._appended,
                consumed=self._consumed,
                damaged=self._damaged,
            )

    def names(self) -> list[tuple[str, int]]:
        """The names of the files, oldest first, each with its bytes that are not consumed."""
        with self._lock:
            return [(file.path.name, file.size - file.read) for file in self._files]

    def close(self) -> None:
        """Close the file that is open for appending. Idempotent."""
        with self._lock:
            if self._files and not self._files[-1].sealed:
                self._seal(self._files[-1])

    def _remove(self, file: _LineFile) -> None:
        with suppress(FileNotFoundError):
            file.path.unlink()
        self._files.remove(file)


def _lines(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The lines that begin from ``start`` to before ``end``, with their ends."""
    with path.open("rb") as source:
        source.seek(start)
        while source.tell() < end and (line := source.readline()):
            yield line
