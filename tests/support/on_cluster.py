"""Runs what tests take for one process as a cluster: all roles in one process, on a NATS server.

``pytest --cluster`` does so for every test that uses :mod:`tests.support.inprocess` or
:mod:`tests.support.process`; tests marked ``also_on_cluster`` always run both ways
(``tests/conftest.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from betrace.service.app.builder import open_query_service
from betrace.service.app.cluster import ClusterProcess, open_cluster
from betrace.service.app.roles import Role
from betrace.service.app.service import Service
from betrace.service.cluster.evaluator import output_writer
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.cluster.query import rules as published
from betrace.service.cluster.query.open_traces import RemoteOpenTraces, open_traces_answer
from betrace.service.cluster.rule_keys import RULES_PREFIX, rules_key
from betrace.service.config.cluster import ClusterSettings
from betrace.service.config.settings import Settings
from betrace.service.otlp.body import BadBody, protobuf_body
from betrace.service.otlp.encoding import Body
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.request import Request
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import Spans, TenantFrame, pack
from betrace.service.storage.jetstream.layout import Layout, pack_log_position
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.spanlog.frames import Frame
from tests.support.inprocess import threads_ended
from tests.support.nats_servers import NatsServers, connected
from tests.support.query_nodes import FedNode

PARTITIONS = 2


class OnCluster:
    """Where services run. Each data directory has streams of its own on the server, so a service
    that starts again on a directory continues."""

    def __init__(self, servers: NatsServers) -> None:
        self._servers = servers
        self._made: set[str] = set()

    def section(self, data: Path) -> ClusterSettings:
        """The section [cluster] of a service with this data directory."""
        name = hashlib.blake2b(str(data.absolute()).encode(), digest_size=8).hexdigest()
        more = {"partitions": PARTITIONS, "tick_seconds": 0.1, "node": "all"}
        return self._servers.settings(prefix=f"t{name}", **more)

    def _settings(self, config: Settings) -> Settings:
        return config.model_copy(update={"cluster": self.section(config.storage.path)})

    # In this process

    @contextmanager
    def opened(self, config: Settings) -> Iterator[Service]:
        """A query node without servers, of which only what follows the buckets runs. It is closed
        a moment after the block ends."""
        with ExitStack() as stack:
            connection = FedNode().connection()
            service = open_query_service(self._settings(config), stack)(connection)
            service.registry.store.load()
            scope = trio.CancelScope()
            trio.lowlevel.spawn_system_task(_follow, service, scope, stack.pop_all())
        try:
            yield service
        finally:
            scope.cancel()

    @asynccontextmanager
    async def running(self, config: Settings, *, die: bool) -> AsyncIterator[Service]:
        """The service of the query role; at the end all roles stop, or die."""
        config = self._settings(config)
        await self._set_up(config.cluster)
        with ExitStack() as stack:
            process = open_cluster(config, tuple(Role), stack)()
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(process.run)
                    assert process.query is not None
                    yield process.query
                    if die:
                        nursery.cancel_scope.cancel()
                    else:
                        process.stop()
            finally:
                if process.query is not None:
                    await threads_ended(process.query)
                process.close()

    async def _set_up(self, settings: ClusterSettings | None) -> None:
        assert settings is not None
        if settings.prefix not in self._made:
            self._made.add(settings.prefix)
            async with connected(settings):
                pass

    async def send(self, service: Service, request: Request) -> None:
        """Give a request to the edge once the present rules are in force, as they are at once in
        one process."""
        process = process_of(service)
        await _rules_in_force(process)
        assert process.edge is not None
        await process.edge.requests.send(request)

    async def folded(self, service: Service) -> None:
        """Return when all accepted spans are in their traces."""
        await _until(service, lambda state: True)

    async def closed(self, service: Service) -> None:
        """Return when no trace is open and everything is stored."""
        await _until(service, lambda state: state.at_rest, stored=True)

    # In processes of their own

    def serve_options(self, data: Path) -> tuple[list[str], dict[str, str]]:
        """Options and settings with which ``betrace serve`` is a cluster. Creates its streams."""
        section = self.section(data)
        if section.prefix not in self._made:
            trio.run(self._set_up, section)
        names = ("servers", "prefix", "partitions", "replicas", "tick_seconds", "node")
        settings = {f"cluster__{name}": str(getattr(section, name)) for name in names}
        return ["--role", "edge,evaluator,query"], settings

    # Parts

    @asynccontextmanager
    async def span_log(self, directory: Path) -> AsyncIterator[StreamLog]:
        """A span log on the server."""
        section = self.section(directory)
        self._made.add(section.prefix)
        async with connected(section) as client:
            yield StreamLog(client, Layout.of(section))

    async def delete_streams(self) -> None:
        """Delete the streams of all services."""
        settings = self._servers.settings(partitions=PARTITIONS)
        client = await NatsClient.connect(settings, "test")
        try:
            for prefix in self._made:
                layout = Layout.of(settings.model_copy(update={"prefix": prefix}))
                for stream in layout.streams():
                    name = f"STREAM.DELETE.{stream['name']}"
                    await client.call(lambda nats, name=name: nats.api(name))
        finally:
            self._made.clear()
            await client.close()


class StreamLog(SpanStreams):
    """The streams of spans with the methods of a local log that tests use. All spans are in one
    partition."""

    def append(  # type: ignore[override]
        self, tenant: str, frames: Sequence[Frame]
    ) -> list[int]:
        """Append what an edge would append for each frame; returns the positions. A frame that
        cannot be decoded, which an edge refuses, is appended as it is. Blocks."""
        return [self._append(tenant, frame) for frame in frames]

    def _append(self, tenant: str, frame: Frame) -> int:
        payload = bytes(frame.payload)
        body: Body | bytes = payload
        with suppress(BadBody):
            body = protobuf_body(payload, frame.content_type, frame.encoding, 1 << 30)
        data = pack(Spans([TenantFrame(tenant, frame.received_ns, frame.spans, bytes(body))]))
        subject = self._layout.spans_subject(0)
        sequence = self._client.call_blocking(lambda nats: nats.publish(subject, data, {}))
        return pack_log_position(0, sequence)

    def delete_tenant(self, tenant: str) -> None:
        """Delete all messages. Blocks."""
        name = f"STREAM.PURGE.{self._layout.spans_stream(0)}"
        self._client.call_blocking(lambda nats: nats.api(name, {}))


def remote(traces: OpenTraces) -> RemoteOpenTraces:
    """These traces as a query node sees those of an evaluator."""
    answer = open_traces_answer(lambda _, tenant, trace_id: traces.look_up(tenant, trace_id))

    def ask(partition: int, data: bytes) -> bytes:
        found = answer(f"x.trace.{partition}", data)
        assert found is not None
        return found

    return RemoteOpenTraces(ask, PARTITIONS)


async def _follow(service: Service, scope: trio.CancelScope, stores: ExitStack) -> None:
    """Run what follows the buckets until the scope is cancelled, and close the service."""
    assert service.node is not None
    with stores, suppress(Exception):
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(service.node.cluster.tenants.run)
                    nursery.start_soon(service.node.run)
        finally:
            service.close()


def process_of(service: Service) -> ClusterProcess:
    """The process whose query role this is."""
    assert service.node is not None
    found = service.node.cluster.others
    assert isinstance(found, ClusterProcess)
    return found


def states(process: ClusterProcess) -> list[PartitionState] | None:
    """The state of each partition; None until the evaluator has them all."""
    assert process.evaluator is not None
    running = process.evaluator._running
    found = [running[p].owner.state for p in range(PARTITIONS) if p in running]
    present = [state for state in found if state is not None]
    return present if len(present) == PARTITIONS else None


async def _rules_in_force(process: ClusterProcess) -> None:
    """Wait until the partitions have the rules of the query node."""
    service = process.query
    assert service is not None
    assert service.node is not None
    node, store = service.node, service.registry.store
    with trio.fail_after(60):
        while True:
            entries = await node.cluster.config.entries(RULES_PREFIX)
            values = {entry.key: entry.value for entry in entries}
            complete = bool(store.shared()) or all(
                values.get(rules_key(tenant)) == published.definitions_of(rules)
                for tenant, rules in store.all_rules().items()
            )
            wanted = {entry.key.removeprefix(RULES_PREFIX): entry.revision for entry in entries}
            if complete and node.rules._announced and _have(states(process), wanted):
                return
            await trio.sleep(0.02)


def _have(found: list[PartitionState] | None, wanted: dict[str, int]) -> bool:
    return found is not None and all(
        state.rules_revisions.get(tenant, 0) >= revision
        for state in found
        for tenant, revision in wanted.items()
    )


async def _until(
    service: Service, reached: Callable[[PartitionState], bool], *, stored: bool = False
) -> None:
    """Wait until all partitions have applied their logs and are as wanted; ``stored``: and the
    query node has stored everything."""
    still = 0
    with trio.fail_after(60):
        while still < 3:
            await trio.sleep(0.02)
            still = still + 1 if await _reached(service, reached, stored) else 0


async def _reached(
    service: Service, reached: Callable[[PartitionState], bool], stored: bool
) -> bool:
    process, node = process_of(service), service.node
    found = states(process)
    if found is None or node is None or process.evaluator is None:
        return False
    for state in found:
        last = await node.cluster.spans.last(state.partition)
        if state.applied < last or not reached(state):
            return False
        work = process.evaluator._running[state.partition].owner._work
        if stored and (work is None or work._writer._in_flight or work._writer._has_new):
            return False
        if stored and node.positions.get(state.partition) < await node.cluster.last(
            state.partition
        ):
            return False
    return not stored or not len(service.pipeline.in_flight)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make waiting times short that tests would wait for."""
    monkeypatch.setattr(output_writer, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(published, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(published, "POLL_SECONDS", 0.05)
