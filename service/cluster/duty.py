"""A duty: work that one node of a cluster does at a time, such as sending exports.

A lease says who has the duty (:mod:`betrace.service.storage.jetstream.leases`). It keeps two nodes
from doing the same work, but a node that was frozen for a moment may still finish what it had
begun. So work under a duty must do no harm if a small part of it is done twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import trio

from betrace.channels import TransientError
from betrace.service.cluster.lease_keys import duty_key
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.leases import Lease, Leases
from betrace.service.telemetry import events

_log = logging.getLogger("service.cluster.duty")


@dataclass(frozen=True, slots=True)
class DutyTimes:
    """A successor takes a duty over ``lease_seconds`` after the last renewal that it saw; the
    holder renews it, and others check whether it is free, every ``renew_seconds``."""

    lease_seconds: float
    renew_seconds: float


class Duty:
    """The duty ``name``, for the process of ``node``. :meth:`run` takes it whenever it is free.
    Call the methods on the Trio thread."""

    def __init__(
        self,
        bucket: ConfigBucket,
        name: str,
        node: str,
        times: DutyTimes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._node = node
        self._times = times
        self._clock = clock
        self._leases = Leases(bucket, times.lease_seconds, clock)
        self._until = -1.0
        self._held = trio.Event()
        self._lost = trio.Event()
        self._stop = trio.Event()
        self._ended = trio.Event()
        self._running = False

    @property
    def held(self) -> bool:
        """Whether this process has the duty. False also if the lease could not be renewed for so
        long that another process may have it."""
        return self._held.is_set() and self._clock() < self._until

    async def wait_held(self) -> None:
        """Wait until this process has the duty."""
        while not self.held:
            await self._held.wait()
            if not self.held:  # it has expired, and :meth:`run` notices that in a moment
                await self._lost.wait()

    async def perform(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` while this process has the duty. It is cancelled when the duty is lost, and
        called again when this process has it again. Returns when ``work`` does."""
        done = False
        while not done:
            await self.wait_held()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_after, self._lost, nursery.cancel_scope)
                await work()
                done = True
                nursery.cancel_scope.cancel()

    def doubt(self) -> None:
        """Stop the work and check who has the duty, because another process did some of it."""
        self._lose()

    async def run(self) -> None:
        """Take the duty whenever it is free, and keep it, until :meth:`stop`."""
        self._running = True
        try:
            while not self._stop.is_set():
                lease = await self._acquire()
                if lease is None:
                    return
                await self._keep(lease)
                if self._stop.is_set():
                    await self._release(lease)
        finally:
            self._lose()
            self._ended.set()

    async def stop(self) -> None:
        """Give the duty up, so that another process need not wait for the lease to expire."""
        self._stop.set()
        self._lose()
        if self._running:
            with trio.move_on_after(2 * self._times.renew_seconds):  # else it expires
                await self._ended.wait()

    async def _acquire(self) -> Lease | None:
        """Wait for the lease; None after :meth:`stop`."""
        while not self._stop.is_set():
            began = self._clock()
            try:
                lease = await self._leases.acquire(duty_key(self.name), self._node)
            except TransientError as error:
                _log.debug("duty %s: %s", self.name, error)
            else:
                if lease is not None:
                    self._until = began + self._times.lease_seconds
                    return lease
            with trio.move_on_after(self._times.renew_seconds):
                await self._stop.wait()
        return None

    async def _keep(self, lease: Lease) -> None:
        """Renew the lease until it is lost or in doubt."""
        events.DUTY_TAKEN(duty=self.name)
        self._lost = trio.Event()
        self._held.set()
        kept = True
        while kept and not self._lost.is_set():
            left = self._until - self._clock()
            with trio.move_on_after(max(0.0, min(self._times.renew_seconds, left))):
                await self._lost.wait()
            if not self._lost.is_set():
                kept = await self._renew(lease)
        self._lose()
        if not kept:
            events.DUTY_LOST(duty=self.name)

    async def _renew(self, lease: Lease) -> bool:
        """Renew the lease once; False if it was lost or has expired."""
        began = self._clock()
        kept = True
        with trio.move_on_after(max(0.0, self._until - began)), suppress(TransientError):
            kept = await self._leases.renew(lease)
            if kept:
                self._until = began + self._times.lease_seconds
        return kept and self._clock() < self._until

    async def _release(self, lease: Lease) -> None:
        with trio.move_on_after(self._times.lease_seconds), suppress(TransientError):
            await self._leases.release(lease)

    def _lose(self) -> None:
        """The work must stop now."""
        if self._held.is_set():
            self._held = trio.Event()
        self._lost.set()


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


class Duties:
    """The duties that the process of ``node`` wants, by name."""

    def __init__(self, bucket: ConfigBucket, node: str, times: DutyTimes) -> None:
        self._bucket = bucket
        self._node = node
        self._times = times
        self._duties: dict[str, Duty] = {}
        self._new = trio.Event()

    def get(self, name: str) -> Duty:
        """The duty ``name``; this process wants it from now on."""
        found = self._duties.get(name)
        if found is None:
            found = self._duties[name] = Duty(self._bucket, name, self._node, self._times)
            self._new.set()
        return found

    def held(self) -> dict[str, bool]:
        """The duties that this process wants, and whether it has them."""
        return {name: duty.held for name, duty in self._duties.items()}

    async def run(self) -> None:
        """Take the duties whenever they are free, until cancelled."""
        running: set[str] = set()
        async with trio.open_nursery() as nursery:
            while True:
                self._new = trio.Event()
                for name, duty in self._duties.items():
                    if name not in running:
                        running.add(name)
                        nursery.start_soon(duty.run)
                await self._new.wait()

    async def stop(self) -> None:
        """Give all duties up, so that other processes need not wait for the leases to expire."""
        async with trio.open_nursery() as nursery:
            for duty in self._duties.values():
                nursery.start_soon(duty.stop)
