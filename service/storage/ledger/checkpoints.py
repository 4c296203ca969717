"""Moves the write-ahead log of a SQLite file into the file, in a thread of its own.

SQLite does this in the commit that finds the log long, which then takes several times as long as
the others.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

from betrace.service.storage.sqlite_file import connect

_log = logging.getLogger("service.ledger")

PAGES = 4000
"""Pages written to the log, as estimated, after which they are moved."""
MOST_PAGES = 16_000
"""Pages of 4 KiB in the log after which a commit moves them itself: without a pause between
commits, the log would otherwise grow without end."""
_PAGES_OF_A_COMMIT = 4


class Checkpoints:
    """Checkpoints of the file ``path``. The thread starts when the log is long for the first time.
    ``committed`` is called by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pages = 0
        self._wanted = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def committed(self, rows: int) -> None:
        """Note that a transaction with so many rows was committed. Does not wait."""
        self._pages += _PAGES_OF_A_COMMIT + rows
        if self._pages < PAGES:
            return
        self._pages = 0
        self._wanted.set()
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="ledger-log", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread, after what it does now."""
        self._closed = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with closing(connect(self._path)) as db:
                while self._wanted.wait() and not self._closed:
                    self._wanted.clear()
                    with suppress(sqlite3.OperationalError):  # busy; a later commit asks again
                        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:  # commits move the log themselves when it is very long
            _log.warning("%s: the write-ahead log is not moved: %s", self._path, error)
