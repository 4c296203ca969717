"""What a new owner does between its fence and its first message: it loads a checkpoint that agrees
with the log, and learns what the output has beyond it. It loads the newest checkpoint while it
waits for the lease, because any checkpoint will do.

A checkpoint contradicts the log if its anchor, the last message that it covers, is missing or
another message: the log has lost its tail. So do outputs about messages that the log lost;
the successor forgets these, because their sequences now belong to other messages.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from betrace.channels import ThreadRunner, TransientError
from betrace.service.cluster import output
from betrace.service.cluster.evaluator import checkpoints
from betrace.service.cluster.evaluator.state import Anchor, PartitionState
from betrace.service.cluster.evaluator.status import PartitionStatus
from betrace.service.cluster.output import Output, OutputCorrupt
from betrace.service.storage.jetstream.blobs import BlobCorrupt, BlobMissing, Blobs
from betrace.service.storage.jetstream.envelope import Tick, pack
from betrace.service.storage.jetstream.errors import LogGap, StreamFull
from betrace.service.storage.jetstream.fenced import Epoch, FencedLog
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.telemetry import events

_log = logging.getLogger("service.cluster.takeover")

_READ_BYTES = 4 << 20
_READ_SECONDS = 5.0
_RETRY_SECONDS = 0.25
_DOUBTED = 1000  # the last outputs, which are compared with the log before they are noted

PREPARE_SECONDS = 0.15
"""How often a successor looks for a newer checkpoint."""

_UNUSABLE = (BlobMissing, BlobCorrupt, ValueError)  # what restoring a checkpoint raises

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A partition that is ready for the messages after ``state.received``."""

    state: PartitionState
    noted_step: int
    """The last step of which the output has results."""

    end: int
    """The last message of the log at that time. The partition is current once it is applied."""


@dataclass(frozen=True, slots=True)
class _Restored:
    """A state that was made from a checkpoint, and not changed since."""

    name: str
    state: PartitionState
    anchor: Anchor
    after: int
    """The output's sequence that it needs."""
    size: int


@dataclass(eq=False)
class Takeover:
    """One takeover of a partition. While NATS is unavailable, it waits.

    ``new_state`` makes an empty state; a state that a checkpoint has changed cannot be used again.
    ``first_state`` makes the one that the partition begins with.
    """

    status: PartitionStatus
    spans: SpanStreams
    blobs: Blobs
    threads: ThreadRunner
    new_state: Callable[[], PartitionState]
    first_state: Callable[[], Awaitable[PartitionState]]
    _prepared: _Restored | None = field(default=None, init=False)
    _confirmed: bool = field(default=False, init=False)

    async def prepare(self, limit: trio.CapacityLimiter) -> None:
        """Load the newest checkpoint, and each newer one that is saved, until cancelled."""
        unusable = ""
        while True:
            names = await self._names()
            known = unusable if self._prepared is None else self._prepared.name
            if names and names[0] != known:
                async with limit:
                    try:
                        self._prepared = await self._restore(names[0])
                    except _UNUSABLE as error:  # reported if it is still the newest at the end
                        _log.debug("the checkpoint %s cannot be prepared: %s", names[0], error)
                        self._prepared, unusable = None, names[0]
            await trio.sleep(PREPARE_SECONDS)

    async def run(self, log: FencedLog, owner: str) -> tuple[Epoch, TakenOver]:
        """Open an epoch for ``owner``; returns the partition as the epoch begins."""
        names: list[str] = []

        async def list_names() -> None:
            names.extend(await self._names())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(list_names)
            epoch = await log.open(owner)
        self.status.epoch = epoch.number
        self.status.takeovers += 1
        for name in names:
            try:
                found = self._prepared
                self._prepared = None
                if found is None or found.name != name:
                    found = await self._restore(name)
            except _UNUSABLE as error:
                self._unusable(name, str(error))
                continue
            taken = await self._complete(found, log, epoch)
            if taken is not None:
                self.status.checkpoint_at = trio.current_time()
                self.status.checkpoint_sequence = found.anchor.sequence
                self.status.checkpoint_bytes = found.size
                return epoch, taken
            self._unusable(name, "the log has lost messages that it covers")
            await _persist(partial(self.blobs.delete, name))
        first = _Restored("", await self.first_state(), Anchor(0, 0, ""), 0, 0)
        taken = await self._complete(first, log, epoch)
        assert taken is not None
        return epoch, taken

    async def _names(self) -> list[str]:
        partition = self.status.partition
        return await _persist(lambda: checkpoints.newest_first(self.blobs, partition))

    async def _restore(self, name: str) -> _Restored:
        data = await _persist(partial(self.blobs.get, name))
        state = self.new_state()
        anchor, after = await self.threads.run(state.restore, data)
        return _Restored(name, state, anchor, after, len(data))

    async def _complete(self, found: _Restored, log: FencedLog, epoch: Epoch) -> TakenOver | None:
        """Note what the output has beyond a checkpoint; None if the checkpoint contradicts the
        log."""
        partition, anchor = self.status.partition, found.anchor
        agrees, end = False, 0

        async def check_anchor() -> None:
            nonlocal agrees
            agrees = await self._has(anchor.sequence, anchor.time_ns, anchor)

        async def find_end() -> None:
            nonlocal end
            end = await _persist(lambda: self.spans.last(partition))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(check_anchor)
            nursery.start_soon(find_end)
            step, lost = await self._note_outputs(found.state, log, found.after, epoch.sequence)
        if not agrees:
            return None
        if lost:
            self._gap(f"{lost} outputs are about messages that the log has lost")
        return TakenOver(found.state, step, end)

    def _unusable(self, name: str, reason: str) -> None:
        self.status.unusable_checkpoints += 1
        events.CHECKPOINT_UNUSABLE(name=name, reason=reason)

    async def _has(self, sequence: int, time_ns: int, anchor: Anchor | None = None) -> bool:
        """Whether the log has this message, or had it before it was deleted because of its age."""
        if sequence == 0 or await self._look(sequence, time_ns, anchor):
            return True
        if not self._confirmed:
            await self._confirm()
        return await self._look(sequence, time_ns, anchor)

    async def _confirm(self) -> None:
        """Append a tick, and wait until it can be read. A server that is cut off from the others
        may answer with an earlier state of the log, but it cannot append."""
        partition = self.status.partition
        try:
            message_id = f"{partition}-confirm-{self.status.epoch}"
            end = await self.spans.append(partition, pack(Tick()), message_id)
        except StreamFull:
            return
        while await _persist(lambda: self.spans.last(partition)) < end:  # noqa: ASYNC110
            await trio.sleep(_RETRY_SECONDS)
        self._confirmed = True

    async def _look(self, sequence: int, time_ns: int, anchor: Anchor | None) -> bool:
        partition = self.status.partition
        found = await _persist(lambda: self.spans.get(partition, sequence))
        if found is None:
            return sequence < await _persist(lambda: self.spans.first(partition))
        return found.time_ns == time_ns and (anchor is None or Anchor.of(found) == anchor)

    async def _note_outputs(
        self, state: PartitionState, log: FencedLog, after: int, upto: int
    ) -> tuple[int, int]:
        """Note the outputs after a sequence and up to another, except those about messages that the
        log has lost; returns the last step of the others, and how many have been left out."""
        step = 0
        doubted: deque[tuple[Output, int]] = deque()
        while after < upto:
            try:
                messages = await _persist(
                    lambda: log.read(after, upto, _READ_BYTES, _READ_SECONDS)  # noqa: B023
                )
            except LogGap as gap:
                self._gap(f"{gap}")
                after = gap.found - 1
                continue
            for message in messages:
                after = message.sequence
                if not message.data:
                    continue
                try:
                    found = await self.threads.run(output.unpack, message.data)
                except OutputCorrupt as error:
                    self._gap(f"output {message.sequence}: {error}")
                    continue
                while doubted and doubted[-1][0].upto > found.upto:
                    doubted.pop()  # its owner had more of the log than the later one
                doubted.append((found, message.sequence))
            while len(doubted) > _DOUBTED:
                found, sequence = doubted.popleft()
                step = found.step
                await self.threads.run(state.note, found, sequence)
        lost = 0
        while doubted and not await self._agrees(doubted[-1][0]):
            lost += 1
            doubted.pop()
        for found, sequence in doubted:
            step = found.step
            await self.threads.run(state.note, found, sequence)
        return step, lost

    async def _agrees(self, found: Output) -> bool:
        """Whether the log has the messages of an output. Its time is that of its last message, or
        of the next one if that made traces close."""
        if await self._look(found.upto, found.time_ns, None):
            return True
        return await self._has(found.upto + 1, found.time_ns) or await self._look(
            found.upto, found.time_ns, None
        )

    def _gap(self, what: str) -> None:
        self.status.gaps += 1
        events.PARTITION_LOG_DAMAGED(partition=self.status.partition, what=what)


async def _persist(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until NATS is available."""
    while True:
        try:
            return await call()
        except TransientError as error:
            _log.debug("taking a partition over waits for NATS: %s", error)
            await trio.sleep(_RETRY_SECONDS)
