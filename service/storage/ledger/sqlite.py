"""The embedded ledger: one SQLite file, append-only."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Literal

from betrace.service.signals import Signal
from betrace.service.storage.ledger import sqlite_rows
from betrace.service.storage.ledger.base import (
    AMOUNT,
    PAGE,
    ClientCounts,
    LedgerError,
    rule_account,
    tenant_account,
)
from betrace.service.storage.ledger.checkpoints import MOST_PAGES, Checkpoints
from betrace.service.storage.ledger.clients import Clients
from betrace.service.storage.sqlite_file import (
    NewerFileError,
    connect,
    open_file,
    remedy,
    transaction,
)

_CLOSE_SECONDS = 5.0

_TRANSIENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
}


@dataclass(eq=False, slots=True)
class _Connections:
    writer: sqlite3.Connection
    reader: sqlite3.Connection
    checkpoints: Checkpoints
    writing: threading.Lock = field(default_factory=threading.Lock)
    reading: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        self.checkpoints.close()
        self.reader.close()
        self.writer.close()


class SqliteLedger:
    """A :class:`betrace.service.storage.ledger.base.Ledger` in the file ``path``, made if missing.

    It also keeps the whole signals, so that the query store can be rebuilt from it. Writers take
    turns; readers have their own connection and never wait.

    ``synchronous`` is FULL because recorded signals are never looked for again: the next checkpoint
    skips their spans. With NORMAL, a machine crash may undo a commit; a process crash does not.

    The file is also the journal of another ledger (:meth:`add_outgoing`, :meth:`settle`): a signal
    is outgoing until that ledger is known to have it, and from then on a transfer here.
    """

    kind = "sqlite"
    problem: str | None = None

    def __init__(self, path: Path, synchronous: Literal["full", "normal"] = "full") -> None:
        self._path = path
        self._synchronous = synchronous.upper()
        with self._errors():
            open_file(path, sqlite_rows.SCHEMA).close()
        self._clients = Clients(self._open, _Connections.close)
        with self._clients.use():
            pass

    @property
    def clients(self) -> ClientCounts:
        """Connections that were given up because a call hung."""
        return self._clients.counts

    def _open(self) -> _Connections:
        with self._errors():
            writer = connect(self._path)
            try:
                writer.execute(f"PRAGMA synchronous = {self._synchronous}")
                writer.execute(f"PRAGMA wal_autocheckpoint = {MOST_PAGES}")
                writer.execute("PRAGMA secure_delete = OFF")  # what it deletes it also keeps
                reader = connect(self._path)
                reader.execute("PRAGMA query_only = ON")
            except BaseException:
                writer.close()
                raise
        return _Connections(writer, reader, Checkpoints(self._path))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise SQLite's errors as :exc:`LedgerError`."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            transient = code in _TRANSIENT
            if isinstance(error, NewerFileError):
                advice = remedy(error, "")
            elif transient:
                advice = (
                    "check the disk's space and health, and that no other program locks the file"
                )
            else:
                advice = (
                    "restore the file from a backup, or move it away and run "
                    "`betrace ledger rebuild`"
                )
            raise LedgerError(f"{self._path}: {error}: {advice}", transient=transient) from error

    @contextmanager
    def _writing(self, synchronous: str | None = None) -> Iterator[sqlite3.Connection]:
        """A transaction, committed unless the block raises."""
        with self._clients.use() as connections, connections.writing, self._errors():
            db = connections.writer
            before = db.total_changes
            if synchronous is not None:
                db.execute(f"PRAGMA synchronous = {synchronous}")
            try:
                with transaction(db):
                    yield db
            finally:
                if synchronous is not None:
                    db.execute(f"PRAGMA synchronous = {self._synchronous}")
            connections.checkpoints.committed(db.total_changes - before)
            self._clients.succeeded()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._clients.use() as connections, connections.reading, self._errors():
            yield connections.reader

    def record(self, signals: Sequence[Signal]) -> list[bool]:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.record`. One transaction: all or
        nothing."""
        ids = sqlite_rows.transfer_ids(signals)
        texts = [sqlite_rows.write_signal(signal) for signal in signals]
        if not ids:
            return []
        with self._writing() as db:
            new = sqlite_rows.first_of_each(ids, sqlite_rows.existing_rows(db, "transfers", ids))
            sqlite_rows.insert(db, compress(zip(ids, signals, texts, strict=True), new))
        return new

    def add_outgoing(self, signals: Sequence[Signal]) -> list[bool]:
        """Store signals for another ledger to record. Returns for each whether that ledger must be
        sent it: False if it was settled before, or is a repetition within ``signals``."""
        ids = sqlite_rows.transfer_ids(signals)
        texts = [sqlite_rows.write_signal(signal) for signal in signals]
        if not ids:
            return []
        with self._writing() as db:
            new = sqlite_rows.first_of_each(ids, sqlite_rows.existing_rows(db, "transfers", ids))
            db.executemany(
                "INSERT INTO outgoing (id, signal) VALUES (?, ?) ON CONFLICT (id) DO NOTHING",
                compress(zip(ids, texts, strict=True), new),
            )
        return new

    def settle(self, recorded: Sequence[Signal], refused: Sequence[Signal] = ()) -> None:
        """Note the fate of outgoing signals: the other ledger has those in ``recorded``, which
        become transfers here, and will never have those in ``refused``, which are deleted.

        This does not wait for the disk: after a machine crash they may be outgoing again.
        """
        ids = sqlite_rows.transfer_ids(recorded)
        signals = dict(zip(ids, recorded, strict=True))
        with self._writing("NORMAL") as db:
            # The text as stored first; the transfer is the same for every version of the signal.
            found = sqlite_rows.existing_rows(db, "outgoing", ids, "id, signal")
            sqlite_rows.insert(db, ((key, signals[key], text) for key, text in found.items()))
            sqlite_rows.delete_found_outgoing(db, list(found))
            if refused:
                deleted = sqlite_rows.delete_outgoing(db, sqlite_rows.transfer_ids(refused))
                sqlite_rows.skip_numbers(db, deleted)

    def take_over(self) -> None:
        """Become the ledger: record here what is outgoing to another one."""
        while page := self.outgoing():
            self.settle([signal for _, signal in page])

    def outgoing(self, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """See :meth:`betrace.service.storage.ledger.base.LedgerEntries.outgoing`; oldest first."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT seq, signal FROM outgoing WHERE seq > ? ORDER BY seq LIMIT ?",
                (after, limit),
            ).fetchall()
        return [(seq, sqlite_rows.read_signal(text)) for seq, text in rows]

    def number_after(self, entry: int) -> None:
        """Number the transfers of a new ledger above ``entry``."""
        with self._writing() as db:
            sqlite_rows.skip_numbers(db, entry)

    def last_number(self) -> int:
        """The highest number that a transfer has, or will have once all outgoing signals are
        settled."""
        with self._reading() as db:
            (number,) = db.execute(
                "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'transfers'), 0)"
                " + (SELECT count(*) FROM outgoing)"
            ).fetchone()
        return int(number)

    def balance(self, tenant: str, rule_id: str) -> int:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.balance`."""
        account = sqlite_rows.id_bytes(rule_account(tenant, rule_id))
        with self._reading() as db:
            row = db.execute(
                "SELECT debits - credits FROM accounts WHERE id = ?", (account,)
            ).fetchone()
        return int(row[0]) if row else 0

    def balances(self, tenant: str) -> dict[str, int]:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.balances`."""
        with self._reading() as db:
            return dict(
                db.execute(
                    "SELECT rule_id, debits - credits FROM accounts "
                    "WHERE tenant = ? AND rule_id IS NOT NULL ORDER BY rule_id",
                    (tenant,),
                )
            )

    def entries(self, tenant: str, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """See :meth:`betrace.service.storage.ledger.base.LedgerEntries.entries`; in the order they
        were recorded."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT seq, signal FROM transfers WHERE tenant = ? AND seq > ? "
                "ORDER BY seq LIMIT ?",
                (tenant, after, limit),
            ).fetchall()
        return [(seq, sqlite_rows.read_signal(text)) for seq, text in rows]

    def last_entry(self, tenant: str) -> int:
        """See :meth:`betrace.service.storage.ledger.base.LedgerEntries.last_entry`."""
        with self._reading() as db:
            (seq,) = db.execute(
                "SELECT max(seq) FROM transfers WHERE tenant = ?", (tenant,)
            ).fetchone()
        return seq or 0

    def count(self, tenant: str) -> int:
        """See :meth:`betrace.service.storage.ledger.base.LedgerEntries.count`."""
        account = sqlite_rows.id_bytes(tenant_account(tenant))
        with self._reading() as db:
            row = db.execute(
                "SELECT debits + credits FROM accounts WHERE id = ?", (account,)
            ).fetchone()
        return row[0] // AMOUNT if row else 0

    def tenants(self) -> list[str]:
        """The tenants that ever had a signal, sorted."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT tenant FROM accounts WHERE rule_id IS NULL ORDER BY tenant"
            ).fetchall()
        return [tenant for (tenant,) in rows]

    def replace(self, since: float) -> None:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.replace`. A transaction that hangs
        keeps its lock on the file; until it ends, the new connection's writes fail as transient."""
        self._clients.replace(since)

    def close(self) -> None:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.close`."""
        self._clients.close(_CLOSE_SECONDS)
