"""Group commit: parts of requests that are for the same partition are appended together.

Each partition has a group that is being filled. It is sent when it has 256 KiB or is 50 ms old; at
once if nothing of the partition is in flight, as long as few messages are sent. At most two
messages per partition are in flight, which keeps the log busy while the next group fills.

An append whose outcome is unknown is repeated with the same message id
(:meth:`~betrace.service.storage.jetstream.spans.SpanStreams.append`), for a bounded time. Then the
requests are refused although their spans may have been stored. Clients send them again, and spans
that are repeated count once.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.edge.groups import FRAME_BYTES, AppendGroup, Written
from betrace.service.otlp.split import USUAL_BYTES, BodyPart
from betrace.service.pipeline.request import Refused
from betrace.service.storage.jetstream.errors import StreamFull
from betrace.service.storage.jetstream.spans import SpanStreams

_log = logging.getLogger("service.edge")

SEND_BYTES = 256 * 1024  # uncompressed
LINGER_SECONDS = 0.05
MOST_IN_FLIGHT = 2  # messages per partition
APPEND_SECONDS = 8.0  # exporters give up after 10 s
STALL_SECONDS = 3.0
"""A partition whose oldest append has taken this long gets no further spans until it is done."""
INLINE_BYTES = 128 * 1024  # packed on Trio's thread, in about 0.15 ms

# Messages that are sent before their group is full or old, because nothing is in flight. A message
# costs about as much CPU time as ten spans.
_EAGER_PER_SECOND = 100
_EAGER_BURST = 100

REFUSE_SECONDS = 1.0
"""After a refused append, a partition gets no spans for this long: a request that would be refused
by one partition should not be stored by the others."""

NO_QUORUM = (
    "the cluster's log does not acknowledge spans now (no quorum, or no connection); some of this "
    "request's spans may have been stored: send all of them again later, they count once"
)
FULL = (
    "a partition of the cluster's log is full; send the spans again later (operators: raise "
    "cluster.partition_bytes, or find out why evaluators are behind)"
)
FAILED = "the spans could not be appended to the cluster's log; send them again later"
BUSY = "too many spans wait for the cluster's log; send them again later"


@dataclass(slots=True)
class CommitCounts:
    """What was appended to the log."""

    messages: int = 0
    spans: int = 0
    bytes: int = 0
    """Size of the messages, compressed."""
    no_quorum: int = 0
    """Messages without acknowledgement in time."""
    full: int = 0
    """Messages that a full stream refused."""
    failed: int = 0
    """Messages that could not be sent for another reason."""
    eager: int = 0
    """Messages sent at once, because nothing of the partition was in flight."""


class _Partition:
    """The groups of one partition."""

    __slots__ = (
        "changed",
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
        self.changed = trio.Event()
        self.refused: Refused | None = None  # of the last append
        self.refused_until = -math.inf
        self.spans = 0  # acknowledged

    def refusal(self, now: float) -> Refused | None:
        """Why no more parts are taken now."""
        if now < self.refused_until:
            return self.refused
        oldest = next(iter(self.in_flight.values()), math.inf)
        return Refused(503, NO_QUORUM) if now - oldest >= STALL_SECONDS else None


class _Eagerness:
    """Bounds how many messages are sent eagerly (a token bucket)."""

    def __init__(self) -> None:
        self._left = float(_EAGER_BURST)
        self._at = -math.inf

    def admits(self, now: float) -> bool:
        self._left = min(_EAGER_BURST, self._left + (now - self._at) * _EAGER_PER_SECOND)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class GroupCommit:
    """Appends parts to the partitions' logs.

    A group has at most ``most_group_bytes``, and 1 MiB if it has several parts; at most
    ``most_bytes`` are buffered in all partitions together. Everything belongs to Trio's thread.
    """

    def __init__(
        self,
        streams: SpanStreams,
        partitions: int,
        threads: ThreadRunner,
        most_group_bytes: int,
        most_bytes: int,
    ) -> None:
        self._streams = streams
        self._threads = threads
        self._most_group: Final = most_group_bytes
        self._join_bytes: Final = min(most_group_bytes, USUAL_BYTES)
        self._most_bytes: Final = most_bytes
        self._partitions = [_Partition(number) for number in range(partitions)]
        self._nursery: trio.Nursery | None = None
        self._eager = _Eagerness()
        self._id: Final = uuid.uuid4().hex
        self._sent = 0
        self._empty = trio.Event()
        self._empty.set()
        self.buffered_bytes = 0
        """Bytes of parts that wait or are in flight, uncompressed."""
        self.counts = CommitCounts()

    @property
    def in_flight(self) -> int:
        """Messages in flight."""
        return sum(len(partition.in_flight) for partition in self._partitions)

    @property
    def partition_spans(self) -> list[int]:
        """Spans acknowledged by each partition."""
        return [partition.spans for partition in self._partitions]

    @property
    def most_part_bytes(self) -> int:
        """The largest part that fits into a group."""
        return self._most_group - FRAME_BYTES

    def unavailable(self) -> list[int]:
        """The partitions that take no spans now."""
        now = trio.current_time()
        return [each.number for each in self._partitions if each.refusal(now) is not None]

    def has_room(self, parts: Sequence[BodyPart]) -> bool:
        """Whether these parts can be buffered."""
        return self.buffered_bytes + sum(len(part.body) for part in parts) <= self._most_bytes

    def refusal(self, partition: int) -> Refused | None:
        """Why a partition takes no spans now."""
        return self._partition(partition).refusal(trio.current_time())

    def add(self, tenant: str, received_ns: int, part: BodyPart, written: Written) -> None:
        """Take a part; ``written`` is called when it is stored, or may not be."""
        partition = self._partition(part.partition)
        group = partition.filling
        if group is not None and group.size + len(part.body) + FRAME_BYTES > self._join_bytes:
            partition.full.append(group)
            group = None
        if group is None:
            group = partition.filling = AppendGroup(trio.current_time())
        before = group.size
        group.add(tenant, received_ns, part, written)
        if not self.buffered_bytes:
            self._empty = trio.Event()
        self.buffered_bytes += group.size - before
        partition.changed.set()

    async def drained(self) -> None:
        """Return when nothing is buffered."""
        await self._empty.wait()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send groups until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for partition in self._partitions:
                nursery.start_soon(self._serve, partition, nursery)
            task_status.started()

    def _partition(self, number: int) -> _Partition:
        """The partition with this number; partitions are added when the cluster is resized."""
        while number >= len(self._partitions):
            added = _Partition(len(self._partitions))
            self._partitions.append(added)
            if self._nursery is not None:
                self._nursery.start_soon(self._serve, added, self._nursery)
        return self._partitions[number]

    async def _serve(self, partition: _Partition, nursery: trio.Nursery) -> None:
        while True:
            partition.changed = trio.Event()
            group = self._next(partition)
            if group is not None:
                partition.in_flight[group] = trio.current_time()
                nursery.start_soon(self._send, partition, group)
                continue
            filling = partition.filling
            waits = filling is not None and len(partition.in_flight) < MOST_IN_FLIGHT
            deadline = filling.since + LINGER_SECONDS if filling and waits else math.inf
            with trio.move_on_at(deadline):
                await partition.changed.wait()

    def _next(self, partition: _Partition) -> AppendGroup | None:
        """The group that is to be sent now."""
        if len(partition.in_flight) >= MOST_IN_FLIGHT:
            return None
        if partition.full:
            return partition.full.popleft()
        group = partition.filling
        if group is None:
            return None
        now = trio.current_time()
        if group.size < SEND_BYTES and now < group.since + LINGER_SECONDS:
            if partition.in_flight or not self._eager.admits(now):
                return None
            self.counts.eager += 1
        partition.filling = None
        return group

    async def _send(self, partition: _Partition, group: AppendGroup) -> None:
        refused: Refused | None = Refused(503, FAILED)
        try:
            refused = await self._append(partition.number, group)
            if refused is not None:
                self._refuse_waiting(partition, refused)
        except Exception:
            self.counts.failed += 1
            _log.exception("spans cannot be appended to partition %d", partition.number)
        finally:
            del partition.in_flight[group]
            self._finish(group, refused)
            partition.changed.set()

    def _finish(self, group: AppendGroup, refused: Refused | None) -> None:
        self.buffered_bytes -= group.size
        group.finish(refused)
        if not self.buffered_bytes:
            self._empty.set()

    def _refuse_waiting(self, partition: _Partition, refused: Refused) -> None:
        """Refuse what waits for a partition that does not take it, and what comes in the next
        moment."""
        partition.refused = refused
        partition.refused_until = trio.current_time() + REFUSE_SECONDS
        waiting, partition.full = [*partition.full], deque()
        if partition.filling is not None:
            waiting.append(partition.filling)
            partition.filling = None
        for group in waiting:
            self._finish(group, refused)

    async def _append(self, partition: int, group: AppendGroup) -> Refused | None:
        if group.size <= INLINE_BYTES:
            data = group.pack()
        else:
            data = await self._threads.run(group.pack)
        self._sent += 1
        try:
            with trio.move_on_after(APPEND_SECONDS) as scope:
                await self._streams.append(partition, data, f"{self._id}-{self._sent}")
        except StreamFull:
            self.counts.full += 1
            return Refused(503, FULL)
        if scope.cancelled_caught:
            self.counts.no_quorum += 1
            return Refused(503, NO_QUORUM)
        self.counts.messages += 1
        self.counts.bytes += len(data)
        self.counts.spans += group.spans
        self._partitions[partition].spans += group.spans
        return None
