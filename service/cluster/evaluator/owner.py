"""One partition's life at an evaluator: lease, fence, takeover, work, and hand-over.

The lease only keeps evaluators out of each other's way. Safety comes from the fence: once the
successor has appended its epoch to the output, every append of the former owner fails, and that
one drops the partition (docs/decisions/0036-leases-and-fences.md).

A planned move pauses the partition briefly: a checkpoint is saved while work goes on, then reading
stops, what was decided is stored, and the lease is released. The successor replays what was
applied after the checkpoint. A task that is cancelled cleans nothing up, like a process that is
killed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from betrace.channels import ThreadRunner, TransientError
from betrace.service.cluster.evaluator import checkpoints
from betrace.service.cluster.evaluator.log_retention import forget_old
from betrace.service.cluster.evaluator.output_writer import OutputWriter
from betrace.service.cluster.evaluator.rule_feed import RuleFeed
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.cluster.evaluator.status import PartitionStatus, Phase
from betrace.service.cluster.evaluator.takeover import TakenOver, Takeover
from betrace.service.cluster.output import Output
from betrace.service.config.cluster import ClusterSettings
from betrace.service.pipeline.open_traces import NotNow
from betrace.service.storage.jetstream.blobs import Blobs
from betrace.service.storage.jetstream.envelope import RulesMarker, Tick, pack
from betrace.service.storage.jetstream.errors import JetStreamError, LogGap
from betrace.service.storage.jetstream.fenced import Fenced, FencedLog
from betrace.service.storage.jetstream.leases import Lease, Leases
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.telemetry import events

_log = logging.getLogger("service.cluster.owner")

READ_BYTES = 1 << 20  # compressed; about 50 ms of work, which a planned move waits for
RESULT_SECONDS = 0.03
"""A partition that has been quiet for this long and has messages that are not applied, because
their group has not ended, gets a tick, which ends it."""

_ACQUIRE_SECONDS = 0.05
_RETRY_SECONDS = 0.5
_LAG_SECONDS = 1.0
_MOST_TICK_SECONDS = 5.0
_FORGET_SECONDS = 3600.0


class LostTail(Exception):  # noqa: N818
    """The log ends before what was applied: it lost messages that it had acknowledged."""


@dataclass(frozen=True, slots=True)
class OwnerParts:
    """What the partitions of an evaluator share."""

    settings: ClusterSettings
    node: str
    spans: SpanStreams
    outputs: Callable[[int], FencedLog]
    leases: Leases
    blobs: Blobs
    rules: RuleFeed
    threads: ThreadRunner
    new_state: Callable[[int], PartitionState]
    """Makes an empty state of a partition."""
    checkpoint_seconds: float
    log_days: int
    """Days to keep the messages of the log; 0 keeps all."""
    takeovers: trio.CapacityLimiter
    """How many partitions are taken over at a time."""
    handovers: trio.CapacityLimiter


class PartitionOwner:
    """Owns a partition, from waiting for its lease to losing it. Use once."""

    def __init__(self, partition: int, parts: OwnerParts, status: PartitionStatus) -> None:
        self.partition = partition
        self.status = status
        self._parts = parts
        self._finishing = trio.Event()
        self._working = trio.CancelScope()
        self._state_lock = trio.Lock()  # the state is applied to or copied
        self._quiet = trio.Event()
        self._current = trio.Event()
        self._state: PartitionState
        self._writer: OutputWriter
        self._end = 0  # of the log at the takeover
        self._sent_rules: dict[str, int] = {}
        self._skipped = -1  # the last message of a gap
        self._read_ns = 0  # when the last message that was applied was appended
        self._ticks = 0

    def finish(self) -> None:
        """Hand the partition over: finish what is in work, save a checkpoint, release the lease."""
        self._finishing.set()

    @property
    def state(self) -> PartitionState | None:
        """The partition's state, None before it is loaded."""
        loaded = self.status.phase not in (Phase.WAITING, Phase.TAKING_OVER)
        return self._state if loaded else None

    async def run(self) -> None:
        """Own the partition until it is handed over, lost or fenced. Raises what went wrong."""
        try:
            lease = await self._acquire()
            if lease is not None:
                self.status.owner = self._parts.node
                await self._own_with(lease)
        finally:
            self.status.phase = Phase.WAITING

    async def _own_with(self, lease: Lease) -> None:
        fenced = False
        try:
            await self._own(lease)
        except* Fenced:
            fenced = True
            self.status.fenced += 1
            events.PARTITION_FENCED(partition=self.partition, epoch=self.status.epoch)
        except* Exception:
            await self._release(lease)
            raise
        if not fenced:
            await self._release(lease)
        if self._finishing.is_set():
            events.PARTITION_HANDED_OVER(partition=self.partition, applied=self.status.applied)

    async def _acquire(self) -> Lease | None:
        """Wait for the lease; None if the partition need not be owned any more."""
        key = lease_key(self.partition)
        while not self._finishing.is_set():
            try:
                lease = await self._parts.leases.acquire(key, self._parts.node)
                if lease is not None:
                    return lease
            except TransientError as error:
                _log.debug("lease %s: %s", key, error)
            with trio.move_on_after(_ACQUIRE_SECONDS):
                await self._finishing.wait()
        return None

    async def _release(self, lease: Lease) -> None:
        with trio.move_on_after(self._parts.settings.lease_seconds):
            try:
                await self._parts.leases.release(lease)
            except TransientError as error:
                _log.debug("partition %d: the lease will expire: %s", self.partition, error)

    async def _own(self, lease: Lease) -> None:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._renew, lease)
            async with self._parts.takeovers:
                taken = await self._take_over()
            self._state, self._end = taken.state, taken.end
            self._writer.first_step = taken.noted_step
            self.status.phase = Phase.REPLAYING
            self._note_progress()
            nursery.start_soon(self._writer.run)
            nursery.start_soon(self._report, began, self._state.applied)
            nursery.start_soon(self._measure_lag)
            nursery.start_soon(self._tick)
            nursery.start_soon(self._mark_rules)
            nursery.start_soon(self._save_often)
            nursery.start_soon(self._forget_often)
            nursery.start_soon(self._finish_when_asked)
            await self._work()
            await self._writer.settled()
            nursery.cancel_scope.cancel()

    async def _take_over(self) -> TakenOver:
        parts, status = self._parts, self.status
        status.phase = Phase.TAKING_OVER
        log = parts.outputs(self.partition)
        epoch = await log.open(parts.node)
        status.epoch = epoch.number
        status.takeovers += 1
        self._writer = OutputWriter(log, parts.threads, epoch.sequence)
        new_state = partial(parts.new_state, self.partition)
        takeover = Takeover(status, parts.spans, parts.blobs, parts.threads, new_state)
        return await takeover.run(log, epoch)

    async def _renew(self, lease: Lease) -> None:
        """Keep the lease. Once another has it, stop; the fence decides who may still append."""
        while True:
            await trio.sleep(self._parts.settings.heartbeat_seconds)
            try:
                kept = await self._parts.leases.renew(lease)
            except TransientError as error:
                _log.debug("partition %d: lease not renewed: %s", self.partition, error)
                continue
            if not kept:
                events.LEASE_LOST(partition=self.partition)
                self._working.cancel()
                return

    # Work

    async def _work(self) -> None:
        """Read and apply until reading is stopped."""
        send, receive = trio.open_memory_channel[list[LogMessage]](1)
        with self._working:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, send)
                async for messages in receive:
                    await self._apply(messages)

    async def _read(self, send: trio.MemorySendChannel[list[LogMessage]]) -> None:
        after, quiet_since = self._state.received, trio.current_time()
        while True:
            wait = self._parts.settings.tick_seconds
            if self._state.applied < after and self._state.waiting is None:
                wait = min(wait, RESULT_SECONDS)
            try:
                messages = await self._parts.spans.read(self.partition, after, READ_BYTES, wait)
            except TransientError as error:
                _log.debug("partition %d cannot be read: %s", self.partition, error)
                await trio.sleep(_RETRY_SECONDS)
                continue
            except LogGap as gap:
                self.status.gaps += 1
                events.PARTITION_LOG_DAMAGED(partition=self.partition, what=str(gap))
                after = self._skipped = gap.found - 1
                continue
            if messages:
                after, quiet_since = messages[-1].sequence, trio.current_time()
                await send.send(messages)
            elif self._needs_tick(after, quiet_since):
                self._quiet.set()

    def _needs_tick(self, read: int, quiet_since: float) -> bool:
        """Whether a tick would change something: it ends a group, or lets time pass."""
        state = self._state
        if state.received < read or state.at_rest:  # busy, or nothing to do
            return False
        quiet = trio.current_time() - quiet_since
        return state.applied < read or quiet >= self._parts.settings.tick_seconds

    async def _apply(self, messages: Sequence[LogMessage]) -> None:
        """Apply messages. While the state waits for the index or the log, try again."""
        while True:
            async with self._state_lock:
                found = await self._parts.threads.run(self._apply_now, messages)
                # No checkpoint before this: what was decided is always passed on.
                if found is not None:
                    self._writer.add(found)
                if messages:
                    self._read_ns = messages[-1].time_ns
                self._note_progress()
            await self._writer.room()
            if self._state.waiting is None:
                return
            messages = ()
            await trio.sleep(_RETRY_SECONDS)

    def _apply_now(self, messages: Sequence[LogMessage]) -> Output | None:
        if self._writer.step:
            self._state.stored(self._writer.step, self._writer.sequence)
        if messages and self._skipped == messages[0].sequence - 1:
            self._state.received = self._skipped
        return self._state.apply(messages)

    def _note_progress(self) -> None:
        status, state = self.status, self._state
        if status.waiting != state.waiting and state.waiting is not None:
            events.PARTITION_WAITS(partition=self.partition, reason=state.waiting)
        status.waiting = state.waiting
        status.applied = state.applied
        status.stored = max(status.stored, self._writer.upto)
        status.log_time_ns = state.log_time_ns
        status.rules_revision = max(state.rules_revisions.values(), default=0)
        if state.received >= self._end:
            self._current.set()

    async def _report(self, began: float, restored: int) -> None:
        """Report the takeover once everything that was in the log is applied."""
        await self._current.wait()
        if self.status.phase is Phase.REPLAYING:
            self.status.phase = Phase.CURRENT
        self.status.takeover_seconds = seconds = trio.current_time() - began
        events.PARTITION_TAKEN_OVER(
            partition=self.partition,
            epoch=self.status.epoch,
            seconds=seconds,
            messages=max(0, self._end - restored),
        )

    async def _measure_lag(self) -> None:
        status = self.status
        while True:
            received = self._state.received
            try:
                last = await self._parts.spans.last(self.partition)
            except TransientError:
                last = received
            if last < received:
                await self._check_end(received)
                continue
            status.lag_messages = max(0, last - self._state.received)
            status.lag_seconds = 0.0
            if status.lag_messages and self._read_ns:
                status.lag_seconds = max(0.0, (time.time_ns() - self._read_ns) / 1e9)
            await trio.sleep(_LAG_SECONDS)

    async def _check_end(self, received: int) -> None:
        """Find out whether the log has lost its tail, by an append: a server that is cut off from
        the others may say that the log is shorter than it is. Raises :exc:`LostTail`."""
        name = f"{self.partition}-end-{self.status.epoch}-{received}"
        try:
            end = await self._parts.spans.append(self.partition, pack(Tick()), name)
        except TransientError:
            await trio.sleep(_LAG_SECONDS)
            return
        if end <= received:
            raise LostTail(
                f"the log of partition {self.partition} ends at {end}, but {received} was read"
            )

    # Messages of the owner

    async def _tick(self) -> None:
        """Append a tick when the partition is quiet, so that its log time advances."""
        await self._current.wait()
        while True:
            await self._quiet.wait()
            self._ticks += 1
            with trio.move_on_after(_MOST_TICK_SECONDS):
                await self._append(pack(Tick()), f"tick-{self.status.epoch}-{self._ticks}")
            self._quiet = trio.Event()  # only now: the tick itself ends the quiet

    async def _mark_rules(self) -> None:
        """Append a marker for rules that the partition does not have yet."""
        await self._current.wait()
        while True:
            changed = self._parts.rules.changed
            known = self._state.rules_revisions | self._sent_rules
            done = True
            for rules in self._parts.rules.newer_than(known):
                marker = RulesMarker(rules.tenant, rules.revision, rules.definitions)
                if await self._append(pack(marker), f"rules-{rules.tenant}-{rules.revision}"):
                    self._sent_rules[rules.tenant] = rules.revision
                else:
                    done = False
            if done:
                await changed.wait()
            else:
                await trio.sleep(_RETRY_SECONDS)

    async def _append(self, data: bytes, message_id: str) -> bool:
        name = f"{self.partition}-{message_id}"
        try:
            await self._parts.spans.append(self.partition, data, name)
        except TransientError as error:  # such as StreamFull
            _log.debug("%s was not appended: %s", name, error)
            return False
        return True

    # Checkpoints and hand-over

    async def _save_often(self) -> None:
        while True:
            await trio.sleep(self._parts.checkpoint_seconds)
            await self._save()

    async def _save(self) -> None:
        """Save a checkpoint, if there is something new. It covers only what the output has."""
        async with self._state_lock:
            applied, step = self._state.applied, self._state.step
            if applied == self.status.checkpoint_sequence or step < self._writer.first_step:
                return
            try:
                data = await self._parts.threads.run(self._state.snapshot, self._writer.sequence)
            except NotNow as error:
                _log.debug("partition %d: no checkpoint now: %s", self.partition, error)
                return
        await self._writer.wait_stored(step)
        blobs, status = self._parts.blobs, self.status
        try:
            await checkpoints.save(blobs, self.partition, applied, status.epoch, data)
        except (TransientError, JetStreamError) as error:
            status.checkpoint_failures += 1
            _log.warning("partition %d: checkpoint not saved: %s", self.partition, error)
            return
        status.checkpoint_at = trio.current_time()
        status.checkpoint_sequence = applied
        status.checkpoint_bytes = len(data)

    async def _forget_often(self) -> None:
        """Delete old messages once an hour."""
        parts, day_ns = self._parts, 86_400 * 1_000_000_000
        while parts.log_days:
            await trio.sleep(_FORGET_SECONDS)
            before = self._read_ns - parts.log_days * day_ns
            try:
                await forget_old(parts.spans, parts.blobs, self.partition, before)
            except TransientError as error:
                _log.debug("partition %d: nothing is deleted now: %s", self.partition, error)

    async def _finish_when_asked(self) -> None:
        await self._finishing.wait()
        async with self._parts.handovers:
            self.status.phase = Phase.HANDING_OVER
            with trio.move_on_after(self._parts.settings.lease_seconds * 2):
                await self._save()
            self._working.cancel()


def lease_key(partition: int) -> str:
    """The key of a partition's lease."""
    return f"partition.{partition}"
