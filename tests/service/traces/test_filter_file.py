"""The filter of closed traces survives a restart as a file."""

from __future__ import annotations

import numpy as np
import pytest

from betrace.service.traces.filter_file import SavedFilter, read_filter, write_filter
from betrace.service.traces.late_filter import ClosedTraces


@pytest.fixture
def closed():
    closed = ClosedTraces(1 << 12)
    assert not closed.added
    closed.add("t", np.arange(20).reshape(10, 2))
    assert closed.added
    return closed


def words(closed: ClosedTraces) -> int:
    return int(closed.filters.shape[1])


def test_what_is_saved_is_restored(tmp_path, closed):
    path = tmp_path / "late-filter"
    write_filter(path, SavedFilter.of(closed, 5))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["late-filter"]
    found = read_filter(path, words(closed))
    assert found is not None
    assert found.taken_ns == 5
    restored = ClosedTraces(1 << 12)
    restored.restore(found.about, found.bits)
    assert all(restored.may_hold("t", 2 * n, 2 * n + 1) for n in range(10))
    assert not restored.may_hold("u", 0, 1)
    restored.add("t", np.array([[100, 100]]))  # it can be changed
    assert restored.saved() == closed.saved() | {"count": 11}


def test_a_copy_does_not_follow_the_filter(closed):
    saved = SavedFilter.of(closed, 5)
    before = saved.bits.copy()
    closed.add("t", np.arange(100, 200).reshape(50, 2))
    assert np.array_equal(saved.bits, before)


def test_a_damaged_file_or_one_of_another_size_is_not_used(tmp_path, closed):
    path = tmp_path / "late-filter"
    assert read_filter(path, words(closed)) is None
    write_filter(path, SavedFilter.of(closed, 5))
    assert read_filter(path, 2 * words(closed)) is None
    data = path.read_bytes()
    for at in range(0, len(data), 61):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert read_filter(path, words(closed)) is None
    for length in (0, 10, len(data) - 1):
        path.write_bytes(data[:length])
        assert read_filter(path, words(closed)) is None
