"""What to do about errors of SQLite."""

from __future__ import annotations

import sqlite3

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def remedy(error: Exception, without: str) -> str:
    """What to do about an error of a database file: if the file is damaged, to restore it or move
    it away, after which the service starts ``without`` something."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
        return (
            "the file is damaged; restore it from a backup, or move it and its -wal and -shm files "
            f"away to start without {without}"
        )
    return "check the disk's space and health"
