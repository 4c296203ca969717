"""The evaluator role: owns its share of the partitions.

Every evaluator computes the same assignment from the members and the present owners of leases. It
waits for the leases of what it should own, and hands over what another should own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import trio

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.assignment import assign
from betrace.service.cluster.evaluator.owner import PartitionOwner
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.cluster.evaluator.status import PartitionStatus
from betrace.service.cluster.lease_keys import owners_by_partition
from betrace.service.cluster.membership import Membership
from betrace.service.cluster.query.open_traces import NOT_OWNED, NotOwned
from betrace.service.telemetry import events
from betrace.service.traces.due import DueTraces

_log = logging.getLogger("service.cluster.evaluator")

ROLE = "evaluator"
_FIRST_BACKOFF, _MOST_BACKOFF = 0.5, 30.0
_STEADY_SECONDS = 60.0  # after which a failure counts as the first


@dataclass(slots=True)
class _RunningOwner:
    owner: PartitionOwner
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Evaluator:
    """Runs the owners of partitions. The caller closes what it passed in, after :meth:`run`.

    Args:
      parts: what the partitions use.
      membership: this node's heartbeats; the caller runs it.
      grace_seconds: how long :meth:`stop` may take.
    """

    def __init__(self, parts: OwnerParts, membership: Membership, grace_seconds: float) -> None:
        self._parts = parts
        self._membership = membership
        self._grace = grace_seconds
        self._running: dict[int, _RunningOwner] = {}
        self._backoff: dict[int, tuple[float, float]] = {}  # seconds, and until when
        self._stopping = trio.Event()
        self._changed = trio.Event()  # an owner ended
        self.statuses: list[PartitionStatus] = []
        """The state of each partition at this node, former ones included, by number."""
        self._add_statuses()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own partitions until :meth:`stop`. Starts once the members are known. A task that is
        cancelled drops everything, like a process that is killed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._parts.rules.run)
            nursery.start_soon(self._parts.leases.run)
            await self._membership.ready.wait()
            await self._parts.leases.ready.wait()
            task_status.started()
            nursery.start_soon(self._renew_often)
            nursery.start_soon(self._assign_often, nursery)
            await self._stopping.wait()
            with trio.move_on_after(self._grace):
                await self._hand_over_all()
                await self._leave()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Hand over all partitions, then end :meth:`run`."""
        self._membership.draining = True
        self._stopping.set()

    @property
    def owned(self) -> list[int]:
        """The partitions whose leases this node has."""
        return [status.partition for status in self.statuses if status.owned]

    def look_up(self, partition: int, tenant: str, trace_id: str) -> DueTraces | NotOwned | None:
        """A copy of a trace in memory, for people. May be called from any thread."""
        running = self._running.get(partition)
        state = None if running is None else running.owner.state
        return NOT_OWNED if state is None else state.look_up(tenant, trace_id)

    async def _hand_over_all(self) -> None:
        await self._membership.beat()
        while self._running:
            for running in self._running.values():
                running.owner.finish()
            await self._next_change()

    async def _next_change(self) -> None:
        with trio.move_on_after(self._parts.settings.heartbeat_seconds):
            await self._changed.wait()

    async def _renew_often(self) -> None:
        """Keep the leases of all partitions."""
        seconds = self._parts.settings.heartbeat_seconds
        while True:
            try:
                with trio.move_on_after(seconds):
                    await self._parts.leases.renew()
            except TransientError as error:
                _log.debug("the leases are not renewed: %s", error)
            await trio.sleep(seconds)

    async def _leave(self) -> None:
        try:
            await self._parts.leases.leave()
        except TransientError as error:
            _log.debug("what shows that this process is alive is not removed: %s", error)

    async def _assign_often(self, nursery: trio.Nursery) -> None:
        """Follow the assignment. Draining nodes get nothing, so a stop starts no owner either."""
        leases = self._parts.leases
        while True:
            changed, resized = self._membership.changed, self._parts.partitions.changed
            self._add_statuses()
            self._follow(owners_by_partition(leases.owners()), nursery)
            async with trio.open_nursery() as waiting:
                waiting.cancel_scope.deadline = (
                    trio.current_time() + self._parts.settings.heartbeat_seconds
                )
                for event in (changed, resized, self._changed):
                    waiting.start_soon(_cancel_when, event, waiting.cancel_scope)

    def _add_statuses(self) -> None:
        total = self._parts.partitions.generations.total
        self.statuses += map(PartitionStatus, range(len(self.statuses), total))

    @property
    def active_statuses(self) -> list[PartitionStatus]:
        """The state of the partitions that need an owner, for metrics."""
        return [
            self.statuses[partition]
            for partition in self._parts.partitions.active()
            if partition < len(self.statuses)
        ]

    def _follow(self, owners: dict[int, str], nursery: trio.Nursery) -> None:
        """Start and end owners as the assignment demands."""
        members = self._membership.alive(ROLE)
        able = [name for name, member in members.items() if not member.draining]
        if self._membership.draining:  # known here before the heartbeat is
            able = [name for name in able if name != self._parts.node]
        assigned = self._assigned(able, owners)
        for status in self.statuses:
            partition = status.partition
            status.owner = owners.get(partition, "")
            running = self._running.get(partition)
            if assigned.get(partition) == self._parts.node:
                if running is None and self._may_start(partition):
                    self._start(status, nursery)
            elif running is not None and partition in assigned:
                running.owner.finish()
            elif running is not None and not status.owned:
                running.scope.cancel()

    def _assigned(self, able: list[str], owners: dict[int, str]) -> dict[int, str]:
        """The owner that each partition should have. Generations are balanced by themselves, and
        with their finished partitions, so none moves because another one is finished."""
        found: dict[int, str] = {}
        for partitions, active in self._parts.partitions.by_generation():
            if active:
                assigned = assign(partitions, able, owners)
                found |= {each: assigned[each] for each in active if each in assigned}
        return found

    def _may_start(self, partition: int) -> bool:
        _, until = self._backoff.get(partition, (0.0, 0.0))
        return trio.current_time() >= until

    def _start(self, status: PartitionStatus, nursery: trio.Nursery) -> None:
        running = _RunningOwner(PartitionOwner(status.partition, self._parts, status))
        self._running[status.partition] = running
        nursery.start_soon(self._own, status, running)

    async def _own(self, status: PartitionStatus, running: _RunningOwner) -> None:
        began, fenced = trio.current_time(), status.fenced
        try:
            with running.scope:
                await running.owner.run()
            if status.fenced > fenced:  # another one may not see the leases
                until = trio.current_time() + self._parts.settings.lease_seconds
                self._backoff[status.partition] = 0.0, until
        except* Exception as errors:
            status.failures += 1
            before, _ = self._backoff.get(status.partition, (0.0, 0.0))
            if trio.current_time() - began > _STEADY_SECONDS:
                before = 0.0
            seconds = min(max(2 * before, _FIRST_BACKOFF), _MOST_BACKOFF)
            self._backoff[status.partition] = seconds, trio.current_time() + seconds
            events.PARTITION_FAILED(
                partition=status.partition, error=_first(errors), seconds=seconds
            )
            _log.debug("partition %d failed", status.partition, exc_info=errors)
        finally:
            del self._running[status.partition]
            self._changed.set()
            self._changed = trio.Event()


def _first(group: BaseExceptionGroup[BaseException]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
