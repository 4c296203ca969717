"""How far a partition counts as applied, and what is saved of it."""

from __future__ import annotations

import pytest

from betrace.service.cluster.query.applied import (
    AppliedPositions,
    Cursors,
    read_cursors,
    write_cursors,
)


def test_a_message_is_applied_once_it_and_all_before_it_are_stored():
    positions = AppliedPositions()
    assert positions.enter(3, 10, [1, 2], 0)
    assert positions.enter(3, 11, [3], 0)
    positions.stored(3)
    assert positions.get(3) == 0
    positions.stored(1)
    assert positions.get(3) == 0
    positions.stored(2)
    assert positions.get(3) == 11


def test_an_empty_message_is_applied_at_once_unless_others_wait():
    positions = AppliedPositions([(0, 5)])
    positions.enter(0, 6, [], 0)
    assert positions.all() == {0: 6}
    positions.enter(0, 7, [1], 0)
    positions.enter(0, 8, [], 0)
    assert positions.get(0) == 6
    positions.stored(1)
    assert positions.get(0) == 8


def test_partitions_do_not_wait_for_each_other_and_unknown_tickets_are_ignored():
    positions = AppliedPositions()
    positions.enter(0, 1, [1], 0)
    positions.enter(1, 1, [2], 0)
    positions.stored(2)
    positions.stored(99)
    assert positions.all() == {1: 1}


def test_an_abandoned_message_is_never_applied():
    positions = AppliedPositions([(0, 4)])
    positions.enter(0, 5, [1, 2], 0)
    positions.enter(0, 6, [3], 0)
    positions.abandon([1, 2])
    for ticket in (1, 2, 3):
        positions.stored(ticket)
    assert positions.get(0) == 4


def test_after_a_rewind_messages_of_before_do_not_count():
    positions = AppliedPositions([(0, 9)])
    positions.enter(0, 10, [1], 0)
    positions.rewind()
    assert positions.get(0) == 0
    assert not positions.enter(0, 11, [2], 0)
    positions.stored(1)
    positions.stored(2)
    assert positions.all() == {}
    assert positions.enter(0, 1, [], positions.generation)
    assert positions.get(0) == 1


def test_cursors_are_saved(tmp_path):
    saved = Cursors({0: 7, 15: 2**40}, frozenset({"acme", "default"}))
    write_cursors(tmp_path / "cursors.json", saved)
    assert read_cursors(tmp_path / "cursors.json") == saved


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"format": 2}', b'{"format": 1}'])
def test_without_a_readable_file_everything_is_applied_again(tmp_path, content):
    path = tmp_path / "cursors.json"
    if content is not None:
        path.write_bytes(content)
    assert read_cursors(path) == Cursors({}, frozenset())
