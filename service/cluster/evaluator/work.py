"""What an owner does with a partition that it has taken over: it reads, applies, appends ticks and
markers of rules, and saves checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import trio

from betrace.channels import TransientError
from betrace.service.cluster.evaluator import checkpoints
from betrace.service.cluster.evaluator.housekeeping import keep_house
from betrace.service.cluster.evaluator.inheritance import save_final
from betrace.service.cluster.evaluator.output_writer import OutputWriter
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.cluster.evaluator.rule_markers import MarkerAppends
from betrace.service.cluster.evaluator.status import PartitionStatus, Phase
from betrace.service.cluster.evaluator.stragglers import forward_stragglers
from betrace.service.cluster.evaluator.takeover import TakenOver
from betrace.service.cluster.output import Output
from betrace.service.cluster.rounds import next_round
from betrace.service.pipeline.open_traces import NotNow
from betrace.service.storage.jetstream.envelope import Seal, Tick, pack
from betrace.service.storage.jetstream.errors import JetStreamError, LogGap
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.telemetry import events

_log = logging.getLogger("service.cluster.owner")

READ_BYTES = 1 << 20  # compressed; about 50 ms of work, which a planned move waits for
RESULT_SECONDS = 0.03
"""A partition that has been quiet for this long and has messages that are not applied, because
their group has not ended, gets a tick, which ends it."""

GATHER_SECONDS = 0.1
"""While small messages keep coming, all partitions are read this often, at the same moment:
reading and applying one message costs about as much as several."""

SEAL_SECONDS = 0.25
_RETRY_SECONDS = 0.5
_LAG_SECONDS = 2.0
_MOST_TICK_SECONDS = 5.0
_MOST_SAVING = 0.1  # of the time


class LostTail(Exception):  # noqa: N818
    """The log ends before what was applied: it lost messages that it had acknowledged."""


class PartitionWork:
    """The work on one partition in one epoch.

    Args:
      parts: what the partitions share.
      status: of the partition; it is kept up to date.
      taken: what was taken over.
      writer: appends to the output.
      began: `trio.current_time` at which the takeover began.
    """

    def __init__(
        self,
        parts: OwnerParts,
        status: PartitionStatus,
        taken: TakenOver,
        writer: OutputWriter,
        began: float,
    ) -> None:
        self.partition = status.partition
        self.status = status
        self.state = taken.state
        self._parts = parts
        self._writer = writer
        writer.first_step = taken.noted_step
        self._began = began
        self._restored = taken.state.applied
        self._end = taken.end
        self._scope = trio.CancelScope()
        self._state_lock = trio.Lock()  # the state is applied to or copied
        self._quiet = trio.Event()
        self._current = trio.Event()
        self._markers = MarkerAppends(parts, status, taken.state, self._append)
        self._skipped = -1  # the last message of a gap
        self._read_to = 0, -math.inf  # the end of the log, and when it was read
        self._read_ns = 0  # when the last message that was applied was appended
        self._ticks = 0

    async def run(self) -> None:
        """Work until :meth:`stop`; what was decided is stored then. Raises :exc:`Fenced` when
        another owner has taken over, and :exc:`LostTail`."""
        self._note_progress()
        async with trio.open_nursery() as nursery:
            for task in (
                self._writer.run,
                self._report,
                self._measure_lag,
                self._tick,
                self._mark_rules,
                self._save_often,
                self._keep_house,
                self._seal,
                self._forward,
            ):
                nursery.start_soon(task)
            await self._follow()
            await self._writer.settled()
            if self.state.sealed:
                await save_final(self._parts, self.state, self._writer.sequence)
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Read no more, and end :meth:`run` once what was decided is stored."""
        self._scope.cancel()

    async def _follow(self) -> None:
        """Read and apply until reading is stopped."""
        if self.state.sealed:
            return
        send, receive = trio.open_memory_channel[list[LogMessage]](1)
        with self._scope:
            if self.state.empty:
                self.state.begin(await self._markers.first())
                self._note_progress()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, send)
                async for messages in receive:
                    await self._apply(messages)
                    if self.state.sealed:
                        self.stop()

    async def _read(self, send: trio.MemorySendChannel[list[LogMessage]]) -> None:
        after, quiet_since = self.state.received, trio.current_time()
        read_at = -math.inf  # when messages came last
        while True:
            wait = self._parts.settings.tick_seconds
            if self.state.applied < after and self.state.waiting is None:
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
                few = _few(messages)
                if few:
                    self._read_to = after, trio.current_time()
                if few and trio.current_time() - read_at < 2 * GATHER_SECONDS:
                    await next_round(GATHER_SECONDS)
                read_at = trio.current_time()
            elif self._needs_tick(after, quiet_since):
                self._quiet.set()

    def _needs_tick(self, read: int, quiet_since: float) -> bool:
        """Whether a tick would change something: it ends a group, or lets time pass."""
        state = self.state
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
            if self.state.waiting is None:
                return
            messages = ()
            await trio.sleep(_RETRY_SECONDS)

    def _apply_now(self, messages: Sequence[LogMessage]) -> Output | None:
        if self._writer.step:
            self.state.stored(self._writer.step, self._writer.sequence)
        if messages and self._skipped == messages[0].sequence - 1:
            self.state.received = self._skipped
        return self.state.apply(messages)

    def _note_progress(self) -> None:
        status, state = self.status, self.state
        if status.waiting != state.waiting and state.waiting is not None:
            events.PARTITION_WAITS(partition=self.partition, reason=state.waiting)
        status.waiting = state.waiting
        status.applied = state.applied
        status.stored = max(status.stored, self._writer.upto)
        status.log_time_ns = state.log_time_ns
        if state.received >= self._end:
            self._current.set()

    async def _report(self) -> None:
        """Report the takeover once everything that was in the log is applied."""
        await self._current.wait()
        if self.status.phase is Phase.REPLAYING:
            self.status.phase = Phase.CURRENT
        self.status.takeover_seconds = seconds = trio.current_time() - self._began
        events.PARTITION_TAKEN_OVER(
            partition=self.partition,
            epoch=self.status.epoch,
            seconds=seconds,
            messages=max(0, self._end - self._restored),
        )

    async def _measure_lag(self) -> None:
        status = self.status
        while True:
            received = self.state.received
            try:
                last = await self._last(received)
            except TransientError:
                last = received
            if last < received:
                await self._check_end(received)
                continue
            status.lag_messages = max(0, last - self.state.received)
            status.lag_seconds = 0.0
            if status.lag_messages and self._read_ns:
                status.lag_seconds = max(0.0, (time.time_ns() - self._read_ns) / 1e9)
            await next_round(_LAG_SECONDS)

    async def _last(self, received: int) -> int:
        """The last message of the log; without a request if the reader was there just now."""
        read, at = self._read_to
        if read >= received and trio.current_time() - at < _LAG_SECONDS:
            return read
        return await self._parts.spans.last(self.partition)

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
        await self._markers.run()

    async def _seal(self) -> None:
        """Seal the log once spans go to another generation. Edges hear of it at about the same
        time, and what they append before the seal need not be forwarded."""
        partitions = self._parts.partitions
        while not partitions.generations.is_retired(self.partition):
            await partitions.changed.wait()
        await trio.sleep(SEAL_SECONDS)
        while not await self._append(pack(Seal()), "seal"):  # noqa: ASYNC110
            await trio.sleep(_RETRY_SECONDS)

    async def _forward(self) -> None:
        await forward_stragglers(self._parts, self.partition)

    async def _append(self, data: bytes, message_id: str) -> bool:
        name = f"{self.partition}-{message_id}"
        try:
            await self._parts.spans.append(self.partition, data, name)
        except TransientError as error:  # such as StreamFull
            _log.debug("%s was not appended: %s", name, error)
            return False
        return True

    # Checkpoints

    async def _save_often(self) -> None:
        """Save checkpoints, less often if that takes long."""
        seconds = self._parts.checkpoint_seconds
        while True:
            await trio.sleep(seconds)
            began = trio.current_time()
            await self.save()
            took = trio.current_time() - began
            seconds = max(self._parts.checkpoint_seconds, took / _MOST_SAVING)

    async def save(self) -> None:
        """Save a checkpoint, if there is something new. It covers only what the output has."""
        async with self._state_lock:
            applied, step = self.state.applied, self.state.step
            if applied == self.status.checkpoint_sequence or step < self._writer.first_step:
                return
            try:
                data = await self._parts.threads.run(self.state.snapshot, self._writer.sequence)
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

    async def _keep_house(self) -> None:
        await keep_house(self._parts, self.partition, lambda: self._read_ns)


def _few(messages: Sequence[LogMessage]) -> bool:
    """Whether these are all that there were."""
    return sum(len(message.data) for message in messages) < READ_BYTES // 4
