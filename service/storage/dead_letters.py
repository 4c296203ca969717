"""Dead letters: items that a stage could not process, kept in an SQLite file.

A letter is durable when :meth:`DeadLetterStore.add` returns. An existing letter (the same stage,
tenant, kind and payload) is not stored twice; its new failure is noted. Above ``max_bytes`` of
payloads the oldest letters are first written to a file
(:mod:`betrace.service.storage.letter_exports`) and then deleted. All methods block and may be
called from any thread; they raise :exc:`DeadLetterError`.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from betrace.channels import TransientError
from betrace.service.storage.letter_exports import LetterExports
from betrace.service.storage.sqlite_file import Schema, open_file, remedy, transaction

MAX_LIMIT = 1000
_KEEP_AFTER_EXPORT = 0.9  # of max_bytes
_IDS_PER_QUERY = 500
_MAX_ERROR_CHARACTERS = 2000

_VERSION_1 = """
CREATE TABLE letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    stage TEXT NOT NULL,
    kind TEXT NOT NULL,
    payload BLOB NOT NULL,
    bytes INTEGER NOT NULL,
    weight INTEGER NOT NULL,
    error TEXT NOT NULL,
    transient INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    first_failed_ns INTEGER NOT NULL,
    last_failed_ns INTEGER NOT NULL,
    next_retry_ns INTEGER
) STRICT;
CREATE INDEX letters_due ON letters (stage, next_retry_ns) WHERE next_retry_ns IS NOT NULL;
"""
_SCHEMA = Schema(0x4254444C, [_VERSION_1])  # "BTDL"
_PRAGMAS = ("auto_vacuum = INCREMENTAL", "synchronous = FULL")
_COLUMNS = (
    "id, tenant, stage, kind, bytes, weight, error, transient, attempts, "
    "first_failed_ns, last_failed_ns, next_retry_ns"
)

_NOTE = (
    "UPDATE letters SET error = ?, transient = ?, attempts = attempts + ?, last_failed_ns = ?, "
    "next_retry_ns = ? WHERE id = ?"
)


class DeadLetterError(TransientError):
    """The file cannot be read or written; the message says what to do."""


@dataclass(frozen=True, slots=True)
class NewLetter:
    """A letter to store. ``weight`` is the item's weight in its channel: spans, traces or rows.
    ``next_retry_ns`` is when it is retried automatically, None for never."""

    tenant: str
    stage: str
    kind: str
    payload: bytes
    weight: int
    error: str
    transient: bool
    attempts: int
    next_retry_ns: int | None


@dataclass(frozen=True, slots=True)
class Letter:
    """A letter without its payload. Times are nanoseconds since 1970."""

    id: int
    tenant: str
    stage: str
    kind: str
    bytes: int
    weight: int
    error: str
    transient: bool
    attempts: int
    first_failed_ns: int
    last_failed_ns: int
    next_retry_ns: int | None


@dataclass(frozen=True, slots=True)
class Count:
    """The letters of a stage, and their total weight."""

    letters: int
    weight: int


class DeadLetterStore:
    """The letters in the file ``path``, which is created if missing.

    Args:
      path: the SQLite file.
      export: a directory for the letters that no longer fit.
      max_bytes: of all payloads; a single larger payload is still stored, alone.
      clock_ns: the wall clock.
    """

    def __init__(
        self,
        path: Path,
        export: Path,
        max_bytes: int,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._path = path
        self._exports = LetterExports(export, clock_ns)
        self._max_bytes = max_bytes
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self.exported = 0
        """Letters exported to files since the start."""
        self._exported: list[Letter] = []
        with self._errors():
            self._db = open_file(path, _SCHEMA, _PRAGMAS)
            try:
                row = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM letters").fetchone()
                self._bytes: int = row[0]
            except BaseException:
                self._db.close()
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DeadLetterError(
                f"the dead letters in {self._path}: {error}: {remedy(error, 'these letters')}"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            before = self._bytes
            try:
                with transaction(self._db):
                    yield self._db
            except BaseException:
                self._bytes = before
                raise

    @property
    def payload_bytes(self) -> int:
        """Bytes of all payloads in the file."""
        return self._bytes

    def add(self, letters: Sequence[NewLetter]) -> list[bool]:
        """Store letters, all or none; returns for each whether it is new. Exports old letters first
        if there is no room."""
        size = sum(len(letter.payload) for letter in letters)
        if self._bytes + size > self._max_bytes:
            self._make_room(self._bytes + size - int(self._max_bytes * _KEEP_AFTER_EXPORT))
        now = self._clock_ns()
        added = []
        with self._transaction() as db:
            for letter in letters:
                key = _key(letter)
                row = db.execute("SELECT id FROM letters WHERE key = ?", (key,)).fetchone()
                added.append(row is None)
                if row is not None:
                    self._note(db, row[0], letter, now)
                    continue
                db.execute(
                    "INSERT INTO letters (key, tenant, stage, kind, payload, bytes, weight, error, "
                    "transient, attempts, first_failed_ns, last_failed_ns, next_retry_ns) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        key,
                        letter.tenant,
                        letter.stage,
                        letter.kind,
                        letter.payload,
                        len(letter.payload),
                        letter.weight,
                        letter.error[:_MAX_ERROR_CHARACTERS],
                        letter.transient,
                        letter.attempts,
                        now,
                        now,
                        letter.next_retry_ns,
                    ),
                )
                self._bytes += len(letter.payload)
        return added

    def _note(self, db: sqlite3.Connection, letter_id: int, again: NewLetter, now: int) -> None:
        db.execute(
            _NOTE,
            (
                again.error[:_MAX_ERROR_CHARACTERS],
                again.transient,
                again.attempts,
                now,
                again.next_retry_ns,
                letter_id,
            ),
        )

    def failed_again(
        self,
        letter_id: int,
        error: str,
        *,
        transient: bool,
        attempts: int,
        next_retry_ns: int | None,
    ) -> bool:
        """Note that a retry of a letter failed after ``attempts`` more deliveries; returns whether
        the letter exists."""
        text = error[:_MAX_ERROR_CHARACTERS]
        with self._transaction() as db:
            values = (text, transient, attempts, self._clock_ns(), next_retry_ns, letter_id)
            return db.execute(_NOTE, values).rowcount > 0

    def delete(self, letter_ids: Iterable[int]) -> dict[str, tuple[int, int]]:
        """Delete letters; returns by stage how many there were, and their weight."""
        found: dict[str, tuple[int, int]] = {}
        ids = list(letter_ids)
        with self._transaction() as db:
            for some in _chunks(ids):
                rows = db.execute(
                    f"DELETE FROM letters WHERE id IN ({_marks(some)}) "
                    "RETURNING stage, weight, bytes",
                    some,
                ).fetchall()
                for stage, weight, size in rows:
                    letters, total = found.get(stage, (0, 0))
                    found[stage] = (letters + 1, total + weight)
                    self._bytes -= size
        if found:
            self._vacuum()
        return found

    def page(
        self,
        *,
        stage: str | None = None,
        tenant: str | None = None,
        limit: int = 100,
        after: int = 0,
    ) -> list[Letter]:
        """Letters with an id above ``after``, oldest first: at most ``MAX_LIMIT``, plus one that
        shows whether there are more."""
        where, values = _where(stage, tenant)
        with self._lock, self._errors():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM letters WHERE id > ?{where} ORDER BY id LIMIT ?",
                (after, *values, min(limit, MAX_LIMIT + 1)),
            ).fetchall()
        return [_letter(row) for row in rows]

    def get(self, letter_id: int) -> tuple[Letter, bytes] | None:
        """A letter and its payload, None if there is no such letter."""
        with self._lock, self._errors():
            row = self._db.execute(
                f"SELECT {_COLUMNS}, payload FROM letters WHERE id = ?", (letter_id,)
            ).fetchone()
        return None if row is None else (_letter(row[:-1]), row[-1])

    def due(self, stage: str, now_ns: int, limit: int, leave_out: Iterable[int] = ()) -> list[int]:
        """The ids of a stage's letters that are due for a retry, the earliest first."""
        skip = orjson.dumps(list(leave_out)).decode()
        with self._lock, self._errors():
            rows = self._db.execute(
                "SELECT id FROM letters WHERE stage = ? AND next_retry_ns <= ? "
                "AND id NOT IN (SELECT value FROM json_each(?)) "
                "ORDER BY next_retry_ns, id LIMIT ?",
                (stage, now_ns, skip, limit),
            ).fetchall()
        return [row[0] for row in rows]

    def retry(
        self,
        letter_ids: Iterable[int] | None = None,
        *,
        stage: str | None = None,
        tenant: str | None = None,
    ) -> int:
        """Make letters due for a retry now: those with the ids, or all that match the filters.
        Returns how many."""
        now = self._clock_ns()
        where, values = _where(stage, tenant)
        with self._transaction() as db:
            if letter_ids is None:
                return db.execute(
                    f"UPDATE letters SET next_retry_ns = ? WHERE TRUE{where}", (now, *values)
                ).rowcount
            return sum(
                db.execute(
                    f"UPDATE letters SET next_retry_ns = ? WHERE id IN ({_marks(some)})",
                    (now, *some),
                ).rowcount
                for some in _chunks(list(letter_ids))
            )

    def counts(self) -> dict[str, Count]:
        """The letters of each stage."""
        with self._lock, self._errors():
            rows = self._db.execute(
                "SELECT stage, count(*), sum(weight) FROM letters GROUP BY stage"
            ).fetchall()
        return {stage: Count(letters, weight) for stage, letters, weight in rows}

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            self._db.close()

    def _make_room(self, wanted: int) -> None:
        """Export the oldest letters, ``wanted`` bytes of them."""
        moved: list[tuple[Any, ...]] = []
        with self._lock, self._errors():
            size = 0
            for row in self._db.execute(f"SELECT {_COLUMNS}, payload FROM letters ORDER BY id"):
                if size >= wanted:
                    break
                moved.append(row)
                size += len(row[-1])
            if not moved:
                return
            names = _COLUMNS.split(", ")
            letters = ((dict(zip(names, row, strict=False)), row[-1]) for row in moved)
            self._exports.write(letters, first_id=moved[0][0])
        self.delete(row[0] for row in moved)
        self.exported += len(moved)
        with self._lock:
            self._exported += [_letter(row[:-1]) for row in moved]

    def drop_exported(self, tenant: str) -> int:
        """Remove the letters of a tenant from the exported files; returns how many."""
        with self._errors():
            return self._exports.drop(tenant)

    def take_exported(self) -> list[Letter]:
        """The letters exported to files since the last call."""
        with self._lock:
            taken, self._exported = self._exported, []
        return taken

    def _vacuum(self) -> None:
        """Return free pages to the disk."""
        with self._lock, self._errors():
            self._db.execute("PRAGMA incremental_vacuum").fetchall()


def _key(letter: NewLetter) -> bytes:
    head = "".join(f"{len(part)}:{part}" for part in (letter.stage, letter.tenant, letter.kind))
    return hashlib.sha256(head.encode() + letter.payload).digest()


def _letter(row: tuple[Any, ...]) -> Letter:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return Letter(**values | {"transient": bool(values["transient"])})


def _where(stage: str | None, tenant: str | None) -> tuple[str, list[str]]:
    given = {"stage": stage, "tenant": tenant}
    used = {name: value for name, value in given.items() if value is not None}
    return "".join(f" AND {name} = ?" for name in used), list(used.values())


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(ids), _IDS_PER_QUERY):
        yield ids[first : first + _IDS_PER_QUERY]


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
