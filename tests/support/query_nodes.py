"""A query node in this process, fed from lists in place of streams. For tests only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import trio
from prometheus_client.core import CounterMetricFamily, Metric

from betrace.service.app.builder import open_query_service
from betrace.service.app.service import Service
from betrace.service.cluster import output
from betrace.service.cluster.duty import Duties, DutyTimes
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query.node import ClusterConnection
from betrace.service.cluster.query.open_traces import (
    RemoteOpenTraces,
    open_traces_answer,
)
from betrace.service.cluster.query.recent_output import RecentOutput
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.config.settings import Settings
from betrace.service.signals import Kind, Signal, signal_id
from betrace.service.storage.jetstream.bucket import Conflict, Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.fenced import Epoch
from betrace.service.storage.jetstream.generations import Generations
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.storage.spanlog.errors import FrameMissing
from betrace.service.traces.due import DueTraces
from betrace.service.traces.verdicts import Decided
from tests.support.cluster_fakes import FakeBucket, FakeNats, FakeNode
from tests.support.inprocess import served

LAST_SPANS = 100
"""The sequence of the last message of each partition's log."""


async def until(condition: Callable[[], bool]) -> None:
    """Return when the condition is true."""
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


def retraction(raised: Signal) -> Signal:
    """The signal that retracts another one, whose rule is ``r`` with version ``v``."""
    identity = signal_id(raised.tenant, "r", "v", raised.trace_id, Kind.RETRACTED)
    return replace(raised, id=identity, kind=Kind.RETRACTED)


class ListedOut:
    """An ``OUT`` stream as a list."""

    def __init__(self) -> None:
        self.messages: list[LogMessage] = []
        self.failure: Exception | None = None
        self.reads = 0
        self._more = trio.Event()

    def add(self, *decided: Decided, **more: Any) -> int:
        """Append what was decided as one message; returns its sequence."""
        sequence = len(self.messages) + 1
        given = {"upto": sequence, "step": sequence, "log_time_ns": sequence, "time_ns": 1} | more
        given.setdefault("counts", output.Counts(evaluated=sequence))
        [data] = output.pack(output.Output(decided=list(decided), **given))
        return self.add_bytes(data)

    def add_bytes(self, data: bytes) -> int:
        """Append a message; without data, the record of an epoch."""
        sequence = len(self.messages) + 1
        self.messages.append(LogMessage(sequence, 1, data, 0 if data else 1))
        self._more.set()
        self._more = trio.Event()
        return sequence

    async def read(
        self, after: int, upto: int | None, most_bytes: int, wait_seconds: float
    ) -> list[LogMessage]:
        self.reads += 1
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        if len(self.messages) <= after:
            with trio.move_on_after(0.05):
                await self._more.wait()
        return self.messages[after : after + 2]

    async def last(self) -> int:
        return len(self.messages)


class NoSpans:
    """Streams whose messages were deleted."""

    def __init__(self) -> None:
        self.appended: list[int] = []
        """The partitions of the messages that were appended."""

    async def append(self, partition: int, data: bytes, message_id: str) -> int:
        await trio.lowlevel.checkpoint()
        self.appended.append(partition)
        return LAST_SPANS

    def read_many(self, tenant: str, positions: Any) -> list[FrameMissing]:
        return [FrameMissing("deleted") for _ in positions]

    async def last(self, partition: int) -> int:
        return 0


class NoNats:
    """A client that never reaches a server."""

    async def call(self, make: Any, seconds: float | None = None) -> Any:
        raise NatsUnavailable("this test has no server")


class MemoryBucket:
    """A bucket in memory."""

    def __init__(self) -> None:
        self.latest: dict[str, Entry] = {}
        self.revision = 0
        self.unavailable = False
        self._moved = trio.Event()

    @property
    def values(self) -> dict[str, bytes | None]:
        return {key: entry.value for key, entry in self.latest.items()}

    async def get(self, key: str) -> Entry | None:
        await self._answer()
        return self.latest.get(key)

    async def put(self, key: str, value: bytes, expected_revision: int | None = None) -> int:
        await self._answer()
        known = self.latest.get(key)
        if expected_revision not in (None, known.revision if known else 0):
            raise Conflict(key)
        self.revision += 1
        self.latest[key] = Entry(key, value, self.revision)
        self._moved.set()
        self._moved = trio.Event()
        return self.revision

    async def entries(self, prefix: str = "") -> list[Entry]:
        await self._answer()
        return [entry for key, entry in self.latest.items() if key.startswith(prefix)]

    async def watch(self, prefix: str = "") -> AsyncIterator[Entry]:
        after = 0
        while True:
            moved = self._moved
            for entry in sorted(self.latest.values(), key=lambda each: each.revision):
                if entry.revision > after and entry.key.startswith(prefix):
                    after = entry.revision
                    yield entry
            await moved.wait()

    async def _answer(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.unavailable:
            raise NatsUnavailable("this test has no quorum")


class FedNode:
    """The streams of a cluster with two partitions, which query nodes read."""

    def __init__(self) -> None:
        self.outs = {0: ListedOut(), 1: ListedOut()}
        self.bucket = MemoryBucket()
        self.nats = FakeNats()
        self.spans = NoSpans()
        self.partitions = PartitionMap(self.bucket, Generations.of(2))  # type: ignore[arg-type]
        self.paused_edges = 0  # the revision at which the edges are paused
        self.open: dict[tuple[int, str, str], DueTraces] = {}
        """What the owners have in memory, by partition, tenant and trace."""
        self.owner_is_away = False
        self.identity = "first"

    def connection(self, name: str = "query-1") -> ClusterConnection:
        async def owners() -> dict[str, str]:
            return {"partition.0": "evaluator-1", "duty.alerts": name}

        async def epoch(partition: int) -> Epoch:
            return Epoch(partition, 1, "evaluator-1")

        view = FakeNode(self.nats, name)
        leases = FakeBucket(view, "leases")
        return ClusterConnection(
            name=name,
            roles=("query",),
            identity=self.identity,
            client=NoNats(),  # type: ignore[arg-type]
            spans=self.spans,  # type: ignore[arg-type]
            partitions=self.partitions,
            out=lambda partition: self.outs[partition],
            last=lambda partition: self.outs[partition].last(),
            epoch=epoch,
            owners=owners,
            config=self.bucket,  # type: ignore[arg-type]
            shared=FakeBucket(view, "query"),  # type: ignore[arg-type]
            duties=Duties(leases, name, DutyTimes(0.6, 0.2)),  # type: ignore[arg-type]
            recent=RecentOutput(2),
            index_subject="betrace.index",
            open_traces=RemoteOpenTraces(self._owner, self.partitions.holder_of),
            others=self,
            tenants=TenantFeed(self.bucket),  # type: ignore[arg-type]
        )

    def role_components(self) -> dict[str, Any]:
        return {"edge": {"status": "ok", "detail": "open"}}

    def members(self) -> list[dict[str, Any]]:
        return [{"name": "query-1", "roles": ["query"], "draining": False}]

    def edges_are_paused(self, revision: int) -> bool:
        return self.paused_edges >= revision

    def role_metrics(self) -> list[Metric]:
        return [CounterMetricFamily("betrace_span_ingestion", "Spans.", 77)]

    def _owner(self, partition: int, data: bytes) -> bytes:
        if self.owner_is_away:
            raise NatsUnavailable("no owner")
        answer = open_traces_answer(lambda *key: self.open.get(key))(f"x.trace.{partition}", data)
        assert answer is not None
        return answer

    @asynccontextmanager
    async def running(
        self, config: Settings, *, die: bool = False, name: str = "query-1"
    ) -> AsyncIterator[Service]:
        """A query node; at the end it drains, or dies without saving anything."""
        with ExitStack() as stack:
            connection = self.connection(name)
            service = open_query_service(config, stack)(connection)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.tenants.run)
                async with served(service, die=die):
                    yield service
                nursery.cancel_scope.cancel()

    async def applied(self, service: Service) -> None:
        """Return when the node has stored everything."""
        assert service.node is not None
        with trio.fail_after(60):
            while any(
                service.node.positions.get(p) < len(out.messages) for p, out in self.outs.items()
            ):
                await trio.sleep(0.01)
