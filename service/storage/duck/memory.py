"""DuckDB's memory: rows that are not checkpointed yet, and pages of files that stay in its pool.

DuckDB keeps rows in memory while they are only in a file's write-ahead log, and checkpoints a file
when that file's log is long. Many tenants with a few rows each would therefore exhaust the memory
(1 GiB at about 1200 tenants). :class:`UnsavedRows` estimates this memory from the sizes of the logs
and says which files to checkpoint.

A checkpoint's pages stay in the buffer pool until the memory limit is reached, which takes long
under a steady load; until then memory grows. :func:`drop_pages` drops them: the system has the same
pages in its file cache, and reading them again from there takes little more time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import duckdb

from betrace.service.storage.duck.schema import Cursor

_PAGES = "BASE_TABLE"
_UNSAVED_FILE_BYTES = 850_000  # memory of a file with a few rows that are not checkpointed yet
_UNSAVED_FACTOR = 2  # memory of such rows, in sizes of their log
# A log with more than _SAVED_BYTES is checkpointed after this time, so that memory stays flat and
# little is read after a crash. The times differ, so that many files are not checkpointed at once.
_SAVED_SECONDS = (45.0, 75.0)
_SAVED_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class LogSize:
    """The size of one file's write-ahead log. ``short_at`` is when the log was last short."""

    short_at: float
    bytes: int = 0
    patience: float = field(default_factory=lambda: random.uniform(*_SAVED_SECONDS))

    @property
    def memory(self) -> int:
        """Estimated memory of the rows in the log, in bytes."""
        return _UNSAVED_FILE_BYTES + _UNSAVED_FACTOR * self.bytes if self.bytes else 0


class UnsavedRows:
    """The memory of all rows that are only in write-ahead logs, and its limit. Thread-safe."""

    def __init__(self, max_bytes: int, clock: Callable[[], float]) -> None:
        self._max = max_bytes
        self._clock = clock
        self._memory = 0
        self._lock = threading.Lock()

    @property
    def excess(self) -> int:
        """Bytes above the limit; negative below it."""
        return self._memory - self._max

    def note(self, log: LogSize, size: int) -> bool:
        """Note the present size of a log; returns whether it shrank."""
        with self._lock:
            before = log.bytes
            self._memory -= log.memory
            if size < max(before, _SAVED_BYTES):
                log.short_at = self._clock()
            log.bytes = size
            self._memory += log.memory
            return size < before

    def overdue(self, log: LogSize) -> bool:
        """Whether a log has been long for about a minute. Starts the time again, so that a
        checkpoint that fails is not tried with every write."""
        if self._clock() - log.short_at <= log.patience:
            return False
        log.short_at = self._clock()
        return True


def used(cursor: Cursor) -> dict[str, int]:
    """Bytes in the buffer pool by purpose, under DuckDB's names."""
    return dict(cursor.execute("SELECT tag, memory_usage_bytes FROM duckdb_memory()").fetchall())


def drop_pages(cursor: Cursor, keep_bytes: int, limit: int) -> None:
    """Drop the least recently used pages of files, except for ``keep_bytes`` of them.

    ``limit`` is the instance's memory limit. It is lowered for a moment, and DuckDB drops pages of
    files before anything that it would have to write to a temporary file. A query that needs memory
    at that moment can have the ``keep_bytes`` dropped as well.
    """
    before = used(cursor)
    excess = before.get(_PAGES, 0) - keep_bytes
    if excess <= 0:
        return
    try:
        with suppress(duckdb.OutOfMemoryException):  # some pages are in use
            cursor.execute(f"SET memory_limit = '{sum(before.values()) - excess}B'")
    finally:
        cursor.execute(f"SET memory_limit = '{limit}B'")
