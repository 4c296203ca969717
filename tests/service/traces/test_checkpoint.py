"""Checkpoint files are read as they were written, or skipped."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import orjson
import pytest

from betrace.service.traces.checkpoint import (
    KEPT,
    Snapshot,
    TableSnapshot,
    TenantSnapshot,
    checkpoint_files,
    read_checkpoint,
    read_latest,
    write_checkpoint,
)


def snapshot(taken_ns: int = 5, tenants: int = 2) -> Snapshot:
    def table(number: int) -> TableSnapshot:
        arrays = {
            "slots": -(2**63) + np.arange(number * 6).reshape(number, 6),
            "names": np.full((number, 3), 255, np.uint8),
            "none": np.zeros((0, 7), np.int64),
        }
        definitions = orjson.dumps([{"id": "r", "condition": "日本"}])
        return TableSnapshot(f"v{number}", definitions, ["a"], arrays)

    return Snapshot(
        taken_ns,
        {"t0": (17, [3, 9, 17]), "t1": (2**63, [])},
        [
            TenantSnapshot(f"t{i}", ["", "shop", "日本"], [table(1), table(2)])
            for i in range(tenants)
        ],
    )


def same(one: Snapshot, other: Snapshot) -> None:
    assert one.taken_ns == other.taken_ns
    assert one.progress == other.progress
    assert [t.tenant for t in one.tenants] == [t.tenant for t in other.tenants]
    for a, b in zip(one.tenants, other.tenants, strict=True):
        assert a.services == b.services
        for x, y in zip(a.tables, b.tables, strict=True):
            assert (x.version, x.definitions, x.check_names) == (
                y.version,
                y.definitions,
                y.check_names,
            )
            assert list(x.arrays) == list(y.arrays)
            for name, array in x.arrays.items():
                assert array.dtype == y.arrays[name].dtype
                np.testing.assert_array_equal(array, y.arrays[name])


def test_a_snapshot_is_read_as_it_was_written(tmp_path):
    assert read_latest(tmp_path / "none") is None
    size = write_checkpoint(tmp_path / "new" / "folder", snapshot())
    (path,) = checkpoint_files(tmp_path / "new" / "folder")
    assert path.stat().st_size == size
    found = read_latest(tmp_path / "new" / "folder")
    assert found is not None
    same(found, snapshot())


def test_every_damaged_byte_is_detected(tmp_path):
    write_checkpoint(tmp_path, snapshot(tenants=1))
    (path,) = checkpoint_files(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for flip in (1, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=r"it is|it has|its checksum"):
                read_checkpoint(path)


def test_truncation_and_trailing_bytes_are_detected(tmp_path):
    write_checkpoint(tmp_path, snapshot(tenants=1))
    (path,) = checkpoint_files(tmp_path)
    whole = path.read_bytes()
    for damaged in [whole[:n] for n in range(len(whole))] + [whole + b"\0", whole * 2]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"it is|it has|its checksum"):
            read_checkpoint(path)


def test_if_a_file_is_damaged_the_previous_one_is_used(tmp_path, caplog):
    write_checkpoint(tmp_path, snapshot(1))
    write_checkpoint(tmp_path, snapshot(2))
    newest, before = checkpoint_files(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1])
    found = read_latest(tmp_path)
    assert found is not None
    assert found.taken_ns == 1
    assert newest.name in caplog.text
    before.write_bytes(b"")
    assert read_latest(tmp_path) is None


def test_an_unreadable_file_is_skipped(tmp_path):
    write_checkpoint(tmp_path, snapshot(1))
    (tmp_path / f"{7:020d}.checkpoint").mkdir()
    found = read_latest(tmp_path)
    assert found is not None
    assert found.taken_ns == 1


def test_older_files_are_removed(tmp_path):
    for taken in range(1, 6):
        write_checkpoint(tmp_path, snapshot(taken))
    files = checkpoint_files(tmp_path)
    assert [read_checkpoint(file).taken_ns for file in files] == [5, 4][:KEPT]
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_the_newest_file_is_used_even_if_the_clock_was_set_back(tmp_path):
    for taken in (100, 101, 50, 50, 51):
        write_checkpoint(tmp_path, snapshot(taken))
        found = read_latest(tmp_path)
        assert found is not None
        assert found.taken_ns == taken
    assert len(checkpoint_files(tmp_path)) == KEPT


def test_a_failed_write_leaves_the_existing_files(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, snapshot(1))
    before = sorted(tmp_path.iterdir())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for taken in (2, 3, 4):
            with pytest.raises(OSError, match="no space"):
                write_checkpoint(tmp_path, snapshot(taken))
    assert sorted(tmp_path.iterdir()) == before
    write_checkpoint(tmp_path, snapshot(5))
    found = read_latest(tmp_path)
    assert found is not None
    assert found.taken_ns == 5


def test_the_unfinished_file_of_a_crashed_process_is_overwritten(tmp_path):
    (tmp_path / "checkpoint.tmp").write_bytes(b"half" * 10_000)
    assert read_latest(tmp_path) is None
    write_checkpoint(tmp_path, snapshot(1))
    assert [path.suffix for path in tmp_path.iterdir()] == [".checkpoint"]


def test_the_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append("rename"), rename(a, b))[1])
    write_checkpoint(tmp_path, snapshot(1))
    assert done == ["sync", "rename", "sync"]  # the file, its name, the directory
