"""The store of traces that rules could not judge."""

from __future__ import annotations

import sqlite3

import pytest

from betrace.service.storage.undecided import UndecidedStore, UndecidedStoreError, UndecidedTrace


def record(number: int, reason: str = "too many spans", rule: str = "r") -> UndecidedTrace:
    return UndecidedTrace(f"{number:032x}", rule, "v", reason, number)


def test_records_are_listed_newest_first_in_pages(tmp_path):
    store = UndecidedStore(tmp_path / "undecided.sqlite")
    store.add("a", [record(1), record(2, rule="s"), record(3)])
    store.add("b", [record(9)])
    assert store.page("a", limit=2) == ([record(3), record(2, rule="s")], 2)
    assert store.page("a", limit=2, before=2) == ([record(1)], None)
    assert store.page("a", rule="s") == ([record(2, rule="s")], None)
    assert store.page("a", trace_id=record(1).trace_id) == ([record(1)], None)
    store.close()


def test_a_record_replaces_the_earlier_one_and_the_oldest_are_deleted(tmp_path):
    store = UndecidedStore(tmp_path / "undecided.sqlite", kept=3)
    store.add("a", [record(number) for number in range(1, 4)])
    store.add("b", [record(1)])
    store.add("a", [record(1, "again"), record(5)])
    assert store.page("a")[0] == [record(5), record(1, "again"), record(3)]
    assert store.page("b")[0] == [record(1)]
    store.add("a", [record(number) for number in range(10, 20)])
    assert store.page("a")[0] == [record(19), record(18), record(17)]
    store.close()
    again = UndecidedStore(tmp_path / "undecided.sqlite")
    assert len(again.page("a")[0]) == 3
    again.delete_tenant("a")
    assert again.page("a") == ([], None)
    assert again.page("b")[0] == [record(1)]
    again.close()


def test_a_file_of_a_newer_version_or_a_damaged_one_is_an_error(tmp_path):
    path = tmp_path / "undecided.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UndecidedStoreError, match="newer program"):
        UndecidedStore(path)
    path.write_bytes(b"x" * 4096)
    with pytest.raises(UndecidedStoreError, match="start without the list of undecided traces"):
        UndecidedStore(path)
