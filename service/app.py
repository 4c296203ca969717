"""The service: :func:`open_service` opens the stores, :func:`build` builds the parts from the
settings, and :meth:`Service.run` runs them until :meth:`Service.stop`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any

import trio

from betrace.channels import ThreadRunner
from betrace.service.api.app import create_api
from betrace.service.api.asgi import serve
from betrace.service.api.audit import AuditTrail
from betrace.service.api.cache_control import CacheControl
from betrace.service.api.endpoint import Tools
from betrace.service.api.metrics.exposition import Exposition
from betrace.service.api.metrics.listener import metrics_app
from betrace.service.api.performance import Performance
from betrace.service.api.rule_writer import RuleWriter
from betrace.service.api.signals_by_rule import SignalsByRule
from betrace.service.api.sources import Sources
from betrace.service.api.subscriptions import Subscriptions
from betrace.service.api.tenant_administration import TenantAdministration
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.api.trace_view import TraceReader
from betrace.service.config.base import OFF
from betrace.service.config.settings import Settings
from betrace.service.export.archiver import archive_directory
from betrace.service.export.daily import Daily
from betrace.service.export.destinations import Exports
from betrace.service.pipeline.breakers import Breakers
from betrace.service.pipeline.build import Stores, build_pipeline
from betrace.service.pipeline.data_directory import DataDirectory
from betrace.service.pipeline.pipeline import Pipeline
from betrace.service.pipeline.recovery.rebuild import Rebuild
from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.pipeline.recovery.removal import Removal
from betrace.service.pipeline.warmup import warm_up
from betrace.service.pipeline.watch import Watch
from betrace.service.receiver.admission import Edge
from betrace.service.receiver.grpc_server import serve_grpc
from betrace.service.receiver.server import ARRIVAL_SHARE, serve_ingest
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.rules.watch import RuleWatch
from betrace.service.signals import Signal
from betrace.service.storage.audit_log import AuditLog
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import Ledger
from betrace.service.storage.ledger.open import open_ledger
from betrace.service.storage.ledger.record import Record
from betrace.service.storage.local_stores import open_local_stores
from betrace.service.storage.paths import tenant_archive
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.open_files import affordable, raise_limit
from betrace.service.telemetry import events
from betrace.service.telemetry.latencies import Latencies
from betrace.service.tenancy.authentication import operator_token
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.gate import Gate

_log = logging.getLogger("service")

Json = dict[str, Any]


# Opening and building


def open_service(settings: Settings, stack: ExitStack) -> Callable[[], Service]:
    """Open the stores, which blocks, so call it before Trio runs. ``stack`` closes them. Returns a
    function that builds the service within Trio."""
    data = settings.storage.path
    data.mkdir(parents=True, exist_ok=True)
    raise_limit()
    stores = _open_stores(data, settings, stack)
    directory = TenantDirectory(data / "tenants.sqlite")
    stack.callback(directory.close)
    token = operator_token(settings.auth) if settings.auth.enabled else None
    return lambda: build(settings, stores, directory, token)


def _open_stores(data: Path, settings: Settings, stack: ExitStack) -> Stores:
    log = stack.enter_context(
        SpanLog(data, segment_bytes=settings.log.segment_bytes, open_files=affordable())
    )
    ledger = open_ledger(settings)
    stack.callback(ledger.close)
    duckdb = stack.enter_context(DuckStore(data, settings.duckdb))
    rules = Path(settings.rules.directory or data / "rules")
    if not settings.rules.directory:
        rules.mkdir(exist_ok=True)  # so that the default directory can be found and is no problem
    caches = settings.caches
    registry = RuleRegistry(
        RuleStore(rules), caches.rule_sets, caches.rule_sets_ttl_seconds, caches.rule_sets_bytes
    )
    return Stores(log, registry, ledger, duckdb, open_local_stores(data, settings, stack))


def build(
    settings: Settings, stores: Stores, directory: TenantDirectory, operator_token: str | None
) -> Service:
    """Build all parts, within Trio. ``operator_token`` is None if authentication is off."""
    data, max_body = settings.storage.path, settings.ingest.max_body_bytes
    log, registry, ledger, duckdb = stores.log, stores.registry, stores.ledger, stores.duckdb
    triage, undecided = stores.local.triage, stores.local.undecided
    threads, cache_thread = ThreadRunner("service", 2), ThreadRunner("caches", 1)
    clock_offset = time.time() - trio.current_time()

    def wall_time(trio_time: float) -> float:
        return trio_time + clock_offset

    # The way of spans and signals
    latencies = Latencies(window_seconds=settings.metrics.window_seconds, ledger_kind=ledger.kind)
    gate = Gate(settings, directory, operator_token, lambda name: tenants.exists(name))
    visible = gate.current_entries(ledger)  # without entries of deleted tenants
    breakers = Breakers(settings.breakers, settings.export.destinations)

    def muted(signal: Signal) -> bool:
        return triage.muted(signal.tenant, signal.rule_id, signal.detected_at)

    exports = Exports(settings, visible, breakers, muted)
    subscriptions = Subscriptions()

    rule_signals = SignalsByRule(registry.store.all_rules, settings.metrics.max_rule_series, muted)

    def recorded(signals: list[Signal]) -> None:
        rule_signals.add(signals)
        subscriptions.publish(signals)
        exports.notify(signals)

    pipeline = build_pipeline(settings, stores, breakers, recorded, latencies)
    edge = Edge(
        settings.ingest,
        pipeline.requests,
        gate.quotas,
        gate.authenticator,
        capacity=settings.pipeline.ingest_capacity_spans,
        closed=gate.closed,
        backlogged=pipeline.correlate.backlog.full,
    )

    data_directory = DataDirectory(settings.storage.path, edge.block, edge.unblock)

    # Recovery and upkeep
    record = Record(visible, stores.local.ledger)
    recovery = Recovery(settings, stores, pipeline, record, threads, gate.closed)
    rebuild = Rebuild(data, log, visible, duckdb, registry.compiled, max_body, gate.closed)

    # Queries and administration
    trace_metadata = TraceMetadataCache(
        duckdb,
        maxsize=settings.caches.trace_metadata,
        ttl_seconds=settings.caches.trace_metadata_ttl_seconds,
        max_bytes=settings.caches.trace_metadata_bytes,
    )
    reader = TraceReader(
        duckdb, trace_metadata, log, registry.store.rules, pipeline.correlate, triage, max_body
    )
    rule_writer = RuleWriter(registry, gate.closed)

    def active_tenants() -> Iterator[str]:
        yield from list(pipeline.correlate.tenants)
        yield from registry.store.tenants()

    caches = CacheControl(registry, gate, trace_metadata, active_tenants, cache_thread)
    audit_log = AuditLog(data / "audit.jsonl", settings.audit.max_bytes, settings.audit.files)
    audit = AuditTrail(audit_log, threads)

    def erase_archive(tenant: str) -> None:
        with suppress(FileNotFoundError):
            rmtree(tenant_archive(archive_directory(settings), tenant))

    erase = (rule_writer.delete_all, triage.delete_tenant, undecided.delete_tenant, erase_archive)
    removal = Removal(data, stores, gate, pipeline, recovery, rebuild, threads, erase)
    tenants = TenantAdministration(gate, removal, log, subscriptions, threads, audit)
    daily = Daily(settings, log, duckdb)

    # What is shown
    sources = Sources(
        settings=settings,
        started_at=time.time(),
        state=lambda: service.state,
        wall_time=wall_time,
        log=log,
        rules=registry.store,
        ledger=ledger,
        pipeline=pipeline,
        edge=edge,
        recovery=recovery,
        exports=exports,
        daily=daily,
        caches=caches,
        rule_signals=rule_signals,
        data_directory=data_directory,
    )
    tools = Tools(
        sources,
        duckdb,
        trace_metadata,
        reader,
        rule_writer,
        subscriptions,
        tenants,
        audit,
        triage,
        undecided,
        Performance(sources, latencies),
        Exposition(sources, latencies),
        ThreadRunner("api", settings.api.query_threads),
    )
    service = Service(
        settings=settings,
        log=log,
        registry=registry,
        ledger=ledger,
        store=duckdb,
        latencies=latencies,
        gate=gate,
        exports=exports,
        subscriptions=subscriptions,
        pipeline=pipeline,
        edge=edge,
        recovery=recovery,
        rebuild=rebuild,
        removal=removal,
        daily=daily,
        rule_watch=RuleWatch(registry, threads, settings.rules.poll_seconds),
        watch=Watch(
            pipeline.stages,
            pipeline.queues,
            edge.refused_requests,
            edge.refused_spans,
            settings.pipeline.stall_seconds,
        ),
        trace_metadata=trace_metadata,
        caches=caches,
        tenants=tenants,
        sources=sources,
        tools=tools,
        threads=threads,
        cache_thread=cache_thread,
    )
    return service


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
    subscriptions: Subscriptions
    pipeline: Pipeline
    edge: Edge

    recovery: Recovery
    rebuild: Rebuild
    removal: Removal
    daily: Daily
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
                ingest = await self._serve_ingest(inner, stop_ingest)
                grpc = await self._serve_grpc(inner, stop_ingest)
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
        await self.threads.run(warm_up, abandon_on_cancel=True)
        await self.threads.run(self.registry.store.load)
        nursery.start_soon(self.rule_watch.run)
        nursery.start_soon(self.latencies.recent.run)
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

    def _start_upkeep(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.removal.run)
        nursery.start_soon(self.trace_metadata.run, self.cache_thread)
        nursery.start_soon(self.caches.warm_up_after, self.settings.caches.warm_up_seconds)
        nursery.start_soon(self.recovery.every, self.settings.checkpoint.interval_seconds)
        nursery.start_soon(self.daily.every_day)
        nursery.start_soon(self.exports.run)
        if self.rebuild.pending:
            nursery.start_soon(self._rebuild)

    async def _drain(self, nursery: trio.Nursery, stop_ingest: trio.Event) -> None:
        """Refuse new requests, process everything accepted, and save a checkpoint."""
        grace = self.settings.shutdown.grace_seconds
        self.state = "draining"
        events.DRAINING()
        self.rebuild.stop()
        await trio.sleep(self.settings.shutdown.delay_seconds)
        nursery.cancel_scope.deadline = trio.current_time() + grace
        self.edge.drain()
        stop_ingest.set()
        nursery.start_soon(self._report_drain)
        with trio.move_on_after(ARRIVAL_SHARE * grace):
            await self.edge.settled()
        self.pipeline.close()
        await self.pipeline.finished.wait()
        await self.recovery.save()

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

    async def _serve_ingest(self, nursery: trio.Nursery, stop: trio.Event) -> str | None:
        settings = self.settings.ingest
        if settings.address == OFF:
            return None
        listener = partial(
            serve_ingest,
            tls=self.settings.tls,
            grace_seconds=self.settings.shutdown.grace_seconds,
        )
        url: str = await nursery.start(listener, self.edge, settings, settings.address, stop)
        return url

    async def _serve_grpc(self, nursery: trio.Nursery, stop: trio.Event) -> str | None:
        settings = self.settings.ingest
        if OFF in (settings.address, settings.grpc_address):
            return None
        listener = partial(
            serve_grpc,
            tls=self.settings.tls,
            grace_seconds=self.settings.shutdown.grace_seconds,
        )
        url: str = await nursery.start(listener, self.edge, settings, stop)
        return url

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
        for part in (self.removal, self.gate, self.daily, self.exports):
            part.close()
        for runner in (self.threads, self.cache_thread, self.rebuild_thread):
            runner.close()
        self.tools.exposition.close()
        self.tools.threads.close()
