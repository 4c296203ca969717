"""The embedded ledger: one SQLite file, append-only."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import orjson

from betrace.service.signals import Signal
from betrace.service.storage.ledger.base import (
    AMOUNT,
    PAGE,
    ClientCounts,
    LedgerError,
    rule_account,
    tenant_account,
    transfer,
    transfer_id,
)
from betrace.service.storage.ledger.clients import Clients
from betrace.service.storage.sqlite_file import (
    NewerFileError,
    Schema,
    connect,
    open_file,
    remedy,
    transaction,
)

_IDS_PER_QUERY = 500
# Pages in the write-ahead log after which a commit moves them into the file. Callers wait for
# outgoing signals to be written, but nobody waits for them to be settled.
_LOG_PAGES = 1000
_LOG_PAGES_OUTGOING = 8000
_CLOSE_SECONDS = 5.0

# Transfers are written once; the triggers refuse any change. Balances follow from them in the same
# transaction, and exist only to save adding up.
_VERSION_1 = f"""
CREATE TABLE transfers (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id BLOB NOT NULL UNIQUE CHECK (length(id) = 16),
    debit_account BLOB NOT NULL REFERENCES accounts (id),
    credit_account BLOB NOT NULL REFERENCES accounts (id),
    code INTEGER NOT NULL CHECK (code IN (1, 2)),
    tenant TEXT NOT NULL,
    signal BLOB NOT NULL
) STRICT;
CREATE INDEX transfers_of_tenant ON transfers (tenant, seq);
CREATE TABLE accounts (
    id BLOB PRIMARY KEY,
    ledger INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    rule_id TEXT,
    debits INTEGER NOT NULL DEFAULT 0,
    credits INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX accounts_of_tenant ON accounts (tenant, rule_id);
CREATE TRIGGER post AFTER INSERT ON transfers BEGIN
    UPDATE accounts SET debits = debits + {AMOUNT} WHERE id = new.debit_account;
    UPDATE accounts SET credits = credits + {AMOUNT} WHERE id = new.credit_account;
END;
CREATE TRIGGER keep_transfers BEFORE UPDATE ON transfers BEGIN
    SELECT RAISE(ABORT, 'the ledger is append-only');
END;
CREATE TRIGGER keep_all_transfers BEFORE DELETE ON transfers BEGIN
    SELECT RAISE(ABORT, 'the ledger is append-only');
END;
CREATE TRIGGER keep_all_accounts BEFORE DELETE ON accounts BEGIN
    SELECT RAISE(ABORT, 'the ledger is append-only');
END;
"""

# Signals on their way to another ledger, for which this file is the journal.
_VERSION_2 = """
CREATE TABLE outgoing (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id BLOB NOT NULL UNIQUE CHECK (length(id) = 16),
    signal BLOB NOT NULL
) STRICT;
"""
SCHEMA = Schema(0x42544C47, [_VERSION_1, _VERSION_2])  # "BTLG"

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
    writing: threading.Lock = field(default_factory=threading.Lock)
    reading: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
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
            open_file(path, SCHEMA).close()
        self._clients = Clients(self._open, _Connections.close)
        with self._clients.use():
            pass

    @property
    def clients(self) -> ClientCounts:
        """Connections that were given up because a call hung."""
        return self._clients.counts

    def _connect(self) -> sqlite3.Connection:
        connection = connect(self._path)
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _open(self) -> _Connections:
        with self._errors():
            writer = self._connect()
            try:
                writer.execute(f"PRAGMA synchronous = {self._synchronous}")
                reader = self._connect()
                reader.execute("PRAGMA query_only = ON")
            except BaseException:
                writer.close()
                raise
        return _Connections(writer, reader)

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
                advice = "restore the file, or move it away to begin a new ledger"
            raise LedgerError(f"{self._path}: {error}: {advice}", transient=transient) from error

    @contextmanager
    def _writing(
        self, synchronous: str | None = None, log_pages: int = _LOG_PAGES
    ) -> Iterator[sqlite3.Connection]:
        """A transaction, committed unless the block raises."""
        with self._clients.use() as connections, connections.writing, self._errors():
            db = connections.writer
            db.execute(f"PRAGMA wal_autocheckpoint = {log_pages}")
            if synchronous is not None:
                db.execute(f"PRAGMA synchronous = {synchronous}")
            try:
                with transaction(db):
                    yield db
            finally:
                if synchronous is not None:
                    db.execute(f"PRAGMA synchronous = {self._synchronous}")
            self._clients.succeeded()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._clients.use() as connections, connections.reading, self._errors():
            yield connections.reader

    def record(self, signals: Sequence[Signal]) -> list[bool]:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.record`. One transaction: all or
        nothing."""
        ids = _ids(signals)
        texts = [_text(signal) for signal in signals]
        if not ids:
            return []
        with self._writing() as db:
            new = _first(ids, _existing(db, "transfers", ids))
            _insert(db, list(compress(zip(signals, texts, strict=True), new)))
        return new

    def add_outgoing(self, signals: Sequence[Signal]) -> list[bool]:
        """Store signals for another ledger to record. Returns for each whether that ledger must be
        sent it: False if it was settled before, or is a repetition within ``signals``."""
        ids = _ids(signals)
        texts = [_text(signal) for signal in signals]
        if not ids:
            return []
        with self._writing(log_pages=_LOG_PAGES_OUTGOING) as db:
            new = _first(ids, _existing(db, "transfers", ids))
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
        with self._writing("NORMAL") as db:
            found = _existing(db, "outgoing", _ids(recorded), "id, signal")
            # The text as stored first; the transfer is the same for every version of the signal.
            signals = {_bytes(transfer_id(signal.id)): signal for signal in recorded}
            _insert(db, [(signals[key], text) for key, text in found.items()])
            db.executemany(
                "DELETE FROM outgoing WHERE id = ?",
                [(key,) for key in (*found, *_ids(refused))],
            )

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
        return [(seq, _signal(text)) for seq, text in rows]

    def balance(self, tenant: str, rule_id: str) -> int:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.balance`."""
        account = _bytes(rule_account(tenant, rule_id))
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
        return [(seq, _signal(text)) for seq, text in rows]

    def last_entry(self, tenant: str) -> int:
        """See :meth:`betrace.service.storage.ledger.base.LedgerEntries.last_entry`."""
        with self._reading() as db:
            (seq,) = db.execute(
                "SELECT max(seq) FROM transfers WHERE tenant = ?", (tenant,)
            ).fetchone()
        return seq or 0

    def count(self, tenant: str) -> int:
        """See :meth:`betrace.service.storage.ledger.base.LedgerEntries.count`."""
        account = _bytes(tenant_account(tenant))
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


def _ids(signals: Sequence[Signal]) -> list[bytes]:
    return [_bytes(transfer_id(signal.id)) for signal in signals]


def _existing(
    db: sqlite3.Connection, table: str, ids: list[bytes], columns: str = "id, 0"
) -> dict[bytes, Any]:
    """Those of ``ids`` that are in ``table``, each with the second of two columns."""
    found: dict[bytes, Any] = {}
    for first in range(0, len(ids), _IDS_PER_QUERY):
        some = ids[first : first + _IDS_PER_QUERY]
        marks = ",".join("?" * len(some))
        found |= dict(db.execute(f"SELECT {columns} FROM {table} WHERE id IN ({marks})", some))
    return found


def _first(ids: list[bytes], existing: Iterable[bytes]) -> list[bool]:
    """For each id, whether it is not among ``existing`` and not a repetition."""
    seen = set(existing)
    new = []
    for each in ids:
        new.append(each not in seen)
        seen.add(each)
    return new


def _insert(db: sqlite3.Connection, chosen: Sequence[tuple[Signal, bytes]]) -> None:
    """Insert signals, given with their texts, as transfers; also their accounts if missing."""
    moves = [(transfer(signal), signal, text) for signal, text in chosen]
    accounts = {
        row
        for move, signal, _ in moves
        for row in (
            (_bytes(tenant_account(signal.tenant)), move.ledger, signal.tenant, None),
            (_bytes(_rule(signal)), move.ledger, signal.tenant, signal.rule_id),
        )
    }
    db.executemany(
        "INSERT INTO accounts (id, ledger, tenant, rule_id) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (id) DO NOTHING",
        accounts,
    )
    db.executemany(
        "INSERT INTO transfers (id, debit_account, credit_account, code, tenant, signal) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        [
            (
                _bytes(move.id),
                _bytes(move.debit_account),
                _bytes(move.credit_account),
                int(move.code),
                signal.tenant,
                text,
            )
            for move, signal, text in moves
        ],
    )


def _bytes(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _rule(signal: Signal) -> int:
    return rule_account(signal.tenant, signal.rule_id)


def _text(signal: Signal) -> bytes:
    try:
        return orjson.dumps(signal)
    except orjson.JSONEncodeError as error:
        raise LedgerError(
            f"signal {signal.id} cannot be written as JSON: {error}", transient=False
        ) from error


def _signal(text: bytes) -> Signal:
    return Signal.from_json(orjson.loads(text))
