"""Group commit: parts of requests that are for the same partition are appended together.

Each partition has a group that is being filled. It is sent when it has 256 KiB or is 50 ms old; at
once if nothing of the partition is in flight, as long as few messages are sent. At most two
messages per partition are in flight, which keeps the log busy while the next group fills. When a
group is sent, those of all other partitions are sent too: a request usually has spans for many
partitions, and messages that are sent together cost less.

An append whose outcome is unknown is repeated with the same message id
(:meth:`~betrace.service.storage.jetstream.spans.SpanStreams.append_each`), for a bounded time. Then
the requests are refused although their spans may have been stored. Clients send them again, and
spans that are repeated count once.
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
from outcome import Error, Outcome

from betrace.channels import ThreadRunner
from betrace.service.cluster.edge.groups import FRAME_BYTES, AppendGroup, Written
from betrace.service.cluster.edge.partition_groups import (
    NO_QUORUM,
    Eagerness,
    PartitionGroups,
    due_at,
)
from betrace.service.otlp.split import USUAL_BYTES, BodyPart
from betrace.service.pipeline.request import Refused
from betrace.service.storage.jetstream.errors import StreamFull
from betrace.service.storage.jetstream.spans import Append, SpanStreams

_log = logging.getLogger("service.edge")

APPEND_SECONDS = 8.0  # exporters give up after 10 s
INLINE_BYTES = 128 * 1024  # packed on Trio's thread, in about 0.15 ms

REFUSE_SECONDS = 1.0
"""After a refused append, a partition gets no spans for this long: a request that would be refused
by one partition should not be stored by the others."""

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
        self._partitions = [PartitionGroups(number) for number in range(partitions)]
        self._eager = Eagerness()
        self._id: Final = uuid.uuid4().hex
        self._sent = 0
        self._changed = trio.Event()
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
        self._changed.set()

    async def drained(self) -> None:
        """Return when nothing is buffered."""
        await self._empty.wait()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send groups until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._changed = trio.Event()
                groups = self._take(trio.current_time())
                if groups:
                    nursery.start_soon(self._send, groups)
                    await trio.lowlevel.checkpoint()
                    continue
                with trio.move_on_at(self._next_due()):
                    await self._changed.wait()

    def _partition(self, number: int) -> PartitionGroups:
        """The partition with this number; partitions are added when the cluster is resized."""
        while number >= len(self._partitions):
            self._partitions.append(PartitionGroups(len(self._partitions)))
        return self._partitions[number]

    def _take(self, now: float) -> list[tuple[PartitionGroups, AppendGroup]]:
        """The groups that are sent now, one for each partition that has one: if one of them is due,
        or the partition of one is idle."""
        free = [each for each in self._partitions if (each.filling or each.full) and each.is_free]
        if not any(each.is_due(now) for each in free):
            if all(each.in_flight for each in free) or not self._eager.admits(now):
                return []
            self.counts.eager += len(free)
        self._eager.sent(len(free))
        return [(each, group) for each in free if (group := each.take())]

    def _next_due(self) -> float:
        """When the next group is old enough."""
        waiting = (each for each in self._partitions if each.filling and each.is_free)
        return min((due_at(each.filling) for each in waiting if each.filling), default=math.inf)

    async def _send(self, groups: list[tuple[PartitionGroups, AppendGroup]]) -> None:
        unanswered = dict(enumerate(groups))
        sizes: list[int] = []

        def done(number: int, result: Outcome[int]) -> None:
            partition, group = unanswered.pop(number)
            refused = self._refused(partition, result)
            if refused is None:
                self._count(partition, group, sizes[number])
            else:
                self._refuse_waiting(partition, refused)
            self._end(partition, group, refused)

        failed = False
        try:
            messages = await self._pack([group for _, group in groups])
            sizes += map(len, messages)
            appends = [
                Append(partition.number, message, self._next_id())
                for (partition, _), message in zip(groups, messages, strict=True)
            ]
            with trio.move_on_after(APPEND_SECONDS):
                await self._streams.append_each(appends, done)
        except Exception:
            failed = True
            _log.exception("spans cannot be appended")
        finally:
            for partition, group in unanswered.values():
                if failed or not sizes:
                    self.counts.failed += 1
                    self._end(partition, group, Refused(503, FAILED))
                else:
                    self.counts.no_quorum += 1
                    self._refuse_waiting(partition, Refused(503, NO_QUORUM))
                    self._end(partition, group, Refused(503, NO_QUORUM))

    async def _pack(self, groups: list[AppendGroup]) -> list[bytes]:
        if sum(group.size for group in groups) <= INLINE_BYTES:
            return [group.pack() for group in groups]
        return await self._threads.run(lambda: [group.pack() for group in groups])

    def _next_id(self) -> str:
        self._sent += 1
        return f"{self._id}-{self._sent}"

    def _refused(self, partition: PartitionGroups, result: Outcome[int]) -> Refused | None:
        """What the outcome of an append means for its requests; None if it is stored."""
        if not isinstance(result, Error):
            return None
        if isinstance(result.error, StreamFull):
            self.counts.full += 1
            return Refused(503, FULL)
        self.counts.failed += 1
        _log.error(
            "spans cannot be appended to partition %d", partition.number, exc_info=result.error
        )
        return Refused(503, FAILED)

    def _count(self, partition: PartitionGroups, group: AppendGroup, size: int) -> None:
        spans = group.spans
        self.counts.messages += 1
        self.counts.bytes += size
        self.counts.spans += spans
        partition.spans += spans

    def _end(self, partition: PartitionGroups, group: AppendGroup, refused: Refused | None) -> None:
        del partition.in_flight[group]
        self._finish(group, refused)
        self._changed.set()

    def _finish(self, group: AppendGroup, refused: Refused | None) -> None:
        self.buffered_bytes -= group.size
        group.finish(refused)
        if not self.buffered_bytes:
            self._empty.set()

    def _refuse_waiting(self, partition: PartitionGroups, refused: Refused) -> None:
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
