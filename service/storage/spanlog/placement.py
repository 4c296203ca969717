"""Where the next frames of a tenant's log go: decisions only, nothing is written here."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

from betrace.service.storage.disk import Buffer
from betrace.service.storage.spanlog.errors import LogWriteError
from betrace.service.storage.spanlog.frames import (
    FILE_HEADER_BYTES,
    MAX_SEGMENT,
    Frame,
    file_header,
    frame_header,
    pack_position,
)
from betrace.service.storage.spanlog.gaps import DAY_NS, LATE_NS


@dataclass(slots=True)
class SegmentWrite:
    """What one append writes to one segment."""

    number: int
    day: int
    path: Path
    salt: bytes
    start: int  # the previous end of the segment
    end: int
    new: bool
    buffers: list[Buffer] = field(default_factory=list)


class Placement:
    """The end of a tenant's log. Guarded by the lock of the log.

    ``directory`` is the tenant's log directory; the first segment has the number after ``floor``. A
    segment takes at most ``segment_bytes``, or one larger frame.
    """

    def __init__(self, tenant: str, directory: Path, segment_bytes: int, floor: int) -> None:
        self._tenant = tenant
        self._directory = directory
        self._segment_bytes = segment_bytes
        self.current: SegmentWrite | None = None
        """The segment that takes the next frame; None if that begins a segment."""
        self.last = floor
        """The highest segment number used."""

    def has_capacity(self, size: int) -> bool:
        """Whether ``size`` bytes fit in the current segment."""
        part = self.current
        return part is not None and part.end + size <= self._segment_bytes

    def continue_at(self, number: int, day: int, path: Path, salt: bytes, end: int) -> None:
        """Place the next frame at ``end`` of this segment."""
        self.current = SegmentWrite(number, day, path, salt, end, end, False)

    def plan(self, frames: Sequence[Frame]) -> tuple[list[SegmentWrite], list[int]]:
        """Decide which frames go where: what to write to each segment, and their positions."""
        parts: list[SegmentWrite] = []
        positions = []
        part = self.current
        if part is not None:
            part = SegmentWrite(
                part.number, part.day, part.path, part.salt, part.end, part.end, False
            )
            parts.append(part)
        for frame in frames:
            size = frame.stored_bytes
            if part is None or self._rolls(part, frame.received_ns, size):
                part = self._begin(frame.received_ns // DAY_NS)
                parts.append(part)
            position = pack_position(part.number, part.end)
            part.buffers.append(frame_header(frame, part.salt, position))
            if len(frame.payload):
                part.buffers.append(frame.payload)
            part.end += size
            positions.append(position)
        return [part for part in parts if part.buffers], positions

    def _rolls(self, part: SegmentWrite, received_ns: int, size: int) -> bool:
        early = received_ns - part.day * DAY_NS
        return not (-LATE_NS <= early < DAY_NS) or (
            part.end > FILE_HEADER_BYTES and part.end + size > self._segment_bytes
        )

    def _begin(self, day: int) -> SegmentWrite:
        if self.last >= MAX_SEGMENT:
            raise LogWriteError(
                errno.EFBIG,
                f"the span log of tenant {self._tenant} has no segment numbers left: delete the "
                "tenant, or use another one",
            )
        self.last += 1
        salt = os.urandom(8)
        directory = self._directory / (date(1970, 1, 1) + timedelta(days=day)).isoformat()
        while os.path.lexists(path := directory / f"{self.last:08d}.seg"):
            self.last += 1  # a stray file has the name
        return SegmentWrite(
            self.last,
            day,
            path,
            salt,
            0,
            FILE_HEADER_BYTES,
            True,
            [file_header(self._tenant, day, self.last, salt)],
        )
