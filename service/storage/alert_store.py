"""The alerts of broken rules, and how far the queues of signals were read for them.

One process has them in an SQLite file, in which both change in one transaction, so after a crash
the queues are read on from where the alerts are. A cluster has them in a bucket
(:mod:`betrace.service.cluster.query.shared_alerts`).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from betrace.service.signals import Signal
from betrace.service.storage.sqlite_file import Schema, open_file, remedy, transaction

_SCHEMA = Schema(
    0x4254414C,  # "BTAL"
    (
        """
CREATE TABLE alerts (
    tenant TEXT NOT NULL,
    rule TEXT NOT NULL,
    alert BLOB NOT NULL,
    PRIMARY KEY (tenant, rule)
) STRICT, WITHOUT ROWID;
CREATE TABLE progress (tenant TEXT PRIMARY KEY, entry INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE begun (only INTEGER PRIMARY KEY CHECK (only = 1)) STRICT;
""",
    ),
)

AlertKey = tuple[str, str]
"""Tenant and rule."""


class AlertStoreError(Exception):
    """The file cannot be read or written; the message says what to do."""


class SavedAlerts(Protocol):
    """Where alerts are saved. Methods block, may be called from any thread, and raise
    :exc:`AlertStoreError`."""

    @property
    def pending(self) -> bool:
        """Whether :meth:`save` should be called even if nothing changed."""

    def alerts(self) -> dict[AlertKey, bytes]:
        """All alerts, as they were saved."""

    def progress(self) -> dict[str, int] | None:
        """How far the queues were read, by name; None if nothing was ever saved."""

    def save(
        self, alerts: Mapping[AlertKey, bytes | None], progress: Mapping[str, int] | None = None
    ) -> None:
        """Save alerts (None to remove one) and progress. A restart neither loses nor repeats a
        signal."""

    def unknown(self, queue: str, signals: list[tuple[int, Signal]]) -> list[Signal]:
        """Those of a queue's signals that the alerts do not contain yet."""

    def shown(self, tenant: str) -> dict[AlertKey, bytes] | None:
        """The alerts to show; None if this process follows them itself. Does not block."""


class AlertStore:
    """The file ``path``, which is created if missing.

    Commits do not wait for the disk. After a machine crash, the file is as it was a moment earlier,
    and a webhook may get a notification again.
    """

    pending = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._errors():
            self._db = open_file(path, _SCHEMA, ("secure_delete = ON", "synchronous = NORMAL"))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def alerts(self) -> dict[AlertKey, bytes]:
        """All alerts, as they were saved."""
        with self._lock, self._errors():
            rows = self._db.execute("SELECT tenant, rule, alert FROM alerts").fetchall()
        return {(tenant, rule): alert for tenant, rule, alert in rows}

    def progress(self) -> dict[str, int] | None:
        """The number of the last signal read, by queue; None if nothing was ever saved."""
        with self._lock, self._errors():
            if self._db.execute("SELECT 1 FROM begun").fetchone() is None:
                return None
            return dict(self._db.execute("SELECT tenant, entry FROM progress").fetchall())

    def save(
        self, alerts: Mapping[AlertKey, bytes | None], progress: Mapping[str, int] | None = None
    ) -> None:
        """Save alerts (None to remove one) and progress, all or nothing."""
        rows = [(*key, alert) for key, alert in alerts.items() if alert is not None]
        gone = [key for key, alert in alerts.items() if alert is None]
        with self._lock, self._errors(), transaction(self._db) as db:
            db.executemany("INSERT OR REPLACE INTO alerts VALUES (?, ?, ?)", rows)
            db.executemany("DELETE FROM alerts WHERE tenant = ? AND rule = ?", gone)
            if progress is not None:
                db.execute("INSERT OR IGNORE INTO begun VALUES (1)")
                db.executemany("INSERT OR REPLACE INTO progress VALUES (?, ?)", progress.items())

    def unknown(self, queue: str, signals: list[tuple[int, Signal]]) -> list[Signal]:
        """All of them, because alerts and progress are saved together."""
        return [signal for _, signal in signals]

    def shown(self, tenant: str) -> None:
        """None: this process has the alerts in memory."""

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise AlertStoreError(
                f"{self._path}: {error}; {remedy(error, 'its alerts')}"
            ) from error
