"""Leases: who works on what, so that two do not do the same work. An optimisation; safety comes
from the fence (:mod:`betrace.service.storage.jetstream.fenced`).

A lease is a key of a bucket whose revision moves at each renewal. Clocks of different machines are
never compared: a successor takes a lease over once its revision has not moved for
``lease_seconds`` on the successor's own monotonic clock.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict, Entry


@dataclass(slots=True)
class Lease:
    """A lease that this process has. :meth:`Leases.renew` moves its revision."""

    key: str
    owner: str
    revision: int


class Leases:
    """The leases in a bucket, for one process. All methods raise :exc:`NatsUnavailable`; they can
    then be called again."""

    def __init__(
        self,
        bucket: ConfigBucket,
        lease_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = bucket
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._process = uuid.uuid4().hex  # two processes may have the same name
        self._seen: dict[str, tuple[int, float]] = {}

    async def acquire(self, key: str, owner: str) -> Lease | None:
        """Take the lease if it is free or has expired; None if another process has it, or took it
        at the same time. To notice that a lease expires, call this or
        :meth:`owners` repeatedly."""
        now = self._clock()  # before reading: the revision is at least this old
        entry = await self._bucket.get(key)
        revision = 0
        if entry is not None:
            revision = entry.revision
            if self._is_mine(entry):  # the reply to an earlier call was lost
                return Lease(key, owner, revision)
            seen, since = self._seen.get(key, (0, now))
            if seen != revision:
                self._seen[key] = revision, now
                return None
            if now - since < self._lease_seconds:
                return None
        try:
            value = lease_value(owner, self._process)
            revision = await self._bucket.put(key, value, revision)
        except Conflict:
            return None
        self._seen.pop(key, None)
        return Lease(key, owner, revision)

    async def renew(self, lease: Lease) -> bool:
        """Keep the lease; False if it was lost to another process."""
        try:
            value = lease_value(lease.owner, self._process)
            lease.revision = await self._bucket.put(lease.key, value, lease.revision)
        except Conflict:
            entry = await self._bucket.get(lease.key)
            if entry is None or not self._is_mine(entry):
                return False
            lease.revision = entry.revision  # a renewal whose reply was lost
        return True

    async def release(self, lease: Lease) -> None:
        """Give the lease up, so that a successor need not wait. Does nothing if it was lost."""
        if not await self.renew(lease):  # learns the revision
            return
        try:
            await self._bucket.delete(lease.key, lease.revision)
        except Conflict:
            return

    async def owners(self) -> dict[str, str]:
        """The owner of each lease, expired ones included. A lease's age begins with the call that
        first returns its revision, so :meth:`acquire` need not watch it for as long again."""
        now = self._clock()
        found: dict[str, str] = {}
        for entry in await self._bucket.entries():
            if entry.value is not None:
                found[entry.key] = owner_of(entry)
                if self._seen.get(entry.key, (0, now))[0] < entry.revision:  # else it is stale
                    self._seen[entry.key] = entry.revision, now
        return found

    def _is_mine(self, entry: Entry) -> bool:
        return entry.value is not None and process_of(entry) == self._process


def lease_value(owner: str, process: str) -> bytes:
    """The value of a lease's key: the owner's name, and the id of its process."""
    return f"{owner}\n{process}".encode()


def owner_of(entry: Entry) -> str:
    """The owner in the value of a lease."""
    return (entry.value or b"").decode().partition("\n")[0]


def process_of(entry: Entry) -> str:
    """The id of the owner's process in the value of a lease."""
    return (entry.value or b"").decode().partition("\n")[2]
