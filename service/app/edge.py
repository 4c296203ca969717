"""The role *edge* of a cluster: receives spans and appends them to the partitions' logs.

An edge has no state of its own, so there can be any number, and one that is killed loses nothing
that it acknowledged.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import trio
from prometheus_client.core import Metric

from betrace.channels import (
    ReceiveChannel,
    SendChannel,
    Stage,
    StageOptions,
    ThreadRunner,
    open_channel,
)
from betrace.service.app import edge_metrics
from betrace.service.cluster.edge.group_commit import GroupCommit
from betrace.service.cluster.edge.ingest import EdgeIngest, group_bytes
from betrace.service.cluster.edge.quota_exchange import DemandShares, QuotaExchange
from betrace.service.cluster.edge.tenants import IngestTenants
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.config.settings import Settings
from betrace.service.otlp import split, wire
from betrace.service.pipeline.build import INGEST_ENOUGH, INGEST_INTERVAL, open_batch_audit
from betrace.service.pipeline.request import Request
from betrace.service.receiver.admission import Admission, TenantStates
from betrace.service.receiver.listeners import listen_for_spans
from betrace.service.receiver.server import ARRIVAL_SHARE
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.tenancy.gate import Gate

_WORKERS = 256  # batches of requests that wait for the log at the same time
_IN_FLIGHT = 10
"""An edge holds this many times ``pipeline.ingest_capacity_spans``, because spans take their
capacity until the log has acknowledged them."""


@dataclass(frozen=True, slots=True)
class EdgeAddresses:
    """The URLs on which an edge takes spans; None for a listener that is off."""

    ingest: str | None
    grpc: str | None


class Edge:
    """Built within Trio. ``gate`` says who is let in, ``feed`` keeps it up to date, and
    ``partitions`` are those that spans go to; their owner runs and closes them."""

    def __init__(
        self,
        settings: Settings,
        client: NatsClient,
        layout: Layout,
        partitions: PartitionMap,
        gate: Gate,
        feed: TenantFeed,
    ) -> None:
        self._settings = settings
        self._client = client
        pipeline, max_body = settings.pipeline, settings.ingest.max_body_bytes
        self._threads = ThreadRunner("ingest", pipeline.ingest_workers)
        self.commit = GroupCommit(
            SpanStreams(client, layout),
            layout.partitions,
            self._threads,
            group_bytes(client.max_payload),
            settings.ingest.max_buffered_bytes,
        )
        self._audit = open_batch_audit(settings)
        self._tenants, self._feed = IngestTenants(gate, feed), feed
        self.ingest = EdgeIngest(
            self.commit,
            self._threads,
            lambda: partitions.current,
            max_body,
            self._audit,
            self._tenants,
        )
        capacity = _IN_FLIGHT * pipeline.ingest_capacity_spans
        channel: tuple[SendChannel[Request], ReceiveChannel[Request]] = open_channel(
            "span-ingestion", capacity, lambda request: request.weight, hold=True
        )
        self.requests, receive = channel
        self.stage: Stage[Request] = Stage(
            "span-ingestion",
            receive,
            self.ingest.handle,
            StageOptions(
                workers=_WORKERS,
                max_batch_weight=pipeline.ingest_batch_spans,
                on_dead=self.ingest.refuse,
                attempts=2,
                retry_delay=0.01,
                interval=INGEST_INTERVAL,
                enough=INGEST_ENOUGH,
                adapts=True,
            ),
        )
        self.admission = Admission(
            settings.ingest,
            self.requests,
            gate.quotas,
            gate.authenticator,
            capacity=capacity,
            tenants=TenantStates(gate.closed, limit=gate.tenant_limit),
        )
        shares = DemandShares(gate.quotas, uuid.uuid4().hex)
        self._quotas = QuotaExchange(shares, client, layout.quotas_subject)
        self._stop = trio.Event()

    async def run(
        self, task_status: trio.TaskStatus[EdgeAddresses] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take spans until :meth:`stop`, then drain: refuse new requests and answer those that
        arrived. Starts with the addresses, when it is ready."""
        await self._threads.run(warm_up, abandon_on_cancel=True)
        async with trio.open_nursery() as recording:
            if self._audit is not None:
                recording.start_soon(self._audit.run)
            await self._serve(task_status)
            if self._audit is not None:
                self._audit.close()  # it ends when everything is written

    async def _serve(self, task_status: trio.TaskStatus[EdgeAddresses]) -> None:
        stop_listeners = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.commit.run)
            await nursery.start(self._quotas.run)
            nursery.start_soon(self._tenants.run)
            self._feed.subscribe_paused(self._pause)
            async with trio.open_nursery() as stages:
                await stages.start(self.stage.run)
                addresses = await listen_for_spans(
                    nursery, self.admission, self._settings, stop_listeners
                )
                task_status.started(EdgeAddresses(*addresses))
                await self._stop.wait()
                await self._drain(nursery, stop_listeners)
            await self.commit.drained()
            nursery.cancel_scope.cancel()

    def _pause(self, paused: bool) -> None:
        """Refuse requests while an operator has paused ingestion."""
        if self.admission.state != "draining":
            if paused:
                self.admission.pause()
            else:
                self.admission.resume()

    @property
    def paused_at(self) -> int:
        """The revision of the entry by which ingestion is paused, once everything that was received
        before is stored; else 0."""
        busy = self.admission.unanswered or self.commit.buffered_bytes
        if busy or not self._feed.paused or self.admission.state == "open":
            return 0
        return self._feed.ingestion_revision

    async def _drain(self, nursery: trio.Nursery, stop_listeners: trio.Event) -> None:
        shutdown = self._settings.shutdown
        grace = shutdown.grace_seconds
        await trio.sleep(shutdown.delay_seconds)
        nursery.cancel_scope.deadline = trio.current_time() + grace
        self.admission.drain()
        stop_listeners.set()
        with trio.move_on_after(ARRIVAL_SHARE * grace):
            await self.admission.settled()
        self.requests.close()

    def stop(self) -> None:
        """Start to shut down; :meth:`run` ends when every request is answered."""
        self._stop.set()

    def close(self) -> None:
        """End the worker threads, after :meth:`run`."""
        self._threads.close()
        if self._audit is not None:
            self._audit.close_threads()

    def component(self) -> dict[str, Any]:
        """The status for health checks: ok, degraded or failed, and why."""
        unavailable = self.commit.unavailable()
        if not self._client.connected:
            return {"status": "failed", "detail": "there is no connection to a NATS server"}
        if unavailable:
            return {
                "status": "degraded",
                "detail": f"partitions that take no spans now: {', '.join(map(str, unavailable))}",
            }
        return {"status": "ok", "detail": f"ingestion is {self.admission.state}"}

    def metrics(self) -> Iterator[Metric]:
        """The metrics of the edge, without those of the process."""
        state = edge_metrics.EdgeState(self.ingest.counts, self.admission, self.commit)
        return edge_metrics.read(state)


def warm_up() -> None:
    """Compile the kernels of an edge, or load them from the cache on disk, except those of JSON,
    which its process compiles earlier."""
    wire.warm_up()
    split.warm_up()
