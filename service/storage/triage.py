"""What people decided about rules and signals: mutes and acknowledgements, in an SQLite file.

The ledger does not change: signals of a muted rule are recorded like others. Methods block, except
:meth:`TriageStore.muted`; all may be called from any thread and raise :exc:`TriageError` if the
disk fails.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from betrace.service.storage.sqlite_file import Schema, open_file, remedy, transaction

KEPT_NS = 90 * 86_400 * 10**9  # ended mutes are kept this long, to show old signals as muted

_VERSION_1 = """
CREATE TABLE mutes (
    tenant TEXT NOT NULL,
    rule TEXT NOT NULL,
    since_ns INTEGER NOT NULL,
    until_ns INTEGER NOT NULL,
    reason TEXT NOT NULL,
    who TEXT NOT NULL,
    PRIMARY KEY (tenant, rule, since_ns)
) STRICT;
CREATE TABLE acknowledgements (
    tenant TEXT NOT NULL,
    signal TEXT NOT NULL,
    at_ns INTEGER NOT NULL,
    who TEXT NOT NULL,
    note TEXT NOT NULL,
    PRIMARY KEY (tenant, signal)
) STRICT, WITHOUT ROWID;
"""
_SCHEMA = Schema(0x42545452, [_VERSION_1])  # "BTTR"


class TriageError(Exception):
    """The file cannot be read or written; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Mute:
    """A rule whose signals, if detected from ``since_ns`` until before ``until_ns`` (nanoseconds
    since 1970), page nobody."""

    since_ns: int
    until_ns: int
    reason: str
    by: str


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """Someone takes care of a signal."""

    at_ns: int
    by: str
    note: str


class TriageStore:
    """The file ``path``, which is created if missing."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        with self._errors():
            self._db = open_file(path, _SCHEMA)
            try:
                long_ago = self._clock_ns() - KEPT_NS
                self._db.execute("DELETE FROM mutes WHERE until_ns < ?", (long_ago,))
                self._mutes = self._read_mutes()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # Mutes

    def muted(self, tenant: str, rule_id: str, at_ns: int) -> bool:
        """Whether a rule was muted at a time."""
        mutes = self._mutes.get((tenant, rule_id), ())
        return any(mute.since_ns <= at_ns < mute.until_ns for mute in mutes)

    def current_mute(self, tenant: str, rule_id: str) -> Mute | None:
        """The mute of a rule that is muted now."""
        now = self._clock_ns()
        for mute in self._mutes.get((tenant, rule_id), ()):
            if mute.since_ns <= now < mute.until_ns:
                return mute
        return None

    def mute(self, tenant: str, rule_id: str, duration_ns: int, reason: str, by: str) -> Mute:
        """Mute a rule from now on. Replaces its current mute."""
        with self._change() as now:
            self._end(tenant, rule_id, now)
            mute = Mute(now, now + duration_ns, reason, by)
            self._db.execute(
                "INSERT OR REPLACE INTO mutes VALUES (?, ?, ?, ?, ?, ?)",
                (tenant, rule_id, mute.since_ns, mute.until_ns, reason, by),
            )
        return mute

    def unmute(self, tenant: str, rule_id: str) -> bool:
        """End a mute; returns whether there was one."""
        with self._change() as now:
            return self._end(tenant, rule_id, now)

    def _end(self, tenant: str, rule_id: str, now: int) -> bool:
        ended = self._db.execute(
            "UPDATE mutes SET until_ns = ? WHERE tenant = ? AND rule = ? AND until_ns > ?",
            (now, tenant, rule_id, now),
        )
        return ended.rowcount > 0

    def _read_mutes(self) -> dict[tuple[str, str], list[Mute]]:
        found: dict[tuple[str, str], list[Mute]] = {}
        for tenant, rule_id, *mute in self._db.execute(
            "SELECT tenant, rule, since_ns, until_ns, reason, who FROM mutes ORDER BY since_ns"
        ):
            found.setdefault((tenant, rule_id), []).append(Mute(*mute))
        return found

    # Acknowledgements

    def acknowledge(self, tenant: str, signal_id: str, note: str, by: str) -> Acknowledgement:
        """Acknowledge a signal. Replaces an earlier acknowledgement."""
        with self._change() as now:
            self._db.execute(
                "INSERT OR REPLACE INTO acknowledgements VALUES (?, ?, ?, ?, ?)",
                (tenant, signal_id, now, by, note),
            )
        return Acknowledgement(now, by, note)

    def acknowledgements(
        self, tenant: str, signal_ids: Sequence[str]
    ) -> dict[str, Acknowledgement]:
        """The acknowledgements of these signals, by signal id."""
        marks = ", ".join("?" * len(signal_ids))
        with self._lock, self._errors():
            rows = self._db.execute(
                "SELECT signal, at_ns, who, note FROM acknowledgements "
                f"WHERE tenant = ? AND signal IN ({marks})",
                (tenant, *signal_ids),
            ).fetchall()
        return {signal_id: Acknowledgement(*row) for signal_id, *row in rows}

    def merge(
        self,
        tenant: str,
        mutes: Iterable[tuple[str, Mute]],
        acknowledgements: Iterable[tuple[str, Acknowledgement]],
    ) -> None:
        """Take over what was decided elsewhere: mutes by rule, and acknowledgements by signal. A
        mute that began at the same time is replaced."""
        with self._change():
            self._db.executemany(
                "INSERT OR REPLACE INTO mutes VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (tenant, rule, mute.since_ns, mute.until_ns, mute.reason, mute.by)
                    for rule, mute in mutes
                ],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO acknowledgements VALUES (?, ?, ?, ?, ?)",
                [
                    (tenant, signal, each.at_ns, each.by, each.note)
                    for signal, each in acknowledgements
                ],
            )

    def delete_tenant(self, tenant: str) -> None:
        """Delete what was said about a tenant's rules and signals."""
        with self._change():
            for table in ("mutes", "acknowledgements"):
                self._db.execute(f"DELETE FROM {table} WHERE tenant = ?", (tenant,))

    @contextmanager
    def _change(self) -> Iterator[int]:
        """A transaction; yields the current time."""
        with self._lock, self._errors():
            with transaction(self._db):
                yield self._clock_ns()
            self._mutes = self._read_mutes()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            without = "mutes and acknowledgements"
            raise TriageError(f"{self._path}: {error}; {remedy(error, without)}") from error
