"""Traces that a rule could not judge, with the reason, in an SQLite file.

A record can be written again: it replaces the earlier one of the same trace and rule. The newest
records of each tenant are kept. Methods block and may be called from any thread; they raise
:exc:`UndecidedStoreError` if the disk fails.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from betrace.service.storage.sqlite_file import Schema, open_file, remedy, transaction

KEPT = 10_000  # records of a tenant
_WITHOUT = "the list of undecided traces"

_SCHEMA = Schema(
    0x42545544,  # "BTUD"
    (
        """
CREATE TABLE undecided (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    trace TEXT NOT NULL,
    rule TEXT NOT NULL,
    version TEXT NOT NULL,
    reason TEXT NOT NULL,
    at_ns INTEGER NOT NULL,
    UNIQUE (tenant, trace, rule, version)
) STRICT;
CREATE INDEX undecided_of_tenant ON undecided (tenant, number);
""",
    ),
)


class UndecidedStoreError(OSError):
    """The file cannot be read or written; the message says what to do."""


@dataclass(frozen=True, slots=True)
class UndecidedTrace:
    """Nobody can tell whether a trace breaks a rule. ``at_ns`` is when that was found (nanoseconds
    since 1970)."""

    trace_id: str
    rule_id: str
    rule_version: str
    reason: str
    at_ns: int


class UndecidedStore:
    """The file ``path``, which is created if missing; ``kept`` records of each tenant are kept."""

    def __init__(self, path: Path, kept: int = KEPT) -> None:
        self._path = path
        self._kept = kept
        self._lock = threading.Lock()
        with self._errors():
            self._db = open_file(path, _SCHEMA, ("synchronous = NORMAL",))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def add(self, tenant: str, records: Sequence[UndecidedTrace]) -> None:
        """Store records of a tenant, and delete its oldest beyond the limit."""
        rows = [
            (tenant, each.trace_id, each.rule_id, each.rule_version, each.reason, each.at_ns)
            for each in records[-self._kept :]
        ]
        with self._lock, self._errors(), transaction(self._db) as db:
            db.executemany(
                "INSERT OR REPLACE INTO undecided "
                "(tenant, trace, rule, version, reason, at_ns) VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )
            db.execute(
                "DELETE FROM undecided WHERE tenant = ? AND number <= coalesce((SELECT number "
                "FROM undecided WHERE tenant = ? ORDER BY number DESC LIMIT 1 OFFSET ?), 0)",
                (tenant, tenant, self._kept),
            )

    def page(
        self,
        tenant: str,
        *,
        rule: str | None = None,
        trace_id: str | None = None,
        limit: int = 100,
        before: int | None = None,
    ) -> tuple[list[UndecidedTrace], int | None]:
        """The newest records before number ``before``, newest first, and the number to continue
        with, None after the last."""
        wanted, values = ["tenant = ?"], [tenant]
        for column, value in (("rule = ?", rule), ("trace = ?", trace_id), ("number < ?", before)):
            if value is not None:
                wanted.append(column)
                values.append(value)  # type: ignore[arg-type]
        query = (
            "SELECT number, trace, rule, version, reason, at_ns FROM undecided "
            f"WHERE {' AND '.join(wanted)} ORDER BY number DESC LIMIT ?"
        )
        with self._lock, self._errors():
            rows = self._db.execute(query, (*values, limit + 1)).fetchall()
        found = [UndecidedTrace(*row[1:]) for row in rows[:limit]]
        return found, rows[limit - 1][0] if len(rows) > limit else None

    def delete_tenant(self, tenant: str) -> None:
        """Delete what is kept of a tenant."""
        with self._lock, self._errors():
            self._db.execute("DELETE FROM undecided WHERE tenant = ?", (tenant,))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            what = remedy(error, _WITHOUT)
            raise UndecidedStoreError(f"{self._path}: {error}; {what}") from error
