"""The embedded ledger: conformance, and what only it does."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.ledger.base import LedgerError
from service.ledger.sqlite import SqliteLedger
from service.signals import Kind, Signal
from tests.service.ledger.conformance import LedgerConformance, OpenLedger, make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[SqliteLedger]:
    ledger = SqliteLedger(path)
    yield ledger
    ledger.close()


class TestConformance(LedgerConformance):
    @pytest.fixture
    def open_ledger(self, path: Path) -> OpenLedger:
        return lambda: SqliteLedger(path)


def test_whole_signals_come_back_in_order(ledger: SqliteLedger) -> None:
    signals = [make(i) for i in range(5)] + [make(2, kind=Kind.RETRACTED)]
    ledger.record(signals)
    ledger.record([make(9, tenant="other")])
    entries = ledger.entries("shop")
    assert [signal for _, signal in entries] == signals
    assert isinstance(entries[0][1].kind, Kind)
    after = entries[1][0]
    assert ledger.entries("shop", after, limit=2) == entries[2:4]
    assert ledger.last_entry("shop") == entries[-1][0]
    assert (ledger.entries("none"), ledger.last_entry("none")) == ([], 0)
    assert ledger.tenants() == ["other", "shop"]


def test_the_first_telling_stays(ledger: SqliteLedger) -> None:
    ledger.record([make(1, message="first")])
    ledger.record([make(1, message="second")])
    assert [signal.message for _, signal in ledger.entries("shop")] == ["first"]


def test_double_entry_is_balanced(ledger: SqliteLedger, path: Path) -> None:
    ledger.record([make(i, f"r{i % 3}") for i in range(10)])
    ledger.record([make(i, f"r{i % 3}", kind=Kind.RETRACTED) for i in range(4)])
    with sqlite3.connect(path) as db:
        debits, credits_ = db.execute("SELECT sum(debits), sum(credits) FROM accounts").fetchone()
        (total,) = db.execute(
            "SELECT credits - debits FROM accounts WHERE rule_id IS NULL"
        ).fetchone()
    db.close()
    assert debits == credits_ == 14
    assert total == sum(ledger.balances("shop").values()) == 6


@pytest.mark.parametrize(
    "statement",
    ["UPDATE transfers SET code = 2", "DELETE FROM transfers", "DELETE FROM accounts"],
)
def test_nothing_is_ever_changed(ledger: SqliteLedger, path: Path, statement: str) -> None:
    ledger.record([make(1)])
    with sqlite3.connect(path) as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)
    db.close()
    assert len(ledger.entries("shop")) == 1


def test_a_batch_is_all_or_nothing(ledger: SqliteLedger) -> None:
    broken = Signal(**(make(2).to_json() | {"labels": {"a": object()}}))
    with pytest.raises(LedgerError, match="cannot be written as JSON") as caught:
        ledger.record([make(1), broken])
    assert not caught.value.transient
    assert ledger.balances("shop") == {}
    assert ledger.record([make(1)]) == [True]


def test_a_file_held_by_another_is_transient(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.ledger.sqlite._BUSY_SECONDS", 0.05)
    ledger = SqliteLedger(path, synchronous="normal")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="locked: check the disk") as caught:
        ledger.record([make(1)])
    assert caught.value.transient
    assert ledger.balances("shop") == {}  # readers wait for nobody
    other.execute("ROLLBACK")
    other.close()
    assert ledger.record([make(1)]) == [True]
    ledger.close()


def test_a_full_disk_is_transient(ledger: SqliteLedger) -> None:
    ledger.record([make(0)])
    with ledger._clients.use() as connections:
        writer = connections.writer
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    many = [make(i) for i in range(1, 500)]
    with pytest.raises(LedgerError, match="full") as caught:
        ledger.record(many)
    assert caught.value.transient
    assert ledger.balance("shop", "r1") == 1
    writer.execute("PRAGMA max_page_count = 1000000")
    assert all(ledger.record(many))


def test_a_damaged_file_is_permanent(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database at all" * 300)
    with pytest.raises(LedgerError, match="restore the file") as caught:
        SqliteLedger(path)
    assert not caught.value.transient


def test_a_newer_schema_is_refused(path: Path) -> None:
    SqliteLedger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match=r"schema 99.*upgrade"):
        SqliteLedger(path)
