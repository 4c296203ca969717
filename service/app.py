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
from betrace.service.export.alerts.alerts import Alerts
from betrace.service.export.archiver import archive_directory
from betrace.service.export.daily import Daily
from betrace.service.export.destinations import Exports
from betrace.service.pipeline.breakers import Breakers
from betrace.service.pipeline.build import Stores, build_pipeline
from betrace.service.pipeline.damage import report_skipped
from betrace.service.pipeline.data_directory import DataDirectory
from betrace.service.pipeline.pipeline import Pipeline
from betrace.service.pipeline.recovery.lost_ledger import refuse_if_lost
from betrace.service.pipeline.recovery.rebuild import Rebuild
from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.pipeline.recovery.removal import Removal
from betrace.service.pipeline.warmup import Compilation
from betrace.service.pipeline.watch import Watch
from betrace.service.receiver.admission import Admission
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
from betrace.service.tenancy.authentication import OperatorTokens, operator_tokens
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.gate import Gate

_log = logging.getLogger("service")

Json = dict[str, Any]

_REPAIR_SECONDS = 0.5


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
    tokens = operator_tokens(settings.auth) if settings.auth.enabled else None
    return lambda: build(settings, stores, directory, tokens)


def _open_stores(data: Path, settings: Settings, stack: ExitStack) -> Stores:
    log = stack.enter_context(
        SpanLog(data, segment_bytes=settings.log.segment_bytes, open_files=affordable())
    )
    duckdb = stack.enter_context(DuckStore(data, settings.duckdb))
    local = open_local_stores(data, settings, stack)
    refuse_if_lost(data, duckdb, local.ledger)
    ledger = open_ledger(settings)
    stack.callback(ledger.close)
    rules = Path(settings.rules.directory or data / "rules")
    if not settings.rules.directory:
        rules.mkdir(exist_ok=True)  # so that the default directory can be found and is no problem
    caches = settings.caches
    registry = RuleRegistry(
        RuleStore(rules, settings.rules.shared),
        caches.rule_sets,
        caches.rule_sets_ttl_seconds,
        caches.rule_sets_bytes,
    )
    return Stores(log, registry, ledger, duckdb, local)


def build(
    settings: Settings,
    stores: Stores,
    directory: TenantDirectory,
    tokens: OperatorTokens | None,
) -> Service:
    """Build all parts, within Trio. ``tokens`` is None if authentication is off."""
    return _ServiceBuilder(settings, stores, directory, tokens).service()


class _ServiceBuilder:
    """Builds the parts in the order in which they need each other: first what spans and signals
    pass through, then recovery and upkeep, then queries and administration."""

    def __init__(
        self,
        settings: Settings,
        stores: Stores,
        directory: TenantDirectory,
        tokens: OperatorTokens | None,
    ) -> None:
        self._settings, self._stores = settings, stores
        stores.log.on_skipped = report_skipped
        self._threads, self._cache_thread = ThreadRunner("service", 2), ThreadRunner("caches", 1)
        self._gate = Gate(
            settings,
            directory,
            tokens,
            lambda name: self._tenants.exists(name),
            lambda: [*stores.log.tenants(), *stores.registry.store.tenants()],
        )
        self._visible = self._gate.current_entries(stores.ledger)  # without deleted tenants
        self._build_flow()
        self._build_upkeep()
        self._build_administration()

    # The way of spans and signals

    def _build_flow(self) -> None:
        settings, stores, gate = self._settings, self._stores, self._gate
        self._latencies = Latencies(
            window_seconds=settings.metrics.window_seconds, ledger_kind=stores.ledger.kind
        )
        destinations = [*settings.export.destinations, *settings.alerts.destinations]
        breakers = Breakers(settings.breakers, destinations)
        self._exports = Exports(settings, self._visible, breakers, self._muted)
        self._alerts = Alerts(
            settings,
            self._visible,
            stores.local.alerts,
            breakers,
            self._muted,
            lambda tenant, rule: stores.local.triage.current_mute(tenant, rule) is not None,
        )
        self._subscriptions = Subscriptions()
        self._rule_signals = SignalsByRule(
            stores.registry.store.all_rules, settings.metrics.max_rule_series, self._muted
        )
        self._pipeline = build_pipeline(settings, stores, breakers, self._recorded, self._latencies)
        self._admission = Admission(
            settings.ingest,
            self._pipeline.requests,
            gate.quotas,
            gate.authenticator,
            capacity=settings.pipeline.ingest_capacity_spans,
            closed=gate.closed,
            backlogged=self._pipeline.correlate.backlog.full,
            limit=gate.tenant_limit,
        )
        self._data_directory = DataDirectory(
            settings.storage.path, self._admission.block, self._admission.unblock
        )

    def _muted(self, signal: Signal) -> bool:
        """Whether a signal pages nobody."""
        triage = self._stores.local.triage
        return signal.shadow or triage.muted(signal.tenant, signal.rule_id, signal.detected_at)

    def _recorded(self, signals: list[Signal]) -> None:
        """Pass on signals that are new in the ledger."""
        self._rule_signals.add(signals)
        self._subscriptions.publish(signals)
        self._exports.notify(signals)
        self._alerts.notify(signals)

    # Recovery and upkeep

    def _build_upkeep(self) -> None:
        settings, stores, gate = self._settings, self._stores, self._gate
        data, threads = settings.storage.path, self._threads
        record = Record(self._visible, stores.local.ledger)
        self._recovery = Recovery(settings, stores, self._pipeline, record, threads, gate.closed)
        self._rebuild = Rebuild(
            data,
            stores.log,
            self._visible,
            stores.duckdb,
            stores.registry.compiled,
            settings.ingest.max_body_bytes,
            gate.closed,
        )
        self._rule_writer = RuleWriter(stores.registry, gate.closed, gate.tenant_limit)
        erase = (
            self._rule_writer.delete_all,
            stores.local.triage.delete_tenant,
            self._alerts.forget,
            stores.local.undecided.delete_tenant,
            self._erase_archive,
        )
        self._removal = Removal(
            data, stores, gate, self._pipeline, self._recovery, self._rebuild, threads, erase
        )
        self._daily = Daily(settings, stores.log, stores.duckdb)
        self._rule_watch = RuleWatch(stores.registry, threads, settings.rules.poll_seconds)
        self._watch = Watch(
            self._pipeline.stages,
            self._pipeline.queues,
            self._admission.refusals.requests,
            self._admission.refusals.spans,
            settings.pipeline.stall_seconds,
        )

    def _erase_archive(self, tenant: str) -> None:
        with suppress(FileNotFoundError):
            rmtree(tenant_archive(archive_directory(self._settings), tenant))

    # Queries and administration

    def _build_administration(self) -> None:
        stores, caches, audit = self._stores, self._settings.caches, self._settings.audit
        self._trace_metadata = TraceMetadataCache(
            stores.duckdb,
            maxsize=caches.trace_metadata,
            ttl_seconds=caches.trace_metadata_ttl_seconds,
            max_bytes=caches.trace_metadata_bytes,
        )
        self._caches = CacheControl(
            stores.registry,
            self._gate,
            self._trace_metadata,
            self._active_tenants,
            self._cache_thread,
        )
        audit_log = AuditLog(
            self._settings.storage.path / "audit.jsonl", audit.max_bytes, audit.files
        )
        self._audit = AuditTrail(audit_log, self._threads)
        self._tenants = TenantAdministration(
            self._gate, self._removal, stores.log, self._subscriptions, self._threads, self._audit
        )

    def _active_tenants(self) -> Iterator[str]:
        yield from list(self._pipeline.open_traces.tenants)
        yield from self._stores.registry.store.tenants()

    def _sources(self, state: Callable[[], str]) -> Sources:
        """What the API and the metrics show. ``state`` returns that of the service."""
        clock_offset = time.time() - trio.current_time()
        return Sources(
            settings=self._settings,
            started_at=time.time(),
            state=state,
            wall_time=lambda trio_time: trio_time + clock_offset,
            log=self._stores.log,
            rules=self._stores.registry.store,
            ledger=self._stores.ledger,
            duckdb=self._stores.duckdb,
            pipeline=self._pipeline,
            admission=self._admission,
            recovery=self._recovery,
            exports=self._exports,
            alerts=self._alerts,
            daily=self._daily,
            caches=self._caches,
            rule_signals=self._rule_signals,
            data_directory=self._data_directory,
        )

    def _tools(self, sources: Sources) -> Tools:
        """What the API calls."""
        stores, settings = self._stores, self._settings
        reader = TraceReader(
            stores.duckdb,
            self._trace_metadata,
            stores.log,
            stores.registry.store.rules,
            self._pipeline.open_traces,
            stores.local.triage,
            settings,
        )
        return Tools(
            sources,
            stores.duckdb,
            self._trace_metadata,
            reader,
            self._rule_writer,
            self._subscriptions,
            self._tenants,
            self._audit,
            stores.local.triage,
            stores.local.undecided,
            Performance(sources, self._latencies),
            Exposition(sources, self._latencies),
            ThreadRunner("api", settings.api.query_threads),
        )

    def service(self) -> Service:
        """The service."""
        sources = self._sources(lambda: service.state)
        service = Service(
            settings=self._settings,
            log=self._stores.log,
            registry=self._stores.registry,
            ledger=self._stores.ledger,
            store=self._stores.duckdb,
            latencies=self._latencies,
            gate=self._gate,
            exports=self._exports,
            alerts=self._alerts,
            subscriptions=self._subscriptions,
            pipeline=self._pipeline,
            admission=self._admission,
            recovery=self._recovery,
            rebuild=self._rebuild,
            removal=self._removal,
            daily=self._daily,
            rule_watch=self._rule_watch,
            watch=self._watch,
            trace_metadata=self._trace_metadata,
            caches=self._caches,
            tenants=self._tenants,
            sources=sources,
            tools=self._tools(sources),
            threads=self._threads,
            cache_thread=self._cache_thread,
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
    alerts: Alerts
    subscriptions: Subscriptions
    pipeline: Pipeline
    admission: Admission

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

    def _start_upkeep(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.removal.run)
        nursery.start_soon(self.trace_metadata.run, self.cache_thread)
        nursery.start_soon(self.caches.warm_up_after, self.settings.caches.warm_up_seconds)
        nursery.start_soon(self.recovery.every, self.settings.checkpoint.interval_seconds)
        nursery.start_soon(self.daily.every_day)
        nursery.start_soon(self.exports.run)
        nursery.start_soon(self.alerts.run)
        if self.rebuild.pending:
            nursery.start_soon(self._rebuild)
        nursery.start_soon(self._repair)

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

    async def _repair(self) -> None:
        """Rebuild DuckDB files when damage is met."""
        while True:
            await trio.sleep(_REPAIR_SECONDS)
            if self.rebuild.due:
                await self.rebuild_thread.run(self.rebuild.repair, abandon_on_cancel=True)

    async def _serve_ingest(self, nursery: trio.Nursery, stop: trio.Event) -> str | None:
        settings = self.settings.ingest
        if settings.address == OFF:
            return None
        listener = partial(
            serve_ingest,
            tls=self.settings.tls,
            grace_seconds=self.settings.shutdown.grace_seconds,
        )
        url: str = await nursery.start(listener, self.admission, settings, settings.address, stop)
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
        url: str = await nursery.start(listener, self.admission, settings, stop)
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
        for part in (self.removal, self.gate, self.daily, self.exports, self.alerts):
            part.close()
        for runner in (self.threads, self.cache_thread, self.rebuild_thread):
            runner.close()
        self.tools.exposition.close()
        self.tools.threads.close()
