"""The running service: starts and stops its parts in order."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import trio

from betrace.channels import ThreadRunner
from betrace.service.api.app import create_api
from betrace.service.api.asgi import serve
from betrace.service.api.cache_control import CacheControl
from betrace.service.api.endpoint import Tools
from betrace.service.api.metrics.listener import metrics_app
from betrace.service.api.sources import Sources
from betrace.service.api.subscriptions import Subscriptions
from betrace.service.api.tenant_administration import TenantAdministration
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.config.base import OFF
from betrace.service.config.settings import Settings
from betrace.service.export.alerts.alerts import Alerts
from betrace.service.export.daily import Daily
from betrace.service.export.destinations import Exports
from betrace.service.pipeline.pipeline import Pipeline
from betrace.service.pipeline.recovery.rebuild import Rebuild
from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.pipeline.recovery.removal import Removal
from betrace.service.pipeline.recovery.scrub import Scrub
from betrace.service.pipeline.warmup import Compilation
from betrace.service.pipeline.watch import Watch
from betrace.service.receiver.admission import Admission
from betrace.service.receiver.listeners import listen_for_spans
from betrace.service.receiver.server import ARRIVAL_SHARE
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.watch import RuleWatch
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import Ledger
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.telemetry import events
from betrace.service.telemetry.latencies import Latencies
from betrace.service.tenancy.gate import Gate

if TYPE_CHECKING:
    from betrace.service.cluster.query.node import QueryNode

_log = logging.getLogger("service")

_REPAIR_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Addresses:
    """The URLs on which the service listens; None for a listener that is off."""

    ingest: str | None
    grpc: str | None
    api: str | None
    metrics: str | None


@dataclass(kw_only=True, eq=False)
class Service:
    """The parts of the service, and what runs them. Use :func:`open_service` to make one."""

    settings: Settings
    log: SpanLog
    registry: RuleRegistry
    ledger: Ledger
    store: DuckStore
    latencies: Latencies
    gate: Gate
    exports: Exports
    alerts: Alerts
    subscriptions: Subscriptions
    pipeline: Pipeline
    admission: Admission

    recovery: Recovery
    rebuild: Rebuild
    removal: Removal
    daily: Daily
    scrub: Scrub
    rule_watch: RuleWatch
    watch: Watch

    trace_metadata: TraceMetadataCache
    caches: CacheControl
    tenants: TenantAdministration
    sources: Sources
    tools: Tools

    threads: ThreadRunner
    cache_thread: ThreadRunner
    rebuild_thread: ThreadRunner = field(default_factory=lambda: ThreadRunner("rebuild", 1))
    node: QueryNode | None = None
    """What feeds the stores of a query node, in place of received spans."""

    compilation: Compilation = field(default_factory=Compilation, init=False)
    state: str = field(default="starting", init=False)
    """``starting``, ``ready``, ``draining`` or ``stopped``."""
    _stop: trio.Event = field(default_factory=trio.Event, init=False)

    # Running

    async def run(self, task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`stop`, then drain. Starts when ready, with the addresses."""
        events.STARTING(
            version=version("betrace"), data=self.settings.storage.path, pid=os.getpid()
        )
        stop_api, stop_ingest = trio.Event(), trio.Event()
        async with trio.open_nursery() as outer:
            api, metrics = await self._serve_api(outer, stop_api)
            await self._prepare(outer)
            async with trio.open_nursery() as inner:
                await self._recover(inner)
                self._start_upkeep(inner)
                ingest = grpc = None
                if self.node is None:  # spans come to the edges
                    ingest, grpc = await listen_for_spans(
                        inner, self.admission, self.settings, stop_ingest
                    )
                self.state = "ready"
                events.READY(
                    seconds=time.time() - self.sources.started_at,
                    ingest=ingest,
                    grpc=grpc,
                    api=api,
                    metrics=metrics,
                )
                task_status.started(Addresses(ingest, grpc, api, metrics))
                await self._stop.wait()
                await self._drain(inner, stop_ingest)
                inner.cancel_scope.cancel()
            self.subscriptions.close()
            stop_api.set()
            outer.cancel_scope.cancel()
        self.state = "stopped"
        events.STOPPED(
            seconds=time.time() - self.sources.started_at, left=self.sources.account().in_flight
        )

    def stop(self) -> None:
        """Start to shut down."""
        self._stop.set()

    async def reload_rules(self) -> None:
        """Reload changed rule files now."""
        await self.rule_watch.reload()

    async def _serve_api(
        self, nursery: trio.Nursery, stop: trio.Event
    ) -> tuple[str | None, str | None]:
        """Serve the API and the metrics; returns their URLs."""
        settings, guard = self.settings, self.gate.authenticator
        api = create_api(self.tools, guard, self.gate.closed)
        metrics = metrics_app(self.tools.exposition, guard)
        return (
            await self._listen(nursery, api, settings.api.address, stop),
            await self._listen(nursery, metrics, settings.metrics.address, stop),
        )

    async def _prepare(self, nursery: trio.Nursery) -> None:
        """Do what must be done before the traces are restored."""
        await self.compilation.run(self.threads)
        await self.threads.run(self.registry.store.load)
        nursery.start_soon(self.rule_watch.run)
        nursery.start_soon(self.latencies.recent.run)
        nursery.start_soon(self.latencies.watch_timers)
        nursery.start_soon(self.watch.run)
        nursery.start_soon(self.sources.data_directory.run)
        await self.removal.take_up()
        if await self.threads.run(self.rebuild.find):  # small enough to rebuild at once
            await self._rebuild()

    async def _recover(self, nursery: trio.Nursery) -> None:
        """Run the pipeline and bring it to where the last process stopped."""
        await nursery.start(self.pipeline.run)
        with self.pipeline.batches.clone() as onward:
            await self.recovery.recover(onward)
        await self.threads.run(self.rebuild.compare)
        await self.pipeline.stages["trace-correlation"].drained()
        await self.recovery.caught_up()
        if self.node is not None:
            nursery.start_soon(self.node.run)

    def _start_upkeep(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.removal.run)
        nursery.start_soon(self.trace_metadata.run, self.cache_thread)
        nursery.start_soon(self.caches.warm_up_after, self.settings.caches.warm_up_seconds)
        nursery.start_soon(self.recovery.every_interval)
        nursery.start_soon(self.daily.every_day)
        nursery.start_soon(self.exports.run)
        nursery.start_soon(self.alerts.run)
        if self.rebuild.pending:
            nursery.start_soon(self._rebuild)
        nursery.start_soon(self._repair)
        nursery.start_soon(self.scrub.run)

    async def _drain(self, nursery: trio.Nursery, stop_ingest: trio.Event) -> None:
        """Refuse new requests, process everything accepted, and save a checkpoint."""
        grace = self.settings.shutdown.grace_seconds
        self.state = "draining"
        events.DRAINING()
        self.rebuild.stop()
        await trio.sleep(self.settings.shutdown.delay_seconds)
        nursery.cancel_scope.deadline = trio.current_time() + grace
        self.admission.drain()
        stop_ingest.set()
        nursery.start_soon(self._report_drain)
        with trio.move_on_after(ARRIVAL_SHARE * grace):
            await self.admission.settled()
        if self.node is not None:
            await self.node.stop()
        self.pipeline.close()
        await self.pipeline.finished.wait()
        if self.node is not None:
            await self.node.save()
        await self.recovery.save(last=True)

    async def _report_drain(self) -> None:
        while True:
            await trio.sleep(2)
            left = [
                f"{s['name']} {s['currentSize']}"
                for s in self.tools.performance.fill()
                if s["currentSize"]
            ]
            _log.info("draining: %s", ", ".join(left) or "almost done")

    async def _rebuild(self) -> None:
        try:
            await self.rebuild_thread.run(self.rebuild.run, abandon_on_cancel=True)
        except trio.Cancelled:
            self.rebuild.stop()
            raise

    async def _repair(self) -> None:
        """Rebuild DuckDB files when damage is met."""
        while True:
            await trio.sleep(_REPAIR_SECONDS)
            if self.rebuild.due:
                await self.rebuild_thread.run(self.rebuild.repair, abandon_on_cancel=True)

    async def _listen(
        self, nursery: trio.Nursery, app: Any, address: str, stop: trio.Event
    ) -> str | None:
        if address == OFF:
            return None
        listener = partial(
            serve,
            tls=self.settings.tls,
            keep_alive_seconds=self.settings.ingest.keep_alive_seconds,
            max_connections=self.settings.api.max_connections,
            grace_seconds=self.settings.shutdown.grace_seconds,
        )
        url: str = await nursery.start(listener, app, address, stop)
        return url

    def close(self) -> None:
        """End the worker threads; :func:`open_service` closes the stores."""
        self.pipeline.close_threads()
        for part in (self.removal, self.gate, self.daily, self.scrub, self.exports, self.alerts):
            part.close()
        for runner in (self.threads, self.cache_thread, self.rebuild_thread):
            runner.close()
        self.tools.exposition.close()
        self.tools.threads.close()
        self.tools.computing.close()
