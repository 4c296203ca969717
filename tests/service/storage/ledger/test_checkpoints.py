"""The write-ahead log is moved into the file by a thread of its own."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest

from betrace.service.storage.ledger import checkpoints
from betrace.service.storage.ledger.checkpoints import Checkpoints
from betrace.service.storage.ledger.sqlite import SqliteLedger
from tests.support.ledger_conformance import make


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "ledger-log"]


def test_commits_are_moved_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PAGES", 100)
    ledger = SqliteLedger(tmp_path / "ledger.sqlite")
    ledger.record([make(0)])
    assert not threads()  # a ledger with few signals has none
    before = (tmp_path / "ledger.sqlite").stat().st_size
    end = time.monotonic() + 60
    number = 1
    while (tmp_path / "ledger.sqlite").stat().st_size == before:
        assert time.monotonic() < end
        ledger.record([make(number + i) for i in range(100)])
        number += 100
        time.sleep(0.02)
    assert len(threads()) == 1
    ledger.close()
    assert not threads()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT count(*) FROM transfers").fetchone() == (number,)
    db.close()


def test_a_reader_only_delays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PAGES", 1)
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM transfers").fetchone()
        for number in range(50):
            assert ledger.record([make(number)]) == [True]
        other.execute("COMMIT")
    other.close()
    ledger.close()


def test_a_file_that_cannot_be_opened_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = Checkpoints(tmp_path / "missing" / "ledger.sqlite")
    moved.committed(checkpoints.PAGES)
    moved.close()
    moved.close()
    assert "the write-ahead log is not moved" in caplog.text
    moved.committed(checkpoints.PAGES)
    assert not threads()
