"""The embedded ledger: conformance, and what only it does."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from betrace.service.signals import Kind, Signal
from betrace.service.storage.ledger import sqlite_rows
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from tests.support.ledger_conformance import LedgerConformance, OpenLedger, make


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


def test_the_first_version_of_a_signal_stays(ledger: SqliteLedger) -> None:
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


def test_a_file_locked_by_another_process_is_transient(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betrace.service.storage.sqlite_file.BUSY_SECONDS", 0.05)
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


def test_a_file_of_the_first_schema_is_migrated(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:  # its trigger posts transfers
        db.executescript(
            f"{sqlite_rows._VERSION_1} PRAGMA application_id = {sqlite_rows.SCHEMA.application_id};"
            "PRAGMA user_version = 1;"
        )
        sqlite_rows.insert(db, [(bytes(15) + b"x", make(0), sqlite_rows.write_signal(make(0)))])
        db.execute("UPDATE accounts SET debits = min(debits, 1), credits = min(credits, 1)")
    db.close()
    ledger = SqliteLedger(path)
    assert ledger.balance("shop", "r1") == 1
    assert ledger.record([make(1), make(1), make(2)]) == [True, False, True]
    assert ledger.add_outgoing([make(3)]) == [True]
    ledger.settle([make(3)])
    assert ledger.balance("shop", "r1") == ledger.count("shop") == 4
    ledger.close()


def test_an_outgoing_signal_becomes_an_entry_when_settled(ledger: SqliteLedger) -> None:
    ledger.record([make(0)])
    first = make(1, message="first")
    assert ledger.add_outgoing([]) == []
    assert ledger.add_outgoing([make(0), first, make(2), first]) == [False, True, True, False]
    assert ledger.add_outgoing([make(1, message="second"), make(3)]) == [True, True]
    assert [signal for _, signal in ledger.outgoing()] == [first, make(2), make(3)]
    assert [s for _, s in ledger.outgoing(ledger.outgoing()[0][0], limit=1)] == [make(2)]
    assert ledger.count("shop") == 1
    ledger.settle([make(1, message="second"), make(2)], refused=[make(3)])
    assert ledger.outgoing() == []
    assert [signal for _, signal in ledger.entries("shop")] == [make(0), first, make(2)]
    ledger.settle([make(2)])  # by a second thread: it is settled
    assert ledger.balance("shop", "r1") == ledger.count("shop") == 3


def test_the_ledger_that_takes_over_has_the_outgoing_signals(ledger: SqliteLedger) -> None:
    ledger.add_outgoing([make(1), make(2, tenant="other")])
    ledger.take_over()
    assert ledger.outgoing() == []
    assert (ledger.balances("shop"), ledger.balances("other")) == ({"r1": 1}, {"r1": 1})


class Hanging:
    """Holds up a thread inside a transaction of the ledger."""

    def __init__(self, ledger: SqliteLedger, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.inside = threading.Event(), threading.Event()
        self.answers: list[list[bool]] = []
        real, first = sqlite_rows.insert, threading.Event()

        def hang(db: sqlite3.Connection, chosen: object) -> None:
            if not first.is_set():
                first.set()
                self.inside.set()
                self.go_on.wait(60)
            real(db, chosen)

        monkeypatch.setattr(sqlite_rows, "insert", hang)
        self.began = time.monotonic()
        self.thread = threading.Thread(target=lambda: self.answers.append(ledger.record([make(1)])))
        self.thread.start()
        assert self.inside.wait(60)


def test_a_connection_that_hangs_is_replaced(
    ledger: SqliteLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betrace.service.storage.sqlite_file.BUSY_SECONDS", 0.05)
    ledger._clients.pause = 0
    hanging = Hanging(ledger, monkeypatch)
    ledger.replace(hanging.began)
    assert (ledger.clients.replaced, ledger.clients.left_behind) == (1, 1)
    with pytest.raises(LedgerError, match="locked") as caught:  # its transaction is not over
        ledger.record([make(2)])
    assert caught.value.transient
    assert ledger.balances("shop") == {}
    hanging.go_on.set()
    hanging.thread.join(60)
    assert hanging.answers == [[True]]
    assert ledger.record([make(1), make(2)]) == [False, True]
    assert ledger.clients.left_behind == 0


def test_close_waits_for_a_limited_time(
    ledger: SqliteLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betrace.service.storage.ledger.sqlite._CLOSE_SECONDS", 0.1)
    hanging = Hanging(ledger, monkeypatch)
    started = time.monotonic()
    ledger.close()
    assert time.monotonic() - started < 30
    hanging.go_on.set()
    hanging.thread.join(60)
    assert hanging.answers == [[True]]  # nobody closed the connection under it
