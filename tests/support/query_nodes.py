"""A query node in this process, fed from lists in place of streams. For tests only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import trio
from prometheus_client.core import CounterMetricFamily, Metric

from betrace.service.app.builder import open_query_service
from betrace.service.app.service import Service
from betrace.service.cluster import output
from betrace.service.cluster.duty import Duties, DutyTimes
from betrace.service.cluster.query.node import ClusterConnection
from betrace.service.cluster.query.open_traces import (
    RemoteOpenTraces,
    open_traces_answer,
)
from betrace.service.cluster.query.recent_signals import RecentSignals
from betrace.service.config.settings import Settings
from betrace.service.storage.jetstream.bucket import Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.fenced import Epoch
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.storage.spanlog.errors import FrameMissing
from betrace.service.traces.due import DueTraces
from betrace.service.traces.verdicts import Decided
from tests.support.cluster_fakes import FakeBucket, FakeNats, FakeNode
from tests.support.inprocess import served


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

    def read_many(self, tenant: str, positions: Any) -> list[FrameMissing]:
        return [FrameMissing("deleted") for _ in positions]

    async def last(self, partition: int) -> int:
        return 0


class NoNats:
    """A client that never reaches a server."""

    async def call(self, make: Any, seconds: float | None = None) -> Any:
        raise NatsUnavailable("this test has no server")


class EmptyBucket:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    async def get(self, key: str) -> None:
        return None

    async def put(self, key: str, value: bytes, expected_revision: int | None = None) -> int:
        self.values[key] = value
        return len(self.values)

    async def watch(self, prefix: str = "") -> AsyncIterator[Entry]:
        await trio.sleep_forever()
        yield Entry("", None, 0)


class FedNode:
    """The streams of a cluster with two partitions, which query nodes read."""

    def __init__(self) -> None:
        self.outs = {0: ListedOut(), 1: ListedOut()}
        self.bucket = EmptyBucket()
        self.nats = FakeNats()
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
            spans=NoSpans(),  # type: ignore[arg-type]
            outs=dict(self.outs),
            last=lambda partition: self.outs[partition].last(),
            epoch=epoch,
            owners=owners,
            config=self.bucket,  # type: ignore[arg-type]
            shared=FakeBucket(view, "query"),  # type: ignore[arg-type]
            duties=Duties(leases, name, DutyTimes(0.6, 0.2)),  # type: ignore[arg-type]
            recent=RecentSignals(2),
            index_subject="betrace.index",
            open_traces=RemoteOpenTraces(self._owner, 2),
            others=self,
        )

    def role_components(self) -> dict[str, Any]:
        return {"edge": {"status": "ok", "detail": "open"}}

    def members(self) -> list[dict[str, Any]]:
        return [{"name": "query-1", "roles": ["query"], "draining": False}]

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
            service = open_query_service(config, stack)(self.connection(name))
            async with served(service, die=die):
                yield service

    async def applied(self, service: Service) -> None:
        """Return when the node has stored everything."""
        assert service.node is not None
        with trio.fail_after(60):
            while any(
                service.node.positions.get(p) < len(out.messages) for p, out in self.outs.items()
            ):
                await trio.sleep(0.01)
