"""Traces for a cluster without edges, written to the partitions' logs, and the signals due."""

from __future__ import annotations

from collections import Counter

import orjson
import trio

from betrace.service.cluster.output import Output, unpack
from betrace.service.cluster.rule_keys import PUBLISHED, RULES_PREFIX, rules_key
from betrace.service.config.cluster import ClusterSettings
from betrace.service.signals import Kind, Signal
from betrace.service.storage.jetstream import resize, setup
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import Spans, TenantFrame, pack
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.generations import Generations
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.spans import SpanStreams
from tests.support.spans import S, body

TENANT = "acme"
RULES = [
    {"id": "needs-b", "condition": "when { a } always { b }"},
    {"id": "no-boom", "condition": "when { a } never { boom }"},
]
WAIT = 300


class Load:
    """Sends traces and compares the partitions' output with what is due."""

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.layout = Layout.of(settings)
        self.generations = self.layout.generations
        self.stale: Generations | None = None
        """What every other message is divided by, as if its edge had not heard of a change."""
        self.expected: Counter[tuple[str, str]] = Counter()  # by rule and trace
        self.traces: set[str] = set()
        self.sent = 0
        self._appended = 0

    async def open(self) -> None:
        """Connect, create the streams and set the rules."""
        client = self.client = await NatsClient.connect(self.settings, "test")
        await setup.set_up(client, self.settings)
        self.spans = SpanStreams(client, self.layout)
        await self.put_rules(RULES)

    @property
    def partitions(self) -> range:
        """All partitions, former ones included."""
        return range(self.generations.total)

    async def resize(self, partitions: int) -> None:
        """Change the number of partitions; one of two edges does not hear of it."""
        await resize.resize(self.client, self.settings, partitions)
        self.stale, self.generations = self.generations, self.generations.grown(partitions)

    async def put_rules(self, rules: list[dict[str, str]]) -> int:
        bucket = ConfigBucket(self.client, self.layout.config_bucket)
        revision = await bucket.put(rules_key(TENANT), orjson.dumps(rules))
        await bucket.put(RULES_PREFIX + PUBLISHED, b"[]")
        return revision

    async def send_traces(self, number: int) -> None:
        """Send traces, each in two messages or one."""
        first, later = [], []
        for _ in range(number):
            self.sent += 1
            trace = self.sent.to_bytes(16, "big")
            self.traces.add(trace.hex())
            first.append(S(1, "a", trace))
            if self.sent % 2:
                later.append(S(2, "b", trace))
            else:
                self.expected["needs-b", trace.hex()] += 1
            if self.sent % 3 == 0:
                later.append(S(3, "boom", trace))
                self.expected["no-boom", trace.hex()] += 1
        await self._append(first)
        await self._append(later)

    async def _append(self, spans: list[S]) -> None:
        by_partition: dict[int, list[S]] = {}
        self._appended += 1
        known = self.stale if self.stale is not None and self._appended % 2 else self.generations
        for span in spans:
            partition = known.current.partition_of(TENANT, span.trace)
            by_partition.setdefault(partition, []).append(span)
        for partition, some in by_partition.items():
            frame = TenantFrame(TENANT, 0, len(some), body(*some))
            message_id = f"{partition}-{self.sent}-{some[0].name}-{some[0].trace.hex()}"
            await self.spans.append(partition, pack(Spans([frame])), message_id)

    async def send_until(self, done: trio.Event, number: int = 10, interval: float = 0.05) -> None:
        """Send ``number`` traces every ``interval`` seconds."""
        while not done.is_set():
            await self.send_traces(number)
            await trio.sleep(interval)

    async def outputs_of(self, partition: int) -> list[Output]:
        """Everything that is stored of a partition."""
        found: list[Output] = []
        log, after = FencedLog(self.client, self.layout, partition), 0
        while messages := await log.read(after, None, 4 << 20, 0):
            after = messages[-1].sequence
            found += [unpack(message.data) for message in messages if message.data]
        return found

    async def outputs(self) -> list[Output]:
        """Everything that is stored."""
        return [each for partition in self.partitions for each in await self.outputs_of(partition)]

    async def rules_are_known(self) -> None:
        """Wait until every partition has read a marker of rules."""
        with trio.fail_after(WAIT):
            for partition in self.generations.current.partitions:
                while True:
                    found = await self.outputs_of(partition)
                    if found and found[-1].counts.markers:
                        break
                    await trio.sleep(0.1)

    async def check(self) -> None:
        """Wait until every trace was closed and each signal is there; none may be there twice."""
        with trio.fail_after(WAIT):
            while not self._is_complete(await self.outputs()):
                await trio.sleep(0.25)
        outputs = await self.outputs()
        ids = Counter(signal.id for signal in signals_of(outputs))
        assert not [each for each, times in ids.items() if times > 1]
        assert not any(found.dead or found.undecided for found in outputs)

    def _is_complete(self, outputs: list[Output]) -> bool:
        closed = {
            each.closed.trace_id(k)
            for found in outputs
            for each in found.decided
            if each.closed is not None
            for k in range(len(each.closed))
        }
        active: Counter[tuple[str, str]] = Counter()
        for signal in signals_of(outputs):
            step = 1 if signal.kind is Kind.RAISED else -1
            active[signal.rule_id, signal.trace_id] += step
        return closed == self.traces and +active == self.expected


def signals_of(outputs: list[Output]) -> list[Signal]:
    """All signals, in order."""
    return [s for found in outputs for each in found.decided for s in each.signals]
