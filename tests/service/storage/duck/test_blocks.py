"""The blocks of a DuckDB file are checked without DuckDB."""

from __future__ import annotations

import duckdb
import pytest

from betrace.service.storage.duck.blocks import checked_blocks


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.duckdb"
    with duckdb.connect(str(path)) as db:
        db.execute("CREATE TABLE t AS SELECT i, hash(i) AS h FROM range(200000) r(i)")
        db.execute("CHECKPOINT")
        db.execute("DELETE FROM t WHERE i % 3 = 0")
        db.execute("INSERT INTO t SELECT i, i FROM range(100000) r(i)")
        db.execute("CHECKPOINT")
    return path


def test_a_file_of_duckdb_is_right(path):
    blocks = list(checked_blocks(path))
    assert len(blocks) > 4
    assert all(right for *_, right in blocks)
    assert sum(size for _, size, _ in blocks) == path.stat().st_size - 3 * 4096


def test_each_changed_block_is_found(path):
    data = bytearray(path.read_bytes())
    blocks = list(checked_blocks(path))
    for offset, size, _ in blocks:
        for at in (offset, offset + size // 2, offset + size - 1):
            data[at] ^= 1
            path.write_bytes(data)
            data[at] ^= 1
            assert [at for at, _, right in checked_blocks(path) if not right] == [offset]


def test_a_file_of_another_format_is_not_checked(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[4096] ^= 1  # one of the two headers may be being written
    path.write_bytes(data)
    assert len(list(checked_blocks(path))) > 4
    data[8192] ^= 1
    path.write_bytes(data)
    assert not list(checked_blocks(path))
    other = tmp_path / "other"
    for content in (b"", b"x" * 5000, b"x" * 500_000):
        other.write_bytes(content)
        assert not list(checked_blocks(other))
