"""Decoding frames of the span log: from request bodies as they came to rows of spans."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from betrace.service.otlp.body import BadBody, protobuf_body
from betrace.service.otlp.columns import SpanBatch
from betrace.service.otlp.encoding import Body, BodyTooLarge
from betrace.service.otlp.wire import scan_bodies
from betrace.service.storage.spanlog.frames import Frame

_log = logging.getLogger("service.recovery")

_LARGEST_BODY = 1 << 30
_UNREADABLE = b"\xff"  # invalid protobuf: the scanner reports an error for it


def read_frames(
    tenant: str, positions: list[int], frames: list[Frame], max_body_bytes: int
) -> SpanBatch:
    """The spans of frames, which lie at ``positions`` of the tenant's log.

    A frame that cannot be decoded becomes a body with an error.
    """
    batch = scan_bodies(tenant, frame_bodies(tenant, frames, max_body_bytes))
    batch.positions = np.array(positions, np.int64)
    batch.received_ns = max(frame.received_ns for frame in frames)
    return batch


def frame_bodies(tenant: str, frames: Sequence[Frame], max_body_bytes: int) -> list[Body | bytes]:
    """The bodies of frames as protobuf; invalid protobuf in place of one that cannot be decoded.

    The frames were accepted, perhaps under a larger limit than ``max_body_bytes``, so the limit
    here is at least 1 GiB.
    """
    bodies: list[Body | bytes] = []
    limit = max(max_body_bytes, _LARGEST_BODY)
    for frame in frames:
        try:
            payload = bytes(frame.payload)
            bodies.append(protobuf_body(payload, frame.content_type, frame.encoding, limit))
        except (BadBody, BodyTooLarge) as error:
            _log.error("a frame in the log of %s cannot be decoded: %s", tenant, error)
            bodies.append(_UNREADABLE)
    return bodies
