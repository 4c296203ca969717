"""The state of a partition, step by step."""

from __future__ import annotations

import pytest

from tests.support.partition_world import Owner, PartitionWorld
from tests.support.spans import S

pytestmark = pytest.mark.kernel


def test_a_trace_is_decided_when_it_was_idle_in_log_time():
    world = PartitionWorld()
    world.rules("t", "count(a) == 2")
    world.spans({"t": [S(1), S(2)]})
    owner = Owner(world)
    owner.apply()
    assert not world.closed
    world.quiet(1.5)
    owner.apply()
    assert not world.closed
    world.quiet(1)
    owner.apply()
    assert [each[2] for each in world.closed] == [2]
    assert owner.state.counts.evaluated == owner.state.applied == len(world.log)
