"""What readers of frames need of a span log: the local one, or the replicated one of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing
from betrace.service.storage.spanlog.frames import Frame


class PartitionLog(Protocol):
    """:class:`betrace.service.storage.spanlog.log.SpanLog`, a log with one partition, or
    :class:`betrace.service.storage.jetstream.spans.SpanStreams`."""

    def read_many(
        self, tenant: str, positions: Sequence[int]
    ) -> list[Frame | FrameMissing | FrameCorrupt]:
        """The frames of ``tenant`` at ``positions``, in the same order; in place of a frame that
        cannot be read, the error. Blocks; may be called from several threads. Raises a
        :exc:`betrace.channels.TransientError` if the log cannot be reached now."""
        ...
