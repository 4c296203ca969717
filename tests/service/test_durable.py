import os

import pytest

from betrace.service.durable import replace_durably, replacing, write_atomically


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a"
    for data in (b"one", b"", b"three"):
        write_atomically(path, data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def chunks():
        yield b"new"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.writelines(chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_sync_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(descriptor):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_left_by_a_crash_is_overwritten(tmp_path):
    path, temporary = tmp_path / "a", tmp_path / ".hidden"
    temporary.write_bytes(b"half of a much longer file")
    write_atomically(path, b"new", temporary)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_before_it_gets_its_name_and_its_directory_after(tmp_path, monkeypatch):
    path, temporary = tmp_path / "a", tmp_path / "b"
    temporary.write_bytes(b"new")
    there = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (there.append(path.exists()), fsync(fd))[1])
    replace_durably(temporary, path)
    assert there == [False, True]
