"""Opening and migrating SQLite files."""

from __future__ import annotations

import sqlite3

import pytest

from betrace.service.storage.sqlite_file import (
    NewerFileError,
    Schema,
    open_file,
    remedy,
    transaction,
)

ONE = "CREATE TABLE a (x INTEGER) STRICT;"
TWO = "CREATE TABLE b (x INTEGER) STRICT;"


def tables(db: sqlite3.Connection) -> list[str]:
    return [name for (name,) in db.execute("SELECT name FROM sqlite_schema ORDER BY name")]


def test_a_file_is_migrated_from_each_version_and_keeps_its_rows(tmp_path):
    path = tmp_path / "new" / "file.sqlite"
    db = open_file(path, Schema(77, [ONE]))
    db.execute("INSERT INTO a VALUES (1)")
    db.close()
    for _ in range(2):
        db = open_file(path, Schema(77, [ONE, TWO]))
        assert tables(db) == ["a", "b"]
        assert db.execute("SELECT x FROM a").fetchall() == [(1,)]
        for pragma, value in (
            ("user_version", 2),
            ("application_id", 77),
            ("journal_mode", "wal"),
            ("synchronous", 2),
        ):
            assert db.execute(f"PRAGMA {pragma}").fetchone() == (value,)
        db.close()


def test_a_failed_migration_leaves_the_old_version(tmp_path):
    path = tmp_path / "file.sqlite"
    open_file(path, Schema(77, [ONE])).close()
    with pytest.raises(sqlite3.OperationalError, match="nonsense"):
        open_file(path, Schema(77, [ONE, f"{TWO}nonsense;"]))
    db = open_file(path, Schema(77, [ONE]))
    assert tables(db) == ["a"]
    db.close()


def test_a_newer_file_is_left_alone(tmp_path):
    path = tmp_path / "file.sqlite"
    open_file(path, Schema(77, [ONE, TWO])).close()
    with pytest.raises(NewerFileError, match="schema 2, this one knows 1") as raised:
        open_file(path, Schema(77, [ONE]))
    assert remedy(raised.value, "it") == "upgrade, or choose another data directory"


def test_a_transaction_is_undone_if_its_block_raises(tmp_path):
    db = open_file(tmp_path / "file.sqlite", Schema(77, [ONE]))
    with pytest.raises(sqlite3.IntegrityError), transaction(db):
        db.executemany("INSERT INTO a VALUES (?)", [(1,), ("text",)])
    with transaction(db):
        db.execute("INSERT INTO a VALUES (2)")
    assert db.execute("SELECT x FROM a").fetchall() == [(2,)]
    db.close()
