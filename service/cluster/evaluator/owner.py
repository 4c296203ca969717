"""One partition's life at an evaluator: lease, fence, takeover, work, and hand-over.

The lease only keeps evaluators out of each other's way. Safety comes from the fence: once the
successor has appended its epoch to the output, every append by the former owner fails, and it drops
the partition (docs/decisions/0036-leases-and-fences.md).

A planned move pauses the partition briefly: a checkpoint is saved while work goes on, the successor
loads it, then reading stops, what was decided is stored, and the lease is released. The successor
replays what was applied after the checkpoint. A task that is cancelled cleans nothing up, like a
process that is killed.
"""

from __future__ import annotations

import logging
from functools import partial

import trio

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.inheritance import inherited
from betrace.service.cluster.evaluator.output_writer import OutputWriter
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.cluster.evaluator.status import PartitionStatus, Phase
from betrace.service.cluster.evaluator.takeover import PREPARE_SECONDS, TakenOver, Takeover
from betrace.service.cluster.evaluator.work import PartitionWork
from betrace.service.cluster.lease_keys import lease_key
from betrace.service.storage.jetstream.fenced import Fenced
from betrace.service.storage.jetstream.process_leases import HeldLease
from betrace.service.telemetry import events

_log = logging.getLogger("service.cluster.owner")

SUCCESSOR_SECONDS = 2 * PREPARE_SECONDS
"""After the checkpoint of a planned move is saved, work goes on for this long, while the successor
loads it."""

_ACQUIRE_SECONDS = 0.02  # between looks at the leases that are known, which are no requests


class PartitionOwner:
    """Owns a partition, from waiting for its lease to losing it. Use once."""

    def __init__(self, partition: int, parts: OwnerParts, status: PartitionStatus) -> None:
        self.partition = partition
        self.status = status
        self._parts = parts
        self._finishing = trio.Event()
        self._lost = False
        self._work: PartitionWork | None = None

    def finish(self) -> None:
        """Hand the partition over: finish what is in work, save a checkpoint, release the lease."""
        self._finishing.set()

    @property
    def state(self) -> PartitionState | None:
        """The partition's state, None before it is loaded."""
        return None if self._work is None else self._work.state

    async def run(self) -> None:
        """Own the partition until it is handed over, lost or fenced. Raises what went wrong."""
        parts = self._parts
        new_state = partial(parts.new_state, self.partition)
        first = partial(inherited, parts, self.partition)
        takeover = Takeover(self.status, parts.spans, parts.blobs, parts.threads, new_state, first)
        lease: HeldLease | None = None
        try:
            await self._until_it_may_begin()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(takeover.prepare, parts.takeovers)
                lease = await self._acquire()
                nursery.cancel_scope.cancel()
            if lease is not None:
                self.status.owner = parts.node
                await self._own_with(lease, takeover)
        finally:
            if lease is not None:
                parts.leases.drop(lease)
            self._work = None
            self.status.phase = Phase.WAITING

    async def _own_with(self, lease: HeldLease, takeover: Takeover) -> None:
        fenced = False
        try:
            await self._own(lease, takeover)
        except* Fenced:
            fenced = True
            self.status.fenced += 1
            events.PARTITION_FENCED(partition=self.partition, epoch=self.status.epoch)
        except* Exception:
            await self._release(lease)
            raise
        await self._release(lease)
        if self._finishing.is_set() and not fenced:
            events.PARTITION_HANDED_OVER(partition=self.partition, applied=self.status.applied)

    async def _until_it_may_begin(self) -> None:
        """Wait until the partition that this one continues is finished."""
        partitions = self._parts.partitions
        while not partitions.may_begin(self.partition) and not self._finishing.is_set():
            changed = partitions.changed
            with trio.move_on_after(self._parts.settings.heartbeat_seconds):
                await changed.wait()

    async def _acquire(self) -> HeldLease | None:
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

    async def _release(self, lease: HeldLease) -> None:
        with trio.move_on_after(self._parts.settings.lease_seconds):
            try:
                await self._parts.leases.release(lease)
            except TransientError as error:
                _log.debug("partition %d: the lease is released later: %s", self.partition, error)

    async def _own(self, lease: HeldLease, takeover: Takeover) -> None:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_when_lost, lease)
            async with self._parts.takeovers:
                taken, writer = await self._take_over(takeover)
            self.status.phase = Phase.REPLAYING
            work = self._work = PartitionWork(self._parts, self.status, taken, writer, began)
            if self._lost:
                work.stop()
            nursery.start_soon(self._finish_when_asked, work)
            await work.run()
            nursery.cancel_scope.cancel()

    async def _take_over(self, takeover: Takeover) -> tuple[TakenOver, OutputWriter]:
        self.status.phase = Phase.TAKING_OVER
        log = self._parts.outputs(self.partition)
        epoch, taken = await takeover.run(log, self._parts.node)
        return taken, OutputWriter(log, self._parts.threads, epoch.sequence)

    async def _stop_when_lost(self, lease: HeldLease) -> None:
        """Stop once another process has the lease; the fence decides who may still append."""
        await lease.lost.wait()
        events.LEASE_LOST(partition=self.partition)
        self._lost = True
        if self._work is not None:
            self._work.stop()

    async def _finish_when_asked(self, work: PartitionWork) -> None:
        await self._finishing.wait()
        async with self._parts.handovers:
            self.status.phase = Phase.HANDING_OVER
            with trio.move_on_after(self._parts.settings.lease_seconds * 2):
                await work.save()
        await trio.sleep(SUCCESSOR_SECONDS)
        work.stop()
