"""A group of parts of requests that becomes one message of a partition's log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from betrace.service.otlp.split import BodyPart
from betrace.service.pipeline.request import Refused
from betrace.service.storage.jetstream import envelope
from betrace.service.storage.jetstream.envelope import TenantFrame

FRAME_BYTES = 100
"""Bytes of a frame besides its body, at most."""

Written = Callable[[Refused | None], None]
"""Called once with None when a part is stored, or with the reason why it may not be."""


@dataclass(slots=True)
class _Frame:
    received_ns: int = 0
    spans: int = 0
    bodies: list[memoryview] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class AppendGroup:
    """Parts that become one message."""

    since: float
    frames: dict[str, _Frame] = field(default_factory=dict)
    waiting: list[Written] = field(default_factory=list)
    size: int = 0  # in bytes

    def add(self, tenant: str, received_ns: int, part: BodyPart, written: Written) -> None:
        """Add a part."""
        frame = self.frames.get(tenant)
        if frame is None:
            frame = self.frames[tenant] = _Frame()
            self.size += FRAME_BYTES
        frame.received_ns = max(frame.received_ns, received_ns)
        frame.spans += part.spans
        frame.bodies.append(part.body)
        self.size += len(part.body)
        self.waiting.append(written)

    def pack(self) -> bytes:
        """The message."""
        # Requests that are concatenated are one request: protobuf appends repeated fields.
        frames = [
            TenantFrame(
                tenant,
                frame.received_ns,
                frame.spans,
                frame.bodies[0] if len(frame.bodies) == 1 else b"".join(frame.bodies),
            )
            for tenant, frame in self.frames.items()
        ]
        return envelope.pack(envelope.Spans(frames))

    @property
    def spans(self) -> int:
        """How many spans it has."""
        return sum(frame.spans for frame in self.frames.values())

    def finish(self, refused: Refused | None) -> None:
        """Tell everyone who waits."""
        for written in self.waiting:
            written(refused)
