"""A process of a cluster: runs some of the roles edge, evaluator and query.

A query node is the service of one process, which is fed from the partitions' ``OUT`` streams in
place of received spans. A process without this role serves only health and metrics.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, TypeVar

import trio
from prometheus_client.core import Metric

from betrace.channels import ThreadRunner
from betrace.service.api.asgi import serve
from betrace.service.app import evaluator_metrics
from betrace.service.app.builder import open_query_service, open_tenants
from betrace.service.app.edge import Edge, EdgeAddresses
from betrace.service.app.evaluator import EvaluatorNode, open_evaluator
from betrace.service.app.query import connect_query
from betrace.service.app.roles import Role, kernels_of
from betrace.service.app.service import Addresses, Service
from betrace.service.app.status import NodeStatus, StatusApp
from betrace.service.cluster.edge.tenants import TenantCopy
from betrace.service.cluster.evaluator.evaluator import Evaluator
from betrace.service.cluster.membership import Membership
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query.node import ClusterConnection
from betrace.service.cluster.query.open_traces import (
    open_trace_subject,
    open_traces_answer,
)
from betrace.service.cluster.requests import serve_requests
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.config.base import OFF
from betrace.service.config.cluster import ClusterSettings
from betrace.service.config.settings import Settings
from betrace.service.pipeline.warmup import Compilation
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.configuration import cluster_id
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.generations import MOST_PARTITIONS
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.setup import check, other_number
from betrace.service.tenancy.gate import Gate
from betrace.service.tenancy.tenant import TenantState

_log = logging.getLogger("service.cluster")

Json = dict[str, Any]
T = TypeVar("T")

EVALUATING = 2  # partitions at the same time; more would wait for one another's interpreter lock
RETRY_SECONDS = 1.0  # between attempts to reach the servers at the start


class RolePart(Protocol):
    """What does the work of a role: the edge, the evaluator, or the service of a query node."""

    async def run(self, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until :meth:`stop`; starts when it is ready."""

    def stop(self) -> None:
        """Finish what is in work, then end :meth:`run`."""


def open_cluster(
    settings: Settings, roles: Sequence[Role], stack: ExitStack
) -> Callable[[], ClusterProcess]:
    """Open the stores that the roles need, which blocks, so call it before Trio runs. ``stack``
    closes them. Returns a function that makes the process within Trio."""
    settings.storage.path.mkdir(parents=True, exist_ok=True)
    make_query = open_query_service(settings, stack) if Role.QUERY in roles else None
    make_gate = None
    if make_query is None:
        make_gate = open_gate(settings, stack)
    return lambda: ClusterProcess(settings, roles, make_query, make_gate and make_gate())


def open_gate(settings: Settings, stack: ExitStack) -> Callable[[], Gate]:
    """Open the tenant directory of a process without a query role; returns what makes its gate."""
    directory, tokens = open_tenants(settings, stack)

    async def exists(name: str) -> bool:
        found = await trio.to_thread.run_sync(directory.get, name)
        return found is not None and found.state is TenantState.ACTIVE

    return lambda: Gate(settings, directory, tokens, exists)


def node_name(settings: ClusterSettings) -> str:
    """This process's name in the cluster."""
    return settings.node or f"{socket.gethostname().partition('.')[0]}-{os.getpid()}"


class ClusterProcess:
    """The roles of one process: connects to NATS, then starts and stops them in order.

    ``make_query`` builds the service of the query role; ``gate`` is for a process without it.
    """

    def __init__(
        self,
        settings: Settings,
        roles: Sequence[Role],
        make_query: Callable[[ClusterConnection], Service] | None,
        gate: Gate | None,
    ) -> None:
        assert settings.cluster is not None
        self._settings, self._cluster = settings, settings.cluster
        self._layout = Layout.of(settings.cluster)
        self.roles = tuple(roles)
        self.node = node_name(settings.cluster)
        self.state = "starting"
        """``starting``, ``ready``, ``draining`` or ``stopped``."""
        self.compilation = Compilation(kernels_of(roles))
        self._make_query = make_query
        self._gate = gate
        self.query: Service | None = None
        """The service of the query role, once it starts."""
        self._status: StatusApp | None = None
        self.edge: Edge | None = None
        self.evaluator: Evaluator | None = None
        self._membership: Membership
        self._partitions: PartitionMap
        self._running: dict[Role, tuple[RolePart, trio.Event]] = {}
        self._threads = ThreadRunner("cluster", 1)
        # A partition that waits for a query node keeps its thread for seconds, so each has one.
        self._evaluating = ThreadRunner("evaluate", MOST_PARTITIONS, busy=EVALUATING)
        self._stop = trio.Event()
        self._ended = trio.Event()  # closes the listeners

    # Running

    async def run(self, task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the roles until :meth:`stop`. Starts when all are ready, with the addresses."""
        client = await NatsClient.connect(self._cluster, f"betrace {self.node}")
        try:
            await self._check(client)
            config = ConfigBucket(client, self._layout.config_bucket)
            self._partitions = PartitionMap(config, self._layout.generations)
            await self._partitions.load()
            async with trio.open_nursery() as nursery:
                addresses = await self._start(nursery, client)
                self.state = "ready"
                task_status.started(addresses)
                await self._stop.wait()
                self.state = "draining"
                for role in Role:  # first the edge, so that everything it accepted goes on
                    if role in self._running:
                        part, ended = self._running[role]
                        part.stop()
                        await ended.wait()
                await self._membership.leave()
                self._ended.set()
                nursery.cancel_scope.cancel()
        finally:
            await client.close()
        self.state = "stopped"

    async def _check(self, client: NatsClient) -> None:
        """Check the streams, and wait while there is no quorum. Raises what
        :func:`~betrace.service.storage.jetstream.setup.check` raises."""
        generations = await _patiently(lambda: check(client, self._cluster))
        self._layout = Layout.of(self._cluster, generations)
        if generations.current.count != self._cluster.partitions:
            _log.warning("%s", other_number(generations, self._cluster))

    def stop(self) -> None:
        """Start to shut down."""
        self._stop.set()

    async def reload_rules(self) -> None:
        """Reload changed rule files now."""
        if self.query is not None:
            await self.query.reload_rules()

    def close(self) -> None:
        """End the worker threads; whoever opened the stores closes them."""
        if self.query is not None:
            self.query.close()
        if self.edge is not None:
            self.edge.close()
        if self._status is not None:
            self._status.close()
        if self._gate is not None:
            self._gate.close()
        self._evaluating.close()
        self._threads.close()

    async def _start(self, nursery: trio.Nursery, client: NatsClient) -> Addresses:
        """Start the roles: last the one that accepts spans."""
        gate = self._gate
        feed = TenantFeed(ConfigBucket(client, self._layout.config_bucket))
        nursery.start_soon(feed.run)
        membership = self._membership = self._make_membership(client)
        nursery.start_soon(membership.run)
        nursery.start_soon(self._partitions.run)
        if self._make_query is None:
            api, metrics = await self._serve_status(nursery, client)
            await self.compilation.run(self._threads)
        else:
            identity = await _patiently(lambda: cluster_id(feed.bucket))
            query = self.query = self._make_query(
                connect_query(
                    self._cluster,
                    self.node,
                    self.roles,
                    client,
                    self._partitions,
                    feed,
                    self,
                    identity,
                )
            )
            query.compilation, gate = self.compilation, query.gate
            found: Addresses = await self._start_part(nursery, Role.QUERY, query)
            api, metrics = found.api, found.metrics
        if Role.EVALUATOR in self.roles:
            node = EvaluatorNode(
                self.node, client, self._layout, self._partitions, membership, self._evaluating
            )
            self.evaluator = open_evaluator(self._settings, node)
            await self._start_part(nursery, Role.EVALUATOR, self.evaluator)
            subject = open_trace_subject(self._layout.prefix, "*")
            answer = open_traces_answer(self.evaluator.look_up)
            nursery.start_soon(serve_requests, client, subject, "", answer)
        ingest = grpc = None
        if Role.EDGE in self.roles:
            assert gate is not None
            if gate is self._gate:  # otherwise the query node keeps it up to date
                await nursery.start(TenantCopy(gate, feed, self._threads).run)
            self.edge = edge = Edge(
                self._settings, client, self._layout, self._partitions, gate, feed
            )
            membership.paused_at = lambda: edge.paused_at
            spans: EdgeAddresses = await self._start_part(nursery, Role.EDGE, self.edge)
            ingest, grpc = spans.ingest, spans.grpc
        return Addresses(ingest, grpc, api, metrics)

    async def _start_part(self, nursery: trio.Nursery, role: Role, part: RolePart) -> Any:
        """Run a part; returns what it starts with."""
        ended = trio.Event()

        async def run(task_status: trio.TaskStatus[Any]) -> None:
            await part.run(task_status=task_status)
            ended.set()

        found = await nursery.start(run)
        self._running[role] = part, ended
        return found

    # Parts

    def _make_membership(self, client: NatsClient) -> Membership:
        bucket = ConfigBucket(client, self._layout.members_bucket)
        seconds = self._cluster.lease_seconds, self._cluster.heartbeat_seconds
        return Membership(bucket, self.node, tuple(self.roles), *seconds)

    # Health and metrics

    async def _serve_status(
        self, nursery: trio.Nursery, client: NatsClient
    ) -> tuple[str | None, str | None]:
        """Serve health and metrics at the addresses of the API and of the metrics."""
        app = StatusApp(
            NodeStatus(
                self.node,
                self.roles,
                lambda: self.state,
                partial(self._components, client),
                self.role_metrics,
                None if self._gate is None else self._gate.authenticator,
            )
        )
        self._status = app
        urls: list[str | None] = []
        for address in (self._settings.api.address, self._settings.metrics.address):
            if address == OFF:
                urls.append(None)
                continue
            listener = partial(
                serve,
                tls=self._settings.tls,
                max_connections=self._settings.api.max_connections,
                grace_seconds=1,
            )
            urls.append(await nursery.start(listener, app, address, self._ended))
        return urls[0], urls[1]

    def _components(self, client: NatsClient) -> dict[str, Json]:
        connected = client.connected
        return {
            "nats": {
                "status": "ok" if connected else "failed",
                "detail": f"{'connected' if connected else 'not connected'}; "
                f"{client.reconnects} reconnects",
            },
            **self.role_components(),
        }

    def role_components(self) -> dict[str, Json]:
        """The status of the edge and of the evaluator."""
        found: dict[str, Json] = {}
        if self.edge is not None:
            found["edge"] = self.edge.component()
        if self.evaluator is not None:
            found["evaluator"] = {
                "status": "ok",
                "detail": f"owns {len(self.evaluator.owned)} of "
                f"{len(self.evaluator.active_statuses)} partitions",
            }
        return found

    def members(self) -> list[Json]:
        """The nodes of the cluster that are alive, as JSON."""
        return [
            {"name": each.name, "roles": list(each.roles), "draining": each.draining}
            for each in self._membership.alive().values()
        ]

    def edges_are_paused(self, revision: int) -> bool:
        """Whether all edges have stored what they received before ingestion was paused by the entry
        with this revision."""
        edges = self._membership.alive(Role.EDGE).values()
        return all(each.paused_at >= revision for each in edges)

    def role_metrics(self) -> Iterator[Metric]:
        """The metrics of the edge and of the evaluator."""
        if self.edge is not None:
            yield from self.edge.metrics()
        if self.evaluator is not None:
            yield from evaluator_metrics.read(self.evaluator.active_statuses)


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What the servers answer; waits while they are unavailable."""
    while True:
        try:
            return await ask()
        except NatsUnavailable as error:
            _log.warning("waiting for the NATS servers: %s", error)
            await trio.sleep(RETRY_SECONDS)
