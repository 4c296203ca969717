"""The local span log as a partition log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from betrace.service.storage.spanlog.frames import FRAME_HEADER_BYTES, Frame, unpack_position
from betrace.service.storage.spanlog.log import SpanLog
from tests.support.partition_log_conformance import PartitionLogConformance


class _LocalHarness:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.log = self._open()

    def _open(self) -> SpanLog:
        return SpanLog(self._directory, segment_bytes=4096)

    def append(self, tenant: str, frame: Frame) -> int:
        return self.log.append(tenant, [frame])[0]

    def append_damaged(self, tenant: str, frame: Frame) -> int:
        position = self.append(tenant, frame)
        number, offset = unpack_position(position)
        (path,) = (s.path for s in self.log.segments(tenant) if s.number == number)
        with path.open("r+b") as file:
            file.seek(offset + FRAME_HEADER_BYTES + len(frame.payload) // 2)
            file.write(b"\xff")
        return position

    def forget(self, tenant: str, position: int) -> None:
        self.append(tenant, Frame("protobuf", "", 1, bytes(4096), 1))  # in a segment of its own
        self.log.release(tenant, [unpack_position(position)[0]])

    def beyond(self, tenant: str) -> int:
        return self.log.end(tenant)

    def interrupt(self) -> None:
        self.log.close()
        self.log = self._open()

    def close(self) -> None:
        self.log.close()


class TestSpanLog(PartitionLogConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[_LocalHarness]:
        harness = _LocalHarness(tmp_path)
        yield harness
        harness.close()
