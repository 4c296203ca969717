"""Reads every partition's ``OUT`` stream in order and sends what was decided to storage-write.

From there on everything is as in one process: the signals go to the ledger, signals and traces to
DuckDB.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio

from betrace.channels import SendChannel, ThreadRunner
from betrace.service.cluster import output
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query.applied import (
    AppliedPositions,
    Cursors,
    remove_cursors,
    write_cursors,
)
from betrace.service.cluster.query.recent_output import RecentOutput
from betrace.service.cluster.query.tenant_names import TenantNames
from betrace.service.cluster.rounds import next_round
from betrace.service.pipeline.progress import InFlight
from betrace.service.signals import Signal
from betrace.service.storage.jetstream.errors import LogGap, NatsUnavailable
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.storage.undecided import UndecidedStore, UndecidedTrace
from betrace.service.traces.verdicts import Decided

_log = logging.getLogger("service.query")

READ_BYTES = 4 << 20
FEW = 4  # messages; after more than these, others probably wait
GATHER_SECONDS = 0.1
"""Few messages of all partitions are read at the same moment, this often: then their results are
stored together."""

INLINE_BYTES = 4096  # a message that is decoded on Trio's thread, in about 0.2 ms
WAIT_SECONDS = 5.0
RETRY_SECONDS = 1.0
SAVE_SECONDS = 1.0
PARENT_SECONDS = 0.1
TENANT_SECONDS = 0.05


class OutLog(Protocol):
    """What is read: :class:`betrace.service.storage.jetstream.fenced.FencedLog`, or a list in
    tests."""

    async def read(
        self, after: int, upto: int | None, most_bytes: int, wait_seconds: float
    ) -> list[LogMessage]:
        """The messages after a sequence, in order; none if nothing came in time."""


@dataclass(slots=True)
class PartitionFeed:
    """How far the feed of one partition is."""

    read: int = 0
    """The sequence of the last message sent to the stores."""
    evaluated_to: int = 0
    """The sequence of the last message of ``SPANS_p`` that was evaluated, as that message says."""
    log_time_ns: int = 0
    """The log time of that message."""
    items: int = 0
    """Items sent to the stores since the start."""
    spans: int = 0
    """Spans evaluated since the start, apart from those of the first message that was read; of a
    stream that was read from its beginning, all."""
    counted: int | None = None
    """The partition's count of spans up to which they are in :attr:`spans`."""
    closed: int = 0
    """Closed traces sent to the stores since the start."""
    counts: output.Counts | None = None
    """What became of the partition's messages, as of the last one that was read."""
    problem: str | None = None
    """Why nothing is read now."""
    epoch: int | None = None
    """The number of the owner's epoch; None until it is known."""

    def count(self, spans: int) -> None:
        """Note the partition's count of spans. It may be one from before a rewind."""
        counted = spans if self.counted is None else self.counted
        self.spans += max(0, spans - counted)
        self.counted = max(spans, counted)


@dataclass(frozen=True, slots=True)
class FeedTarget:
    """Where the feed sends what it reads: the channel of storage-write, the tickets of work in
    progress, and the store of what could not be judged. What ``names`` says belongs to deleted
    tenants is dropped."""

    channel: SendChannel[Decided]
    in_flight: InFlight
    undecided: UndecidedStore
    names: TenantNames


@dataclass(eq=False)
class OutFeed:
    """Feeds the stores from all partitions. ``log_of`` returns the output of one; ``file`` is where
    the cursors are saved; ``tenants`` returns the tenants that have a DuckDB file; ``recent`` gets
    the signals for exports and alerts; ``cluster`` is the id of the cluster.

    The output of a partition is read only once that of its parent is applied to its end, because
    the decisions about a trace are applied in their order.
    """

    map: PartitionMap
    log_of: Callable[[int], OutLog]
    positions: AppliedPositions
    target: FeedTarget
    threads: ThreadRunner
    file: Path
    tenants: Callable[[], list[str]]
    recent: RecentOutput
    cluster: str
    partitions: dict[int, PartitionFeed] = field(default_factory=dict, init=False)
    _reading: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _stopped: trio.Event = field(default_factory=trio.Event, init=False)
    _saved: tuple[int, Cursors] | None = field(default=None, init=False)
    _file_lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._add()
        before = self.target.in_flight.left

        def left(ticket: int) -> None:
            before(ticket)
            self.positions.stored(ticket)

        self.target.in_flight.left = left

    async def run(self) -> None:
        """Read until :meth:`stop`."""
        try:
            with self._reading, self.target.channel.clone() as channel:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._save_often)
                    for partition in self.partitions:
                        nursery.start_soon(self._follow, partition, channel)
                    while True:
                        changed = self.map.changed
                        for partition in self._add():
                            nursery.start_soon(self._follow, partition, channel)
                        await changed.wait()
        finally:
            self._stopped.set()

    def _add(self) -> list[int]:
        """Add the partitions that are new in the map."""
        added = [each for each in range(self.map.generations.total) if each not in self.partitions]
        self.partitions |= {partition: PartitionFeed() for partition in added}
        return added

    def is_complete(self, partition: int) -> bool:
        """Whether the partition is finished, and its output applied to the end."""
        finished = self.map.finished.get(partition)
        return finished is not None and self.positions.get(partition) >= finished.output

    async def _until_parent_is_complete(self, partition: int) -> None:
        parent = self.map.generations.parent(partition)
        while parent is not None and not self.is_complete(parent):  # noqa: ASYNC110
            await trio.sleep(PARENT_SECONDS)

    async def stop(self) -> None:
        """Read no more. What was read is on its way to the stores when this returns."""
        self._reading.cancel()
        await self._stopped.wait()

    def rewind(self) -> None:
        """Apply everything again from the first message, because rows were lost. The saved cursors
        are gone when this returns. Blocks; call it in any thread."""
        with self._file_lock:
            self.positions.rewind()
            remove_cursors(self.file)

    async def save(self) -> None:
        """Save the cursors, if they changed."""
        generation = self.positions.generation
        cursors = Cursors(self.positions.all(), frozenset(self.tenants()), self.cluster)
        if (generation, cursors) == self._saved:
            return

        def write() -> None:
            with self._file_lock:
                if generation == self.positions.generation:
                    write_cursors(self.file, cursors)

        try:
            await self.threads.run(write)
        except OSError as error:
            _log.warning("the cursors cannot be saved, so a restart applies more again: %s", error)
        else:
            self._saved = generation, cursors

    async def _save_often(self) -> None:
        while True:
            await trio.sleep(SAVE_SECONDS)
            await self.save()

    async def _follow(self, partition: int, channel: SendChannel[Decided]) -> None:
        """Send the messages of a partition to the stores, in order, forever. What cannot be read is
        tried again: skipping it would lose signals."""
        log, state = self.log_of(partition), self.partitions[partition]
        while True:
            generation = self.positions.generation
            await self._until_parent_is_complete(partition)
            state.read = self.positions.get(partition)
            if not state.read and state.counted is None:
                state.counted = 0
            with suppress(_Rewound):
                while generation == self.positions.generation:
                    if self.is_complete(partition):
                        await trio.sleep(SAVE_SECONDS)
                        continue
                    try:
                        messages = await log.read(state.read, None, READ_BYTES, WAIT_SECONDS)
                        for message in messages:
                            await self._send(partition, message, channel, generation)
                        if 0 < len(messages) <= FEW:
                            await next_round(GATHER_SECONDS)
                    except (NatsUnavailable, LogGap, output.OutputCorrupt) as error:
                        if state.problem is None:
                            _log.warning("OUT of partition %d cannot be read: %s", partition, error)
                        state.problem = str(error)
                        await trio.sleep(RETRY_SECONDS)
                    else:
                        state.problem = None

    async def _send(
        self,
        partition: int,
        message: LogMessage,
        channel: SendChannel[Decided],
        generation: int,
    ) -> None:
        state = self.partitions[partition]
        items: list[Decided] = []
        signals: list[Signal] = []
        if message.data:  # records of epochs have none
            found = await self._unpacked(message.data)
            await self._wait_for_tenants(found, generation)
            if found.undecided:
                await self.threads.run(self._store_undecided, found.undecided)
            items = self.target.names.current(found.decided)
            signals = [signal for item in found.decided for signal in item.signals]
            state.log_time_ns = max(state.log_time_ns, found.log_time_ns)
            state.count(found.counts.spans)
            state.counts, state.evaluated_to = found.counts, found.upto
        else:
            state.epoch = max(state.epoch or 0, message.epoch)
        for item in items:
            item.ticket = self.target.in_flight.enter()
        tickets = [item.ticket for item in items]
        if not self.positions.enter(partition, message.sequence, tickets, generation):
            for ticket in tickets:
                self.target.in_flight.leave(ticket)
            raise _Rewound
        self.recent.add(partition, message.sequence, signals)
        try:
            await channel.send_each(items)
        except trio.Cancelled:  # some of it was not sent, so this message is never applied
            self.positions.abandon(tickets)
            for ticket in tickets:
                self.target.in_flight.leave(ticket)
            raise
        state.read = message.sequence
        state.items += len(items)
        state.closed += sum(len(item.closed) for item in items if item.closed is not None)

    async def _unpacked(self, data: bytes) -> output.Output:
        """The content of a message. What could not be evaluated is logged."""
        if len(data) > INLINE_BYTES:
            found = await self.threads.run(output.unpack, data)
        else:
            found = output.unpack(data)
        for dead in found.dead:
            _log.error(
                "message %d could not be evaluated (tenant %s): %s",
                dead.sequence,
                dead.tenant or "all",
                dead.reason,
            )
        return found

    async def _wait_for_tenants(self, found: output.Output, generation: int) -> None:
        """Wait while a message is about a tenant that was created again, and this node has not
        deleted its former data yet."""
        names = {each.tenant for each in found.decided} | {each.tenant for each in found.undecided}
        while self.target.names.unknown(names):
            await trio.sleep(TENANT_SECONDS)
            if generation != self.positions.generation:
                raise _Rewound

    def _store_undecided(self, undecided: list[output.NotJudged]) -> None:
        """Store what could not be judged. Blocks."""
        by_tenant: dict[str, list[UndecidedTrace]] = {}
        for each in undecided:
            tenant = self.target.names.tenant(each.tenant)
            if tenant is not None:
                by_tenant.setdefault(tenant, []).append(each.trace)
        for tenant, traces in by_tenant.items():
            try:
                self.target.undecided.add(tenant, traces)
            except OSError as error:
                _log.warning("traces that could not be judged are not stored: %s", error)


class _Rewound(Exception):  # noqa: N818
    """The positions were rewound while a message was read."""
