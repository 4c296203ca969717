"""A cluster's storage in memory, for tests in virtual time.

Each node has its own view (:class:`FakeNode`), which a test can freeze: calls then wait, and
nothing of what they ask for happens before they are thawed.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.evaluator.evaluator import ROLE, Evaluator
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.cluster.evaluator.rule_feed import RuleFeed
from betrace.service.cluster.evaluator.state import Anchor
from betrace.service.cluster.membership import Membership
from betrace.service.cluster.output import Counts, Output
from betrace.service.cluster.output import unpack as unpack_output
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.rule_keys import PUBLISHED, RULES_PREFIX
from betrace.service.config.cluster import ClusterSettings
from betrace.service.signals import Kind, Signal
from betrace.service.storage.jetstream.blobs import BlobCorrupt, BlobMissing
from betrace.service.storage.jetstream.bucket import Conflict, Entry
from betrace.service.storage.jetstream.envelope import (
    RulesMarker,
    Seal,
    Spans,
    TenantFrame,
    Tick,
    pack,
    unpack,
)
from betrace.service.storage.jetstream.errors import LogGap, NatsUnavailable
from betrace.service.storage.jetstream.fenced import Epoch, Fenced
from betrace.service.storage.jetstream.generations import Generations
from betrace.service.storage.jetstream.process_leases import ProcessLeases
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.traces.verdicts import Decided

TENANT = "acme"


class FakeNats:
    """What the servers have."""

    def __init__(self) -> None:
        self.logs: dict[str, list[LogMessage]] = defaultdict(list)
        self.ids: dict[str, int] = {}
        self.buckets: dict[str, dict[str, Entry]] = defaultdict(dict)
        self.revision = 0
        self.blobs: dict[str, bytes] = {}
        self.tidied = 0
        self.moved = trio.Event()
        self.appended_by: dict[int, list[str]] = defaultdict(list)
        self.put_rules(PUBLISHED, b"[]")

    def wake(self) -> None:
        self.moved.set()
        self.moved = trio.Event()

    def append(self, log: str, data: bytes, epoch: int = 0) -> int:
        sequence = len(self.logs[log]) + 1
        now = int(trio.current_time() * 1e9)
        self.logs[log].append(LogMessage(sequence, now, data, epoch))
        self.wake()
        return sequence

    def put_spans(self, partition: int, *bodies: str) -> int:
        """Append one envelope with a fake span for each body; returns its sequence."""
        body = json.dumps(bodies).encode()
        frame = TenantFrame(TENANT, 0, len(bodies), body)
        return self.append(f"spans-{partition}", pack(Spans([frame])))

    def put_rules(self, tenant: str, definitions: bytes) -> int:
        self.revision += 1
        key = RULES_PREFIX + tenant
        self.buckets["config"][key] = Entry(key, definitions, self.revision)
        self.wake()
        return self.revision

    def outputs(self, partition: int) -> list[Output]:
        return [unpack_output(m.data) for m in self.logs[f"out-{partition}"] if m.data]

    def signals(self, partition: int) -> list[str]:
        """The ids of all signals in the output, in order."""
        found = self.outputs(partition)
        return [s.id for each in found for decided in each.decided for s in decided.signals]


@dataclass(eq=False)
class FakeNode:
    """A process's view of the servers."""

    nats: FakeNats
    name: str
    thawed: trio.Event = field(default_factory=trio.Event)
    unavailable: bool = False

    def __post_init__(self) -> None:
        self.thawed.set()

    def freeze(self) -> None:
        self.thawed = trio.Event()

    def thaw(self) -> None:
        self.thawed.set()

    async def gate(self) -> None:
        """Take the time of a request."""
        await trio.sleep(0.001)
        await self.thawed.wait()
        if self.unavailable:
            await trio.sleep(0.1)
            raise NatsUnavailable("the servers do not answer")

    async def patience(self) -> None:
        """Like :meth:`gate` for calls that wait while the servers are unavailable."""
        while True:
            try:
                return await self.gate()
            except NatsUnavailable:
                continue


async def read_log(
    node: FakeNode, log: str, after: int, most_bytes: int, wait_seconds: float
) -> list[LogMessage]:
    await node.gate()
    with trio.move_on_after(wait_seconds):
        while not node.nats.logs[log][after:]:
            await node.nats.moved.wait()
    await node.gate()
    found: list[LogMessage] = []
    for message in node.nats.logs[log][after:]:
        if found and sum(len(each.data) for each in found) + len(message.data) > most_bytes:
            break
        if message.epoch < 0:  # deleted
            if found:
                break
            continue
        if message.sequence != after + len(found) + 1:
            raise LogGap(log, after + 1, message.sequence)
        found.append(message)
    return found


class FakeSpans:
    def __init__(self, node: FakeNode) -> None:
        self.node = node

    async def append(self, partition: int, data: bytes, message_id: str) -> int:
        await self.node.patience()
        nats = self.node.nats
        if message_id not in nats.ids:
            nats.ids[message_id] = nats.append(f"spans-{partition}", data)
        return nats.ids[message_id]

    async def read(self, partition, after, most_bytes, wait_seconds):
        return await read_log(self.node, f"spans-{partition}", after, most_bytes, wait_seconds)

    async def get(self, partition: int, sequence: int) -> LogMessage | None:
        await self.node.gate()
        found = self.node.nats.logs[f"spans-{partition}"][sequence - 1 : sequence]
        return found[0] if found and found[0].epoch >= 0 else None

    async def last(self, partition: int) -> int:
        await self.node.gate()
        return len(self.node.nats.logs[f"spans-{partition}"])

    async def first_since(self, partition: int, first: int, end: int, time_ns: int) -> int:
        return await SpanStreams.first_since(self, partition, first, end, time_ns)  # type: ignore[arg-type]

    async def forget_before(self, partition: int, sequence: int) -> None:
        await self.node.gate()
        log = self.node.nats.logs[f"spans-{partition}"]
        for number in range(sequence - 1):
            log[number] = LogMessage(log[number].sequence, 0, b"", -1)

    async def first(self, partition: int) -> int:
        await self.node.gate()
        log = self.node.nats.logs[f"spans-{partition}"]
        return next((m.sequence for m in log if m.epoch >= 0), len(log) + 1)


class FakeFencedLog:
    """``latency`` is how long an append takes to reach the servers; the check comes then."""

    latency = 0.003

    def __init__(self, node: FakeNode, partition: int) -> None:
        self.node = node
        self.partition = partition
        self.log = f"out-{partition}"
        self.last: int | None = None
        self.appending = False

    async def open(self, owner: str) -> Epoch:
        await self.node.patience()
        messages = self.node.nats.logs[self.log]
        number = max((m.epoch for m in messages), default=0) + 1
        self.last = self.node.nats.append(self.log, b"", number)
        return Epoch(number, self.last, owner)

    async def append(self, data: bytes) -> int:
        assert not self.appending, "one append at a time"
        self.appending = True
        await self.node.patience()
        await trio.sleep(self.latency)
        await self.node.thawed.wait()
        self.appending = False
        if self.last != len(self.node.nats.logs[self.log]):
            raise Fenced("another owner has opened an epoch")
        self.last = self.node.nats.append(self.log, data)
        self.node.nats.appended_by[self.partition].append(self.node.name)
        return self.last

    async def read(self, after, upto, most_bytes, wait_seconds):
        found = await read_log(self.node, self.log, after, most_bytes, wait_seconds)
        return [each for each in found if upto is None or each.sequence <= upto]


class FakeBucket:
    def __init__(self, node: FakeNode, name: str) -> None:
        self.node = node
        self.entries_by_key = node.nats.buckets[name]

    async def get(self, key: str) -> Entry | None:
        await self.node.gate()
        entry = self.entries_by_key.get(key)
        return None if entry is None or entry.value is None else entry

    async def put(self, key: str, value: bytes | None, expected_revision: int | None = None) -> int:
        await self.node.gate()
        entry = self.entries_by_key.get(key)
        possible = {entry.revision if entry is not None else 0}
        if entry is None or entry.value is None:
            possible.add(0)
        if expected_revision is not None and expected_revision not in possible:
            raise Conflict(key)
        self.node.nats.revision += 1
        self.entries_by_key[key] = Entry(key, value, self.node.nats.revision)
        self.node.nats.wake()
        return self.node.nats.revision

    async def delete(self, key: str, expected_revision: int | None = None) -> int:
        return await self.put(key, None, expected_revision)

    async def entries(self, prefix: str = "") -> list[Entry]:
        await self.node.gate()
        found = sorted(self.entries_by_key.values(), key=lambda each: each.revision)
        return [each for each in found if each.key.startswith(prefix) and each.value is not None]

    async def watch(self, prefix: str = ""):
        after = 0
        while True:
            moved = self.node.nats.moved
            await self.node.thawed.wait()
            found = sorted(self.entries_by_key.values(), key=lambda each: each.revision)
            for entry in found:
                if entry.revision > after:
                    after = entry.revision
                    if entry.key.startswith(prefix):
                        yield entry
            await moved.wait()


class FakeBlobs:
    def __init__(self, node: FakeNode) -> None:
        self.node = node

    async def put(self, name: str, data: bytes) -> None:
        await self.node.gate()
        self.node.nats.blobs[name] = data

    async def get(self, name: str) -> bytes:
        await self.node.gate()
        if name not in self.node.nats.blobs:
            raise BlobMissing(name)
        data = self.node.nats.blobs[name]
        if data == b"damaged":
            raise BlobCorrupt(name)
        return data

    async def delete(self, name: str) -> None:
        await self.node.gate()
        self.node.nats.blobs.pop(name, None)

    async def delete_orphans(self, seconds: float) -> int:
        await self.node.gate()
        self.node.nats.tidied += 1
        return 0

    async def names(self, prefix: str = "") -> list[str]:
        await self.node.gate()
        return sorted(name for name in self.node.nats.blobs if name.startswith(prefix))


class FakeState:
    """Decides a signal for each fake span, in groups of three messages. Its signals contain a
    digest of everything before, so a state that missed or repeated a message is noticed."""

    GROUP = 3
    rests = False

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.applied = self.received = self.step = self.noted = self.stored_step = 0
        self.log_time_ns = 0
        self.rules_revisions: dict[str, int] = {}
        self.waiting: str | None = None
        self.digest = ""
        self.group: list[LogMessage] = []
        self.anchor = Anchor(0, 0, "")
        self.first_rules: list[bytes] = []
        self.empty, self.sealed = True, False

    def begin(self, rules: list[RulesMarker]) -> None:
        assert not self.received
        self.first_rules = [marker.definitions for marker in rules]

    def apply(self, messages) -> Output | None:
        found: Output | None = None
        for message in messages:
            assert message.sequence == self.received + 1 or not self.received
            self.received = message.sequence
            if self.sealed:
                continue
            self.empty = False
            envelope = unpack(message.data)
            self.group.append(message)
            self.sealed = isinstance(envelope, Seal)
            if isinstance(envelope, Tick | Seal) or len(self.group) == self.GROUP:
                output = self._end_group()
                if self.step <= self.noted:
                    output.decided = []
                if found is None:
                    found = output
                else:
                    found.add(output)
        return found

    def _end_group(self) -> Output:
        signals: list[Signal] = []
        for message in self.group:
            envelope = unpack(message.data)
            if isinstance(envelope, RulesMarker) and envelope.tenant != PUBLISHED:
                before = self.rules_revisions.get(envelope.tenant, 0)
                self.rules_revisions[envelope.tenant] = max(before, envelope.revision)
            for frame in envelope.frames if isinstance(envelope, Spans) else ():
                for body in json.loads(bytes(frame.body)):
                    self.digest = hashlib.sha256(f"{self.digest}{body}".encode()).hexdigest()
                    signals.append(self._signal(body))
        last = self.group[-1]
        self.group = []
        self.step += 1
        self.applied, self.log_time_ns = last.sequence, last.time_ns
        self.anchor = Anchor.of(last)
        decided = [Decided(TENANT, signals, None)] if signals else []
        return Output(self.applied, self.step, last.time_ns, last.time_ns, Counts(), decided)

    def _signal(self, body: str) -> Signal:
        known = {"tenant": TENANT, "rule_id": "r", "rule_version": "v", "severity": "high"}
        return Signal(
            **known,
            id=body,
            kind=Kind.RAISED,
            clause="always",
            trace_id=self.digest[:32],
            detected_at=0,
            early=False,
            counts={},
            evidence={},
            message="",
        )

    @property
    def at_rest(self) -> bool:
        return self.rests and not self.group

    def note(self, output: Output, sequence: int) -> None:
        assert self.received == self.applied
        self.noted = output.step

    def stored(self, step: int, sequence: int) -> None:
        self.stored_step = step

    def snapshot(self, out_sequence: int) -> bytes:
        values = [self.applied, self.step, self.log_time_ns, self.rules_revisions, self.digest]
        values.append(self.sealed)
        anchor = [self.anchor.sequence, self.anchor.time_ns, self.anchor.digest]
        return json.dumps([values, anchor, out_sequence]).encode()

    def restore(self, data: bytes) -> tuple[Anchor, int]:
        values, anchor, out_sequence = json.loads(data)
        self.applied, self.step, self.log_time_ns, self.rules_revisions, self.digest = values[:5]
        self.sealed, self.empty = values[5], False
        self.received = self.applied
        self.anchor = Anchor(*anchor)
        return self.anchor, out_sequence

    def inherit(self, data: bytes, wanted) -> None:
        if data == b"damaged":
            raise ValueError("damaged")
        (_, _, self.log_time_ns, self.rules_revisions, self.digest, sealed), _, _ = json.loads(data)
        assert sealed
        self.empty = False


SETTINGS = ClusterSettings(
    partitions=4, replicas=1, lease_seconds=2, heartbeat_seconds=0.5, tick_seconds=0.5
)


@dataclass(eq=False)
class FakeEvaluator:
    """An evaluator on a :class:`FakeNats`. Cancel ``scope`` to kill it."""

    nats: FakeNats
    name: str
    threads: ThreadRunner
    settings: ClusterSettings = SETTINGS
    checkpoint_seconds: float = 5.0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    states: dict[int, FakeState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        node = self.node = FakeNode(self.nats, self.name)
        self.partitions = PartitionMap(
            FakeBucket(node, "config"), Generations.of(self.settings.partitions)
        )
        leases = ProcessLeases(
            FakeBucket(node, "leases"), self.settings.lease_seconds, clock=trio.current_time
        )
        self.parts = OwnerParts(
            settings=self.settings,
            node=self.name,
            spans=FakeSpans(node),
            outputs=partial(FakeFencedLog, node),
            leases=leases,
            blobs=FakeBlobs(node),
            rules=RuleFeed(FakeBucket(node, "config")),
            threads=self.threads,
            config=FakeBucket(node, "config"),
            partitions=self.partitions,
            new_state=self.new_state,
            checkpoint_seconds=self.checkpoint_seconds,
            log_days=0,
            archive=False,
            takeovers=trio.CapacityLimiter(4),
            handovers=trio.CapacityLimiter(4),
        )
        self.membership = Membership(
            FakeBucket(node, "members"),
            self.name,
            (ROLE,),
            self.settings.lease_seconds,
            self.settings.heartbeat_seconds,
        )
        self.evaluator = Evaluator(self.parts, self.membership, grace_seconds=20)

    def new_state(self, partition: int) -> FakeState:
        self.states[partition] = FakeState(partition)
        return self.states[partition]

    def with_parts(self, **changes) -> None:
        """Replace parts, before the start."""
        self.parts = replace(self.parts, **changes)
        self.evaluator = Evaluator(self.parts, self.membership, grace_seconds=20)

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.membership.run)
                nursery.start_soon(self.partitions.run)
                await self.evaluator.run()
                await self.membership.leave()
                nursery.cancel_scope.cancel()

    @property
    def owned(self) -> list[int]:
        return self.evaluator.owned
