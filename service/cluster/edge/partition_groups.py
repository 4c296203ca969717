"""The groups of a partition: when they are sent, and when no more spans are taken."""

from __future__ import annotations

import math
from collections import deque

import trio

from betrace.service.cluster.edge.groups import AppendGroup
from betrace.service.pipeline.request import Refused

SEND_BYTES = 256 * 1024  # uncompressed
LINGER_SECONDS = 0.05
MOST_IN_FLIGHT = 2  # messages per partition
STALL_SECONDS = 3.0
"""A partition whose oldest append has taken this long gets no further spans until it is done."""

# Groups are sent before they are full or old, because nothing is in flight, only while few
# messages are sent: a message costs as much CPU time as a hundred spans.
EAGER_PER_SECOND = 100
EAGER_BURST = 100

NO_QUORUM = (
    "the cluster's log does not acknowledge spans now (no quorum, or no connection); some of this "
    "request's spans may have been stored: send all of them again later, they count once"
)


class PartitionGroups:
    """The groups of one partition, on Trio's thread."""

    __slots__ = (
        "filling",
        "full",
        "in_flight",
        "number",
        "refused",
        "refused_until",
        "spans",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.filling: AppendGroup | None = None
        self.full: deque[AppendGroup] = deque()
        self.in_flight: dict[AppendGroup, float] = {}  # since when
        self.refused: Refused | None = None  # of the last append
        self.refused_until = -math.inf
        self.spans = 0  # acknowledged

    def refusal(self, now: float) -> Refused | None:
        """Why no more parts are taken now."""
        if now < self.refused_until:
            return self.refused
        oldest = next(iter(self.in_flight.values()), math.inf)
        return Refused(503, NO_QUORUM) if now - oldest >= STALL_SECONDS else None

    @property
    def is_free(self) -> bool:
        """Whether one more message may be in flight."""
        return len(self.in_flight) < MOST_IN_FLIGHT

    def is_due(self, now: float) -> bool:
        """Whether a group is full or old enough."""
        if self.full:
            return True
        group = self.filling
        return group is not None and (group.size >= SEND_BYTES or now >= due_at(group))

    def take(self) -> AppendGroup | None:
        """The next group, which is in flight from now on."""
        group = self.full.popleft() if self.full else self.filling
        if group is self.filling:
            self.filling = None
        if group is not None:
            self.in_flight[group] = trio.current_time()
        return group


def due_at(group: AppendGroup) -> float:
    """When a group is sent at the latest, unless too much is in flight."""
    return group.since + LINGER_SECONDS


class Eagerness:
    """Tells whether few messages are sent (a token bucket, which may be overdrawn)."""

    def __init__(self) -> None:
        self._left = float(EAGER_BURST)
        self._at = -math.inf

    def admits(self, now: float) -> bool:
        """Whether a message may be sent early."""
        self._left = min(EAGER_BURST, self._left + (now - self._at) * EAGER_PER_SECOND)
        self._at = now
        return self._left >= 1

    def sent(self, messages: int) -> None:
        """Note messages, sent early or not."""
        self._left = max(-EAGER_BURST, self._left - messages)
