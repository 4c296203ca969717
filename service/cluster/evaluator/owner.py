"""One partition's life at an evaluator: lease, fence, takeover, work, and hand-over.

The lease only keeps evaluators out of each other's way. Safety comes from the fence: once the
successor has appended its epoch to the output, every append by the former owner fails, and it drops
the partition (docs/decisions/0036-leases-and-fences.md).

A planned move pauses the partition briefly: a checkpoint is saved while work goes on, then reading
stops, what was decided is stored, and the lease is released. The successor replays what was
applied after the checkpoint. A task that is cancelled cleans nothing up, like a process that is
killed.
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
from betrace.service.cluster.evaluator.takeover import TakenOver, Takeover
from betrace.service.cluster.evaluator.work import PartitionWork
from betrace.service.cluster.lease_keys import lease_key
from betrace.service.storage.jetstream.fenced import Fenced
from betrace.service.storage.jetstream.leases import Lease
from betrace.service.telemetry import events

_log = logging.getLogger("service.cluster.owner")

_ACQUIRE_SECONDS = 0.05


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
        try:
            lease = await self._acquire()
            if lease is not None:
                self.status.owner = self._parts.node
                await self._own_with(lease)
        finally:
            self._work = None
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
        if fenced:
            return
        await self._release(lease)
        if self._finishing.is_set():
            events.PARTITION_HANDED_OVER(partition=self.partition, applied=self.status.applied)

    async def _acquire(self) -> Lease | None:
        """Wait for the lease; None if the partition need not be owned any more."""
        key = lease_key(self.partition)
        while not self._finishing.is_set():
            try:
                if self._parts.partitions.may_begin(self.partition):
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
                taken, writer = await self._take_over()
            self.status.phase = Phase.REPLAYING
            work = self._work = PartitionWork(self._parts, self.status, taken, writer, began)
            if self._lost:
                work.stop()
            nursery.start_soon(self._finish_when_asked, work)
            await work.run()
            nursery.cancel_scope.cancel()

    async def _take_over(self) -> tuple[TakenOver, OutputWriter]:
        parts, status = self._parts, self.status
        status.phase = Phase.TAKING_OVER
        log = parts.outputs(self.partition)
        epoch = await log.open(parts.node)
        status.epoch = epoch.number
        status.takeovers += 1
        writer = OutputWriter(log, parts.threads, epoch.sequence)
        new_state = partial(parts.new_state, self.partition)
        first = partial(inherited, parts, self.partition)
        takeover = Takeover(status, parts.spans, parts.blobs, parts.threads, new_state, first)
        return await takeover.run(log, epoch), writer

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
                self._lost = True
                if self._work is not None:
                    self._work.stop()
                return

    async def _finish_when_asked(self, work: PartitionWork) -> None:
        await self._finishing.wait()
        async with self._parts.handovers:
            self.status.phase = Phase.HANDING_OVER
            with trio.move_on_after(self._parts.settings.lease_seconds * 2):
                await work.save()
            work.stop()
