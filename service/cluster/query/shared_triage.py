"""Mutes and acknowledgements of a cluster, in the bucket that query nodes share.

A change at any query node replaces a key by compare-and-set; all query nodes follow the bucket and
apply what it has to their own stores, from which they read.

A tenant has up to :data:`SHARDS` keys; a hash of the rule's or the signal's id says which. A key
has the latest :data:`KEPT` mutes and acknowledgements, so the bucket stays small. A query node
keeps what it has seen; a new one has what is in the bucket.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import orjson
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.query.tenant_names import TenantNames
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict, Entry
from betrace.service.storage.triage import KEPT_NS, Acknowledgement, Mute, TriageError, TriageStore

R = TypeVar("R")

_log = logging.getLogger("service.query")

PREFIX = "triage."
SHARDS = 256
KEPT = 100
RETRY_SECONDS = 1.0


@dataclass(slots=True)
class TriageShard:
    """What a key of the bucket has: mutes by rule, and acknowledgements by signal, oldest first."""

    mutes: list[tuple[str, Mute]] = field(default_factory=list)
    acknowledgements: list[tuple[str, Acknowledgement]] = field(default_factory=list)

    def end_mutes(self, rule: str, now: int) -> bool:
        """End the mutes of a rule; returns whether there was one."""
        ended = [each for each in self.mutes if each[0] == rule and each[1].until_ns > now]
        self.mutes = [
            (name, replace(mute, until_ns=now)) if (name, mute) in ended else (name, mute)
            for name, mute in self.mutes
        ]
        return bool(ended)

    def pack(self, now: int) -> bytes:
        """As JSON, without what need not be kept."""
        mutes = [each for each in self.mutes if each[1].until_ns >= now - KEPT_NS]
        return orjson.dumps([mutes[-KEPT:], self.acknowledgements[-KEPT:]])

    @classmethod
    def unpack(cls, value: bytes) -> TriageShard:
        """The inverse of :meth:`pack`. Raises LookupError, TypeError or ValueError."""
        mutes, acknowledgements = orjson.loads(value)
        return cls(
            [(rule, Mute(**each)) for rule, each in mutes],
            [(signal, Acknowledgement(**each)) for signal, each in acknowledgements],
        )


def triage_key(name: str, item: str) -> str:
    """The key of a rule or of a signal. ``name`` is the tenant's in the logs, so that a tenant that
    is created again begins with nothing."""
    return f"{PREFIX}{name}.{hashlib.sha256(item.encode()).digest()[0] % SHARDS:02x}"


class SharedTriage:
    """Changes mutes and acknowledgements at all query nodes. Make it on the Trio thread; the
    methods that block are for other threads. They raise
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable` and :exc:`TriageError`."""

    def __init__(
        self,
        bucket: ConfigBucket,
        store: TriageStore,
        threads: ThreadRunner,
        names: TenantNames,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._bucket = bucket
        self._store = store
        self._threads = threads
        self._names = names
        self._clock_ns = clock_ns
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._applied: dict[str, int] = {}  # revisions

    def mute(self, tenant: str, rule_id: str, duration_ns: int, reason: str, by: str) -> Mute:
        """As :meth:`betrace.service.storage.triage.TriageStore.mute`."""

        def change(shard: TriageShard, now: int) -> Mute:
            shard.end_mutes(rule_id, now)
            mute = Mute(now, now + duration_ns, reason, by)
            shard.mutes.append((rule_id, mute))
            return mute

        return self._change(tenant, rule_id, change)

    def unmute(self, tenant: str, rule_id: str) -> bool:
        """As :meth:`betrace.service.storage.triage.TriageStore.unmute`."""
        return self._change(tenant, rule_id, lambda shard, now: shard.end_mutes(rule_id, now))

    def acknowledge(self, tenant: str, signal_id: str, note: str, by: str) -> Acknowledgement:
        """As :meth:`betrace.service.storage.triage.TriageStore.acknowledge`."""

        def change(shard: TriageShard, now: int) -> Acknowledgement:
            found = Acknowledgement(now, by, note)
            others = [each for each in shard.acknowledgements if each[0] != signal_id]
            shard.acknowledgements = [*others, (signal_id, found)]
            return found

        return self._change(tenant, signal_id, change)

    def _change(self, tenant: str, item: str, change: Callable[[TriageShard, int], R]) -> R:
        """Change what is known about a rule or a signal, everywhere; here at once."""
        key = triage_key(self._names.log_name(tenant), item)

        async def work() -> tuple[R, Entry]:
            while True:
                entry = await self._bucket.get(key)
                shard = _read(entry) if entry is not None else TriageShard()
                now = self._clock_ns()
                result = change(shard, now)
                value = shard.pack(now)
                try:
                    expected = 0 if entry is None else entry.revision
                    revision = await self._bucket.put(key, value, expected)
                except Conflict:  # another node changed it meanwhile
                    continue
                return result, Entry(key, value, revision)

        result, entry = trio.from_thread.run(work, trio_token=self._token)
        self._merge(entry)
        return result

    def _merge(self, entry: Entry) -> None:
        """Apply an entry to the store of this node, unless a later one was applied already."""
        tenant = self._names.tenant(_name(entry))
        if tenant is None:  # it was deleted
            return
        shard = _read(entry)
        with self._lock:
            if entry.revision > self._applied.get(entry.key, 0):
                self._store.merge(tenant, shard.mutes, shard.acknowledgements)
                self._applied[entry.key] = entry.revision

    async def watch(self) -> None:
        """Apply what other query nodes change, until cancelled."""
        async for entry in self._bucket.watch(PREFIX):
            while self._names.unknown([_name(entry)]):  # noqa: ASYNC110
                await trio.sleep(RETRY_SECONDS)
            while True:
                try:
                    await self._threads.run(self._merge, entry)
                    break
                except TriageError as error:
                    _log.warning("mutes and acknowledgements cannot be stored: %s", error)
                    await trio.sleep(RETRY_SECONDS)


def _name(entry: Entry) -> str:
    """The tenant's name in the logs."""
    return entry.key.removeprefix(PREFIX).rpartition(".")[0]


def _read(entry: Entry) -> TriageShard:
    """What the entry has; nothing if it is damaged."""
    try:
        return TriageShard.unpack(entry.value or b"[[],[]]")
    except (LookupError, TypeError, ValueError) as error:
        _log.error("the entry %s of the bucket is damaged: %s", entry.key, error)
        return TriageShard()
