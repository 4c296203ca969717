"""The tables of the embedded ledger, and their rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Final

import orjson

from betrace.service.signals import Signal
from betrace.service.storage.ledger.base import (
    AMOUNT,
    LedgerError,
    rule_account,
    tenant_account,
    transfer,
    transfer_id,
)
from betrace.service.storage.sqlite_file import Schema

_IDS_PER_QUERY: Final = 500

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


def insert(db: sqlite3.Connection, chosen: Sequence[tuple[Signal, bytes]]) -> None:
    """Insert signals, given with their texts, as transfers; also their accounts if missing."""
    moves = [(transfer(signal), signal, text) for signal, text in chosen]
    accounts = {
        row
        for move, signal, _ in moves
        for row in (
            (id_bytes(tenant_account(signal.tenant)), move.ledger, signal.tenant, None),
            (id_bytes(_rule(signal)), move.ledger, signal.tenant, signal.rule_id),
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
                id_bytes(move.id),
                id_bytes(move.debit_account),
                id_bytes(move.credit_account),
                int(move.code),
                signal.tenant,
                text,
            )
            for move, signal, text in moves
        ],
    )


def id_bytes(number: int) -> bytes:
    """An id of the ledger, as stored."""
    return number.to_bytes(16, "big")


def _rule(signal: Signal) -> int:
    return rule_account(signal.tenant, signal.rule_id)


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
