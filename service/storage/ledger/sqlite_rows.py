"""The tables of the embedded ledger, and their rows."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

import orjson

from betrace.service.signals import Kind, Signal
from betrace.service.storage.ledger.base import (
    AMOUNT,
    Code,
    LedgerError,
    ledger_number,
    rule_account,
    tenant_account,
    transfer_id,
)
from betrace.service.storage.sqlite_file import Schema

_IDS_PER_QUERY: Final = 500
_ACCOUNTS_KEPT: Final = 10_000

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

# Balances are posted once for each account of a batch, not by a trigger once for each transfer,
# which took a third of the time of a batch.
_VERSION_3 = "DROP TRIGGER IF EXISTS post;"
SCHEMA = Schema(0x42544C47, [_VERSION_1, _VERSION_2, _VERSION_3])  # "BTLG"


def transfer_ids(signals: Sequence[Signal]) -> list[bytes]:
    """The ids of the transfers of signals, as stored."""
    return [id_bytes(transfer_id(signal.id)) for signal in signals]


def existing_rows(
    db: sqlite3.Connection, table: str, ids: list[bytes], columns: str = "id, 0"
) -> dict[bytes, Any]:
    """Those of ``ids`` that are in ``table``, each with the second of two columns."""
    found: dict[bytes, Any] = {}
    for first in range(0, len(ids), _IDS_PER_QUERY):
        some = ids[first : first + _IDS_PER_QUERY]
        marks = ",".join("?" * len(some))
        found |= dict(db.execute(f"SELECT {columns} FROM {table} WHERE id IN ({marks})", some))
    return found


def first_of_each(ids: list[bytes], existing: Iterable[bytes]) -> list[bool]:
    """For each id, whether it is not among ``existing`` and not a repetition."""
    seen = set(existing)
    new = []
    for each in ids:
        new.append(each not in seen)
        seen.add(each)
    return new


def insert(db: sqlite3.Connection, chosen: Iterable[tuple[bytes, Signal, bytes]]) -> None:
    """Insert signals, given with their ids and texts, as transfers; post them to their accounts,
    which are made if missing."""
    rows = []
    posted: Counter[tuple[str, str, Kind]] = Counter()
    for key, signal, text in chosen:
        rule, tenant = _account_ids(signal.tenant, signal.rule_id)
        if signal.kind is Kind.RAISED:
            rows.append((key, rule, tenant, int(Code.RAISED), signal.tenant, text))
        else:
            rows.append((key, tenant, rule, int(Code.RETRACTED), signal.tenant, text))
        posted[signal.tenant, signal.rule_id, signal.kind] += AMOUNT
    accounts: list[tuple[bytes, int, str, str | None, int, int]] = []
    for (name, rule_id, kind), amount in posted.items():
        rule, tenant = _account_ids(name, rule_id)
        debit, credit = (amount, 0) if kind is Kind.RAISED else (0, amount)
        accounts.append((rule, ledger_number(name), name, rule_id, debit, credit))
        accounts.append((tenant, ledger_number(name), name, None, credit, debit))
    db.executemany(
        "INSERT INTO accounts (id, ledger, tenant, rule_id, debits, credits) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE "
        "SET debits = debits + excluded.debits, credits = credits + excluded.credits",
        accounts,
    )
    db.executemany(
        "INSERT INTO transfers (id, debit_account, credit_account, code, tenant, signal) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        rows,
    )


@lru_cache(maxsize=_ACCOUNTS_KEPT)
def _account_ids(tenant: str, rule_id: str) -> tuple[bytes, bytes]:
    """The accounts of a rule and of its tenant, as stored."""
    return id_bytes(rule_account(tenant, rule_id)), id_bytes(tenant_account(tenant))


def delete_outgoing(db: sqlite3.Connection, ids: list[bytes]) -> int:
    """Delete outgoing signals; returns how many of them were there."""
    deleted = db.executemany("DELETE FROM outgoing WHERE id = ?", [(key,) for key in ids])
    return deleted.rowcount


def delete_found_outgoing(db: sqlite3.Connection, ids: list[bytes]) -> None:
    """Delete outgoing signals that are there; usually they are all."""
    (count,) = db.execute("SELECT count(*) FROM outgoing").fetchone()
    if count == len(ids):
        db.execute("DELETE FROM outgoing")  # without looking at each row
    else:
        delete_outgoing(db, ids)


def skip_numbers(db: sqlite3.Connection, count: int) -> None:
    """Leave the next numbers of transfers unused."""
    done = db.execute("UPDATE sqlite_sequence SET seq = seq + ? WHERE name = 'transfers'", (count,))
    if not done.rowcount:
        db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('transfers', ?)", (count,))


def id_bytes(number: int) -> bytes:
    """An id of the ledger, as stored."""
    return number.to_bytes(16, "big")


def write_signal(signal: Signal) -> bytes:
    """A signal as JSON. Raises :exc:`LedgerError` if that is impossible."""
    try:
        return orjson.dumps(signal)
    except orjson.JSONEncodeError as error:
        raise LedgerError(
            f"signal {signal.id} cannot be written as JSON: {error}", transient=False
        ) from error


def read_signal(text: bytes) -> Signal:
    """The inverse of :func:`write_signal`."""
    return Signal.from_json(orjson.loads(text))
