"""Opening SQLite files of this program, and what to do about their errors.

A file carries its schema's version (``user_version``) and an application id, by which file(1) knows
it. It is in WAL mode: readers do not wait for a writer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BUSY_SECONDS: Final = 2.0
"""How long a call waits for another connection's lock."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class NewerFileError(sqlite3.DatabaseError):
    """The file was written by a newer program."""


@dataclass(frozen=True, slots=True)
class Schema:
    """The schema of a file: ``steps[n]`` is the SQL that leads from version ``n`` to the next."""

    application_id: int
    steps: Sequence[str]

    @property
    def version(self) -> int:
        """The newest version."""
        return len(self.steps)

    def migrate(self, db: sqlite3.Connection, pragmas: Sequence[str] = ()) -> None:
        """Bring a file to the newest version, in one transaction. ``pragmas`` are set before the
        first table is made. Raises :exc:`NewerFileError`."""
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > self.version:
            raise NewerFileError(
                f"the file was written by a newer program (schema {version}, this one knows "
                f"{self.version})"
            )
        for pragma in (*pragmas, "journal_mode = WAL"):
            db.execute(f"PRAGMA {pragma}")
        if version < self.version:
            db.executescript(
                f"BEGIN IMMEDIATE;{''.join(self.steps[version:])}"
                f"PRAGMA application_id = {self.application_id};"
                f"PRAGMA user_version = {self.version};COMMIT;"
            )


def connect(path: Path) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time, without implicit transactions."""
    return sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )


def open_file(
    path: Path, schema: Schema, pragmas: Sequence[str] = ("synchronous = FULL",)
) -> sqlite3.Connection:
    """Open a file with its newest schema; it is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    db = connect(path)
    try:
        schema.migrate(db, pragmas)
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A write transaction, committed unless the block raises."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def remedy(error: Exception, without: str) -> str:
    """What to do about an error of a database file: if the file is damaged, to restore it or move
    it away, after which the service starts ``without`` something."""
    if isinstance(error, NewerFileError):
        return "upgrade, or choose another data directory"
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
        return (
            "the file is damaged; restore it from a backup, or move it and its -wal and -shm files "
            f"away to start without {without}"
        )
    return "check the disk's space and health"
