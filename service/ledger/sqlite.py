"""The embedded ledger: one SQLite file, append-only."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import orjson

from service.ledger.base import AMOUNT, LedgerError, rule_account, tenant_account, transfer
from service.signals import Kind, Signal

SCHEMA_VERSION = 1
APPLICATION_ID = 0x42544C47  # "BTLG", for file(1)
_IDS_PER_QUERY = 500
_BUSY_SECONDS = 2.0

# Transfers are written once: the triggers refuse any change. Balances follow from them in the
# same transaction and are there only so that nobody has to add up.
_SCHEMA = f"""
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
PRAGMA user_version = {SCHEMA_VERSION};
PRAGMA application_id = {APPLICATION_ID};
"""

_TRANSIENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
}


class SqliteLedger:
    """A :class:`service.ledger.base.Ledger` in the file ``path``, made if missing.

    It keeps the whole signals too, so that the query store can be built from it again. Writers
    take turns; readers have a connection of their own and wait for nobody.

    ``synchronous`` is FULL, because what has been recorded is never looked for again: the
    checkpoint that follows passes over its spans. With NORMAL a commit may be undone by the
    machine's death, not by the process's.
    """

    def __init__(self, path: Path, synchronous: Literal["full", "normal"] = "full") -> None:
        self._path = path
        self._closed = False
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect()
            try:
                self._writer.execute(f"PRAGMA synchronous = {synchronous.upper()}")
                self._migrate()
                self._reader = self._connect()
                self._reader.execute("PRAGMA query_only = ON")
            except BaseException:
                self._writer.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _migrate(self) -> None:
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"{self._path} was written by a newer program (schema {version}, this one knows "
                f"{SCHEMA_VERSION}): upgrade, or choose another data directory",
                transient=False,
            )
        self._writer.execute("PRAGMA journal_mode = WAL")
        if version == 0:
            self._writer.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Tell SQLite's errors as :exc:`LedgerError`."""
        if self._closed:
            raise LedgerError("the ledger is closed", transient=False)
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            transient = code in _TRANSIENT
            remedy = (
                "check the disk's space and health, and that no other program holds the file"
                if transient
                else "restore the file, or move it away to begin a new ledger"
            )
            raise LedgerError(f"{self._path}: {error}: {remedy}", transient=transient) from error

    def record(self, signals: Sequence[Signal]) -> list[bool]:
        """See :meth:`service.ledger.base.Ledger.record`; one transaction, so all or nothing."""
        transfers = [transfer(signal) for signal in signals]
        texts = [_text(signal) for signal in signals]
        ids = [each.id.to_bytes(16, "big") for each in transfers]
        if not ids:
            return []
        with self._write_lock, self._errors():
            db = self._writer
            db.execute("BEGIN IMMEDIATE")
            try:
                seen = self._existing(ids)
                new = []
                for each in ids:
                    new.append(each not in seen)
                    seen.add(each)
                chosen = [
                    (key, move, signal, text)
                    for key, move, signal, text, is_new in zip(
                        ids, transfers, signals, texts, new, strict=True
                    )
                    if is_new
                ]
                accounts = {
                    (account(signal), move.ledger, signal.tenant, rule)
                    for _, move, signal, _ in chosen
                    for account, rule in ((_tenant, None), (_rule, signal.rule_id))
                }
                db.executemany(
                    "INSERT INTO accounts (id, ledger, tenant, rule_id) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (id) DO NOTHING",
                    accounts,
                )
                db.executemany(
                    "INSERT INTO transfers (id, debit_account, credit_account, code, tenant, "
                    "signal) VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (
                            key,
                            move.debit_account.to_bytes(16, "big"),
                            move.credit_account.to_bytes(16, "big"),
                            int(move.code),
                            signal.tenant,
                            text,
                        )
                        for key, move, signal, text in chosen
                    ],
                )
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        return new

    def _existing(self, ids: list[bytes]) -> set[bytes]:
        found: set[bytes] = set()
        for first in range(0, len(ids), _IDS_PER_QUERY):
            some = ids[first : first + _IDS_PER_QUERY]
            marks = ",".join("?" * len(some))
            rows = self._writer.execute(f"SELECT id FROM transfers WHERE id IN ({marks})", some)
            found.update(row[0] for row in rows)
        return found

    def balance(self, tenant: str, rule_id: str) -> int:
        """See :meth:`service.ledger.base.Ledger.balance`."""
        account = rule_account(tenant, rule_id).to_bytes(16, "big")
        with self._read_lock, self._errors():
            row = self._reader.execute(
                "SELECT debits - credits FROM accounts WHERE id = ?", (account,)
            ).fetchone()
        return int(row[0]) if row else 0

    def balances(self, tenant: str) -> dict[str, int]:
        """See :meth:`service.ledger.base.Ledger.balances`."""
        with self._read_lock, self._errors():
            return dict(
                self._reader.execute(
                    "SELECT rule_id, debits - credits FROM accounts "
                    "WHERE tenant = ? AND rule_id IS NOT NULL ORDER BY rule_id",
                    (tenant,),
                )
            )

    def entries(self, tenant: str, after: int = 0, limit: int = 1000) -> list[tuple[int, Signal]]:
        """The tenant's signals in the order they were recorded, up to ``limit`` of those after
        the sequence number ``after``, each with its own."""
        with self._read_lock, self._errors():
            rows = self._reader.execute(
                "SELECT seq, signal FROM transfers WHERE tenant = ? AND seq > ? "
                "ORDER BY seq LIMIT ?",
                (tenant, after, limit),
            ).fetchall()
        return [(seq, _signal(text)) for seq, text in rows]

    def last_entry(self, tenant: str) -> int:
        """The sequence number of the tenant's newest signal; 0 without any."""
        with self._read_lock, self._errors():
            (seq,) = self._reader.execute(
                "SELECT max(seq) FROM transfers WHERE tenant = ?", (tenant,)
            ).fetchone()
        return seq or 0

    def count(self, tenant: str) -> int:
        """How many signals the tenant has, retractions included."""
        account = tenant_account(tenant).to_bytes(16, "big")
        with self._read_lock, self._errors():
            row = self._reader.execute(
                "SELECT debits + credits FROM accounts WHERE id = ?", (account,)
            ).fetchone()
        return row[0] // AMOUNT if row else 0

    def tenants(self) -> list[str]:
        """The tenants that ever had a signal, sorted."""
        with self._read_lock, self._errors():
            rows = self._reader.execute(
                "SELECT tenant FROM accounts WHERE rule_id IS NULL ORDER BY tenant"
            ).fetchall()
        return [tenant for (tenant,) in rows]

    def close(self) -> None:
        """See :meth:`service.ledger.base.Ledger.close`."""
        with self._write_lock, self._read_lock:
            if not self._closed:
                self._closed = True
                self._reader.close()
                self._writer.close()


def _tenant(signal: Signal) -> bytes:
    return tenant_account(signal.tenant).to_bytes(16, "big")


def _rule(signal: Signal) -> bytes:
    return rule_account(signal.tenant, signal.rule_id).to_bytes(16, "big")


def _text(signal: Signal) -> bytes:
    try:
        return orjson.dumps(signal.to_json())
    except orjson.JSONEncodeError as error:
        raise LedgerError(
            f"signal {signal.id} cannot be written as JSON: {error}", transient=False
        ) from error


def _signal(text: bytes) -> Signal:
    values = orjson.loads(text)
    return Signal(**values | {"kind": Kind(values["kind"])})
