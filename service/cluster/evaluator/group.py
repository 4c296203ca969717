"""Groups of messages of ``SPANS_p`` that are folded together, because folding few spans costs about
as much as folding hundreds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from betrace.service.cluster.output import DeadMessage
from betrace.service.otlp.columns import ERROR, SpanBatch
from betrace.service.otlp.wire import scan_bodies
from betrace.service.storage.jetstream.envelope import (
    Envelope,
    EnvelopeCorrupt,
    Spans,
    TenantFrame,
    unpack,
)
from betrace.service.storage.jetstream.layout import pack_log_position
from betrace.service.storage.jetstream.stream_log import LogMessage

_log = logging.getLogger("service.cluster.group")

FULL_SPANS = 10_000
FULL_BYTES = 8 << 20
"""A group ends after a message with which it has as many spans or bytes."""


def opened(message: LogMessage) -> Envelope | str:
    """The content of a message, or why it cannot be read."""
    try:
        return unpack(message.data)
    except EnvelopeCorrupt as error:
        return str(error)


@dataclass(slots=True)
class MessageGroup:
    """Messages that are received, but not applied yet."""

    messages: list[LogMessage] = field(default_factory=list)
    frames: list[tuple[LogMessage, TenantFrame]] = field(default_factory=list)
    dead: list[DeadMessage] = field(default_factory=list)
    spans: int = 0
    bytes: int = 0
    content: Envelope | str = ""
    """Of the last message."""

    def add(self, message: LogMessage, content: Envelope | str) -> None:
        """Add the next message."""
        self.messages.append(message)
        self.content = content
        if isinstance(content, str):
            _log.error("message %d cannot be read: %s", message.sequence, content)
            self.dead.append(DeadMessage(message.sequence, "", content))
        elif isinstance(content, Spans):
            for frame in content.frames:
                self.frames.append((message, frame))
                self.spans += frame.spans
                self.bytes += len(frame.body)

    @property
    def full(self) -> bool:
        """Whether the group ends because it is large."""
        return self.spans >= FULL_SPANS or self.bytes >= FULL_BYTES

    @property
    def last(self) -> LogMessage:
        """The last message."""
        return self.messages[-1]

    def frames_of(self, tenant: str) -> list[tuple[LogMessage, TenantFrame]]:
        """A tenant's frames, with their messages."""
        return [each for each in self.frames if each[1].tenant == tenant]

    def batches(self, partition: int) -> list[SpanBatch]:
        """The spans of each tenant, in the order of the messages."""
        tenants: dict[str, list[tuple[LogMessage, TenantFrame]]] = {}
        for message, frame in self.frames:
            tenants.setdefault(frame.tenant, []).append((message, frame))
        return [scanned(partition, tenant, frames) for tenant, frames in tenants.items()]


def scanned(partition: int, tenant: str, frames: list[tuple[LogMessage, TenantFrame]]) -> SpanBatch:
    """The spans of a tenant's frames. A body that cannot be decoded has an error and no spans."""
    batch = scan_bodies(tenant, [frame.body for _, frame in frames])
    batch.positions = np.array(
        [pack_log_position(partition, message.sequence) for message, _ in frames], np.int64
    )
    batch.received_ns = max(frame.received_ns for _, frame in frames)
    return batch


def bad_frames(batch: SpanBatch) -> list[int]:
    """The numbers of the frames that could not be decoded."""
    return np.flatnonzero(batch.bodies[:, ERROR]).tolist()
