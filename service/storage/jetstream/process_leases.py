"""The leases of a process that has many: one renewal keeps all of them
(:class:`betrace.service.storage.jetstream.leases.Leases` renews each one).

Each lease is a key of a bucket, whose value names its holder: a process. Each holder has a key of
its own, its *pulse*, whose revision moves at each :meth:`ProcessLeases.renew`. Clocks of different
machines are never compared: a successor takes a lease over once neither the lease nor the holder's
pulse has moved for ``lease_seconds`` on the successor's own monotonic clock. Like all leases they
are an optimisation; safety comes from the fence (:mod:`betrace.service.storage.jetstream.fenced`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict, Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.leases import lease_value, owner_of, process_of

_PULSE = "holder."
_RETRY_SECONDS = 0.25
_FORGET_SECONDS = 600.0
"""The pulse of a process that has been silent for this long is deleted."""


@dataclass(slots=True, eq=False)
class HeldLease:
    """A lease that this process has: use it until it is lost, then drop or release it."""

    key: str
    owner: str
    revision: int
    lost: trio.Event = field(default_factory=trio.Event)
    """Set when another process has taken the lease over."""


@dataclass(frozen=True, slots=True)
class _Seen:
    entry: Entry
    since: float  # when this revision was seen first


class ProcessLeases:
    """The leases in a bucket, for one process, as far as :meth:`run` has seen them. All methods
    raise :exc:`NatsUnavailable`; they can then be called again."""

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
        self._seen: dict[str, _Seen] = {}
        self._held: dict[str, HeldLease] = {}
        self._acquiring: set[str] = set()
        self._has_pulse = False
        self.ready = trio.Event()
        """Set when all leases are known."""

    async def run(self) -> None:
        """Watch the bucket until cancelled."""
        while not self.ready.is_set():
            try:
                await self.look()
            except NatsUnavailable:
                await trio.sleep(_RETRY_SECONDS)
        async for entry in self._bucket.watch():
            self.note(entry)

    async def look(self) -> None:
        """Read all leases once."""
        for entry in await self._bucket.entries():
            self.note(entry)
        self.ready.set()

    def note(self, entry: Entry) -> None:
        """Take an entry of the bucket into account."""
        seen = self._seen.get(entry.key)
        if seen is not None and seen.entry.revision >= entry.revision:
            return
        self._seen[entry.key] = _Seen(entry, self._clock())
        lease = self._held.get(entry.key)
        if lease is not None and entry.revision > lease.revision and not self._is_mine(entry):
            del self._held[entry.key]
            lease.lost.set()

    def owners(self) -> dict[str, str]:
        """The owner of each lease, expired ones included."""
        entries = (each.entry for each in self._seen.values())
        return {e.key: owner_of(e) for e in entries if e.value and not e.key.startswith(_PULSE)}

    async def acquire(self, key: str, owner: str) -> HeldLease | None:
        """Take the lease if it is free or has expired; None if another process has it, or took it
        at the same time. This costs no request while another has it, so call it often."""
        if key in self._acquiring:
            return None
        self._acquiring.add(key)
        try:
            return await self._acquire(key, owner)
        finally:
            self._acquiring.discard(key)

    async def _acquire(self, key: str, owner: str) -> HeldLease | None:
        if key not in self._seen:
            entry = await self._bucket.get(key)
            self.note(entry or Entry(key, None, 0))
        entry = self._seen[key].entry
        if self._is_mine(entry):  # the reply to an earlier call was lost, for example
            return self._hold(key, owner, entry.revision)
        if entry.value is not None and not await self._has_expired(key, entry):
            return None
        if not self._has_pulse:
            await self.renew()
        try:
            value = lease_value(owner, self._process)
            revision = await self._bucket.put(key, value, entry.revision)
        except Conflict:
            if latest := await self._bucket.get(key):
                self.note(latest)
            return None
        self.note(Entry(key, value, revision))
        return self._hold(key, owner, revision)

    def _hold(self, key: str, owner: str, revision: int) -> HeldLease:
        lease = self._held[key] = HeldLease(key, owner, revision)
        return lease

    async def _has_expired(self, key: str, entry: Entry) -> bool:
        """Whether neither the lease nor its holder's pulse has moved for long enough. The pulse is
        read again, because the watch may be behind."""
        pulse_key = _PULSE + process_of(entry)
        pulse = self._seen.get(pulse_key)
        since = self._seen[key].since
        if pulse is not None and pulse.entry.value is not None:
            since = max(since, pulse.since)
        if self._clock() - since < self._lease_seconds:
            return False
        latest = await self._bucket.get(pulse_key)
        if latest is None or (pulse is not None and latest.revision == pulse.entry.revision):
            return True
        self.note(latest)
        return False

    async def renew(self) -> None:
        """Keep all leases: show that this process is alive. Also releases leases that it has but
        does not use, because a release failed or an acquisition was cancelled."""
        await self._bucket.put(_PULSE + self._process, b"")
        self._has_pulse = True
        for key, seen in list(self._seen.items()):
            entry = seen.entry
            if key.startswith(_PULSE):
                silent = self._clock() - seen.since
                if entry.value is not None and silent > _FORGET_SECONDS:
                    await self._delete(key, entry.revision)
            elif self._is_mine(entry) and key not in self._held and key not in self._acquiring:
                await self._delete(key, entry.revision)

    async def release(self, lease: HeldLease) -> None:
        """Give the lease up, so that a successor need not wait. Does nothing if it was lost."""
        if self.drop(lease):
            await self._delete(lease.key, lease.revision)

    def drop(self, lease: HeldLease) -> bool:
        """Stop using the lease; :meth:`renew` releases it. Returns whether this process had it."""
        held = self._held.get(lease.key) is lease
        if held:
            del self._held[lease.key]
        return held

    async def leave(self) -> None:
        """Remove this process's pulse, after all leases are released."""
        if self._has_pulse:
            await self._bucket.delete(_PULSE + self._process)

    async def _delete(self, key: str, revision: int) -> None:
        try:
            deleted = Entry(key, None, await self._bucket.delete(key, revision))
        except Conflict:  # another process has it, or the watch is behind
            deleted = await self._bucket.get(key) or Entry(key, None, revision + 1)
        self.note(deleted)

    def _is_mine(self, entry: Entry) -> bool:
        return entry.value is not None and process_of(entry) == self._process
