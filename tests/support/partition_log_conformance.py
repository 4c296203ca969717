"""Tests that every partition log must pass. A test module subclasses
:class:`PartitionLogConformance` with a fixture ``harness``."""

from __future__ import annotations

import threading
from typing import Protocol

from betrace.service.storage.partition_log import PartitionLog
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing
from betrace.service.storage.spanlog.frames import Frame

TENANTS = ("shop", "other")


class LogHarness(Protocol):
    """A log, and the faults it can have."""

    log: PartitionLog

    def append(self, tenant: str, frame: Frame) -> int:
        """Append and return the position."""
        ...

    def append_damaged(self, tenant: str, frame: Frame) -> int:
        """Append a frame whose bytes are then damaged."""
        ...

    def forget(self, tenant: str, position: int) -> None:
        """Delete what is at ``position``, and perhaps what is before it."""
        ...

    def beyond(self, tenant: str) -> int:
        """A position where nothing is yet."""
        ...

    def interrupt(self) -> None:
        """Let the log be unreachable for a moment, or reopen it."""
        ...


def frame(number: int, size: int = 100) -> Frame:
    payload = (b"%d." % number * size)[:size]
    return Frame("protobuf", "", 1_790_000_000_000_000_000 + number, payload, number)


class PartitionLogConformance:
    def test_frames_come_back_in_the_order_of_the_positions(self, harness: LogHarness) -> None:
        frames = [frame(k) for k in range(40)]
        positions = [harness.append("shop", each) for each in frames]
        assert positions == sorted(set(positions))
        assert all(0 < position < 2**63 for position in positions)
        assert harness.log.read_many("shop", positions) == frames
        assert harness.log.read_many("shop", positions[::-1]) == frames[::-1]
        twice = [positions[3], positions[1], positions[3]]
        assert harness.log.read_many("shop", twice) == [frames[3], frames[1], frames[3]]
        assert harness.log.read_many("shop", []) == []

    def test_large_and_empty_frames(self, harness: LogHarness) -> None:
        frames = [frame(1, 2 << 20), frame(2, 0), frame(3, 1)]
        positions = [harness.append("shop", each) for each in frames]
        assert harness.log.read_many("shop", positions) == frames

    def test_what_is_not_there_is_missing(self, harness: LogHarness) -> None:
        first = harness.append("shop", frame(1))
        found = harness.log.read_many("shop", [harness.beyond("shop"), first])
        assert isinstance(found[0], FrameMissing | FrameCorrupt)
        assert found[1] == frame(1)
        assert isinstance(harness.log.read_many("nobody", [first])[0], FrameMissing)

    def test_a_tenant_does_not_see_frames_of_others(self, harness: LogHarness) -> None:
        first = harness.append("shop", frame(1))
        second = harness.append("other", frame(2))
        for tenant, own, mine, foreign in (
            ("shop", first, frame(1), second),
            ("other", second, frame(2), first),
        ):
            found = harness.log.read_many(tenant, [own, foreign])
            assert found[0] == mine
            # In a log of its own, each tenant has a frame at the same position.
            assert found[1] == mine or isinstance(found[1], FrameMissing | FrameCorrupt)

    def test_a_damaged_frame_is_reported_and_the_others_are_read(self, harness: LogHarness) -> None:
        before = harness.append("shop", frame(1))
        damaged = harness.append_damaged("shop", frame(2))
        after = harness.append("shop", frame(3))
        found = harness.log.read_many("shop", [before, damaged, after])
        assert (found[0], found[2]) == (frame(1), frame(3))
        assert isinstance(found[1], FrameCorrupt)

    def test_a_deleted_frame_is_missing(self, harness: LogHarness) -> None:
        first = harness.append("shop", frame(1))
        second = harness.append("shop", frame(2))
        harness.forget("shop", first)
        kept = harness.append("shop", frame(3))
        found = harness.log.read_many("shop", [first, kept])
        assert isinstance(found[0], FrameMissing)
        assert found[1] == frame(3)
        assert second < kept

    def test_positions_survive_an_interruption(self, harness: LogHarness) -> None:
        first = harness.append("shop", frame(1))
        harness.interrupt()
        assert harness.log.read_many("shop", [first]) == [frame(1)]
        assert harness.append("shop", frame(2)) > first

    def test_readers_in_many_threads(self, harness: LogHarness) -> None:
        frames = [frame(k) for k in range(20)]
        positions = [harness.append("shop", each) for each in frames]
        wrong: list[object] = []

        def read(start: int) -> None:
            for _ in range(5):
                found = harness.log.read_many("shop", positions[start:])
                if found != frames[start:]:
                    wrong.append(found)

        threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
