"""Who is in the cluster: every node writes a heartbeat into a bucket, and watches those of all.

A node is alive while the revision of its heartbeat moves. No clock of another machine is read, and
an observer that knows nothing judges nobody: the age of a heartbeat counts only while the
observer's own heartbeats arrive through the same watch, and each of its steps counts for at most
two intervals. A node that was frozen or cut off therefore does not believe that all others are
gone.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import orjson
import trio

from betrace.channels import TransientError
from betrace.service.storage.jetstream.bucket import ConfigBucket, Entry
from betrace.service.telemetry import events

_log = logging.getLogger("service.cluster.membership")

_BEAT, _DRAIN = "beat.", "drain."


def beat_key(node: str) -> str:
    """The key of a node's heartbeat."""
    return _BEAT + node


def drain_key(node: str) -> str:
    """The key whose presence tells a node to hand over its partitions."""
    return _DRAIN + node


@dataclass(frozen=True, slots=True)
class Member:
    """A node as others see it."""

    name: str
    roles: tuple[str, ...]
    draining: bool = False
    """Whether it gives its partitions away: because it stops, or by `betrace cluster drain`."""
    paused_at: int = 0
    """Of an edge: the revision of the entry by which ingestion is paused, once everything that was
    received before is stored."""


def read_heartbeat(entry: Entry) -> tuple[Member, str]:
    """The node of a heartbeat, and which start of its process wrote it."""
    name, value = entry.key.removeprefix(_BEAT), orjson.loads(entry.value or b"{}")
    member = Member(name, tuple(value["roles"]), bool(value["draining"]), value.get("pausedAt", 0))
    return member, value["boot"]


@dataclass(slots=True)
class _Heartbeat:
    member: Member
    revision: int
    boot: str
    age: float | None = None
    """Seconds from the first own heartbeat after this one; None before that."""


@dataclass(eq=False)
class Membership:
    """The heartbeats of a cluster, including one's own.

    Args:
      bucket: the members' bucket.
      name: of this node.
      roles: of this node.
      lease_seconds: after which a node whose heartbeat does not move is gone.
      heartbeat_seconds: between heartbeats.
    """

    bucket: ConfigBucket
    name: str
    roles: tuple[str, ...]
    lease_seconds: float
    heartbeat_seconds: float
    draining: bool = field(default=False, init=False)
    paused_at: Callable[[], int] = field(init=False)
    """Returns :attr:`Member.paused_at` of this node."""
    changed: trio.Event = field(default_factory=trio.Event, init=False)
    """Set, and replaced by a new one, when the members change."""
    ready: trio.Event = field(default_factory=trio.Event, init=False)
    """Set when the heartbeats of all are known, including this node's."""

    def __post_init__(self) -> None:
        self.paused_at = lambda: 0
        self._boot = secrets.token_hex(8)
        self._beats: dict[str, _Heartbeat] = {}
        self._drains: set[str] = set()
        self._alive: dict[str, Member] = {}
        self._seen_at = -1.0  # when the own heartbeat arrived last
        self._impostor = ""
        self._left = False

    def alive(self, role: str | None = None) -> dict[str, Member]:
        """The nodes that are alive, by name: all, or those with a role."""
        return {n: m for n, m in self._alive.items() if role is None or role in m.roles}

    async def run(self) -> None:
        """Write heartbeats and watch those of others until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while True:
                await self.beat()
                await trio.sleep(self.heartbeat_seconds)

    async def beat(self) -> None:
        """Write this node's heartbeat now."""
        if self._left:
            return
        value = {
            "roles": self.roles,
            "draining": self.draining,
            "boot": self._boot,
            "pausedAt": self.paused_at(),
        }
        try:
            with trio.move_on_after(self.lease_seconds):
                await self.bucket.put(beat_key(self.name), orjson.dumps(value))
        except TransientError as error:
            _log.debug("the heartbeat could not be written: %s", error)

    async def leave(self) -> None:
        """Remove the heartbeat, so that nobody waits for this node, and the request to drain it, so
        that it gets partitions when it is started again."""
        self._left = True
        with trio.move_on_after(self.lease_seconds):
            try:
                await self.bucket.delete(beat_key(self.name))
                if self.name in self._drains:
                    await self.bucket.delete(drain_key(self.name))
            except TransientError as error:
                _log.debug("the heartbeat could not be removed: %s", error)

    async def _watch(self) -> None:
        async for entry in self.bucket.watch(""):
            self.note(entry)

    def note(self, entry: Entry) -> None:
        """Take an entry of the bucket into account."""
        kind, _, name = entry.key.partition(".")
        if kind == "drain":
            (self._drains.add if entry.value is not None else self._drains.discard)(name)
        elif kind == "beat" and entry.value is None:
            self._beats.pop(name, None)
        elif kind == "beat":
            self._note_beat(name, entry)
        self._update()

    def _note_beat(self, name: str, entry: Entry) -> None:
        member, boot = read_heartbeat(entry)
        known = self._beats.get(name)
        if known is None or known.revision < entry.revision:
            self._beats[name] = _Heartbeat(member, entry.revision, boot)
        if name != self.name:
            return
        if boot == self._boot:
            self._count_age()
            self.ready.set()
        elif self.ready.is_set() and self._impostor != boot:
            self._impostor = boot
            events.NODE_NAME_TAKEN(node=name)

    def _count_age(self) -> None:
        now = trio.current_time()
        if self._seen_at >= 0:
            step = min(now - self._seen_at, 2 * self.heartbeat_seconds)
            for name, beat in self._beats.items():
                if name != self.name:
                    beat.age = 0.0 if beat.age is None else beat.age + step
        self._seen_at = now

    def _update(self) -> None:
        alive = {
            name: replace(beat.member, draining=beat.member.draining or name in self._drains)
            for name, beat in sorted(self._beats.items())
            if beat.age is None or beat.age <= self.lease_seconds
        }
        if alive == self._alive:
            return
        if self.ready.is_set():
            for name in alive.keys() - self._alive.keys():
                events.NODE_JOINED(node=name, roles=", ".join(alive[name].roles))
            for name in self._alive.keys() - alive.keys():
                events.NODE_GONE(node=name)
        self._alive = alive
        self.changed.set()
        self.changed = trio.Event()
