"""The service: everything built from the settings, run, and shut down in order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import trio

from betrace.channels import ThreadRunner
from betrace.service.api.administration import Administration
from betrace.service.api.app import create_api
from betrace.service.api.asgi import ingest_app, serve
from betrace.service.api.cache_control import Caches
from betrace.service.api.components import components
from betrace.service.api.endpoints.health import metrics_app
from betrace.service.api.metrics import exposition as metrics
from betrace.service.api.performance import Performance
from betrace.service.api.queries import StoreQueries
from betrace.service.api.subscriptions import Subscriptions
from betrace.service.api.tenant_administration import TenantAdministration
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.config.settings import OFF, Settings
from betrace.service.export.archiver import archive_directory
from betrace.service.export.daily import Daily
from betrace.service.export.destinations import Exports
from betrace.service.pipeline.accounts import SpanAccount, span_account
from betrace.service.pipeline.pipeline import Pipeline
from betrace.service.pipeline.recovery.rebuild import Rebuild
from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.pipeline.recovery.removal import Removal
from betrace.service.pipeline.warmup import warm_up
from betrace.service.pipeline.watch import Watch
from betrace.service.receiver.admission import Edge
from betrace.service.receiver.grpc.server import serve_grpc
from betrace.service.receiver.server import ARRIVAL_SHARE, serve_ingest
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.signals import Signal
from betrace.service.storage.audit_log import AuditLog
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.open import open_ledger
from betrace.service.storage.ledger.record import Record, SignalLedger
from betrace.service.storage.local_stores import Reserves, open_reserves
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.open_files import affordable, raise_limit
from betrace.service.telemetry import events
from betrace.service.telemetry.latencies import Latencies
from betrace.service.tenancy.authentication import operator_token
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.gate import Gate
from betrace.service.traces.tenant_traces import TenantTraces

_log = logging.getLogger("service")

Json = dict[str, Any]

SCRAPE_SECONDS = 5.0  # then a scrape fails: Prometheus gives up after 10 s


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the service listens: URLs, None for a listener that is off."""

    ingest: str | None
    grpc: str | None
    api: str | None
    metrics: str | None


class Service:
    """The running service. Use :func:`open_service` to make one; :meth:`run` runs it."""

    def __init__(
        self,
        settings: Settings,
        log: SpanLog,
        registry: RuleRegistry,
        ledger: SignalLedger,
        store: DuckStore,
        reserves: Reserves,
        directory: TenantDirectory,
        operator_token: str | None,
    ) -> None:
        self.settings = settings
        self.log: SpanLog = log
        self.registry = registry
        self.ledger: SignalLedger = ledger
        self.store = store
        self.started_at: float = time.time()
        self.latencies = Latencies(
            window_seconds=settings.metrics.window_seconds, ledger_kind=ledger.kind
        )
        self.subscriptions = Subscriptions(settings.api.max_streams)
        self.gate = Gate(
            settings, directory, operator_token, lambda name: self.tenants.exists(name)
        )
        closed = self.gate.closed
        self.pipeline: Pipeline = Pipeline(
            settings,
            log,
            registry,
            ledger,
            store,
            reserves,
            self._stored,
            self.latencies,
        )
        living = self.gate.living(ledger)
        self.exports: Exports = Exports(settings, living, self.pipeline.breakers)
        self.edge: Edge = Edge(
            settings.ingest,
            self.pipeline.requests,
            self.gate.quotas,
            self.gate.authenticator,
            capacity=settings.pipeline.ingest_capacity_spans,
            closed=closed,
        )
        self.trace_metadata = TraceMetadataCache(
            store,
            maxsize=settings.caches.trace_metadata,
            ttl_seconds=settings.caches.trace_metadata_ttl_seconds,
            max_bytes=settings.caches.trace_metadata_bytes,
        )
        self.queries = StoreQueries(
            store,
            self.trace_metadata,
            log,
            registry,
            self.pipeline.correlate,
            settings.ingest.max_body_bytes,
            closed,
        )
        self._threads = ThreadRunner("service", 2)
        self.recovery: Recovery = Recovery(
            settings.storage.path / "checkpoints",
            log,
            self.pipeline.correlate,
            self.pipeline.progress,
            self.pipeline.in_flight,
            self._threads,
            store,
            self.pipeline.closed,
            Record(living, reserves.ledger),
            settings.ingest.max_body_bytes,
            self.pipeline.letters,
            closed,
        )
        self.rebuild = Rebuild(
            settings.storage.path,
            log,
            living,
            store,
            registry.compiled,
            settings.ingest.max_body_bytes,
            closed,
        )
        self._rebuilding = ThreadRunner("rebuild", 1)
        self.daily: Daily = Daily(settings, log, store)
        self._loading = ThreadRunner("caches", 1)
        self.caches = Caches(
            registry, self.gate, self.trace_metadata, self._active_tenants, self._loading
        )
        self.audit = AuditLog(
            settings.storage.path / "audit.jsonl", settings.audit.max_bytes, settings.audit.files
        )
        self.admin = Administration(
            self.pipeline,
            self.edge,
            self.audit,
            self._threads,
            self.wall_time,
            self.caches,
            self.recovery,
        )
        self.removal = Removal(
            settings.storage.path,
            archive_directory(settings),
            self.gate,
            ledger,
            log,
            store,
            self.queries,
            self.pipeline,
            self.recovery,
            self.rebuild,
            self._threads,
        )
        self.tenants = TenantAdministration(
            self.gate, self.removal, log, self.subscriptions, self._threads, self.admin.note
        )
        self._performance = Performance(
            self.pipeline,
            self.edge,
            self.latencies,
            settings.metrics.window_seconds,
            self.account,
            self.wall_time,
        )
        self._watch = Watch(
            self.pipeline.stages,
            self.pipeline.queues,
            self.edge,
            settings.pipeline.stall_seconds,
        )
        self._exposition = metrics.Exposition(self, self.latencies)
        self._scrapes = ThreadRunner("metrics", 1)
        self._stop = trio.Event()
        self._state = "starting"
        self._clock_offset = 0.0
        self._grace: float = settings.shutdown.grace_seconds

    # Running

    async def run(self, task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`stop`, then drain. Starts when ready, with the addresses."""
        settings = self.settings
        events.STARTING(version=version("betrace"), data=settings.storage.path, pid=os.getpid())
        self._clock_offset = time.time() - trio.current_time()
        stop_api, stop_ingest = trio.Event(), trio.Event()
        tls, grace = settings.tls, self._grace
        async with trio.open_nursery() as outer:
            listen = partial(self._listen, outer, tls=tls)
            guard = self.gate.authenticator
            app = create_api(self, settings.api, guard, self.gate.closed)
            api = await listen(app, settings.api.address, stop_api)
            scrape = await listen(metrics_app(self, guard), settings.metrics.address, stop_api)
            await self._threads.run(warm_up, abandon_on_cancel=True)
            await self._threads.run(self.registry.store.load)
            outer.start_soon(self._watch_rules)
            outer.start_soon(self.latencies.recent.run)
            outer.start_soon(self._watch.run)
            await self.removal.take_up()
            await self._rebuild_if_little()
            async with trio.open_nursery() as inner:
                await inner.start(self.pipeline.run)
                with self.pipeline.batches.clone() as onward:
                    await self.recovery.recover(onward)
                await self._threads.run(self.rebuild.compare)
                await self.pipeline.stages["trace-correlation"].drained()
                await self.recovery.caught_up()
                inner.start_soon(self.removal.run)
                inner.start_soon(self.trace_metadata.run, self._loading)
                inner.start_soon(self.caches.warm_up_after, settings.caches.warm_up_seconds)
                inner.start_soon(self.recovery.every, settings.checkpoint.interval_seconds)
                inner.start_soon(self.daily.every_day)
                inner.start_soon(self.exports.run)
                if self.rebuild.pending:
                    inner.start_soon(self._rebuild)
                ingest = await self._listen_for_spans(inner, stop_ingest)
                grpc = await self._listen_for_grpc(inner, stop_ingest)
                self._state = "ready"
                events.READY(
                    seconds=time.time() - self.started_at,
                    ingest=ingest,
                    grpc=grpc,
                    api=api,
                    metrics=scrape,
                )
                task_status.started(Addresses(ingest, grpc, api, scrape))
                await self._stop.wait()
                self._state = "draining"
                events.DRAINING()
                self.rebuild.stop()
                await trio.sleep(settings.shutdown.delay_seconds)
                inner.cancel_scope.deadline = trio.current_time() + grace
                self.edge.drain()
                stop_ingest.set()
                inner.start_soon(self._report_drain)
                with trio.move_on_after(ARRIVAL_SHARE * grace):
                    await self.edge.settled()
                self.pipeline.close()
                await self.pipeline.finished.wait()
                await self.recovery.save()
                inner.cancel_scope.cancel()
            self.subscriptions.close()
            stop_api.set()
            outer.cancel_scope.cancel()
        self._state = "stopped"
        events.STOPPED(seconds=time.time() - self.started_at, left=self.spans_in_flight())

    async def _rebuild_if_little(self) -> None:
        """Make lost files of DuckDB again before spans are accepted, unless that takes long."""
        if await self._threads.run(self.rebuild.find):
            await self._rebuild()

    async def _rebuild(self) -> None:
        try:
            await self._rebuilding.run(self.rebuild.run, abandon_on_cancel=True)
        except trio.Cancelled:
            self.rebuild.stop()
            raise

    async def _listen_for_spans(self, nursery: trio.Nursery, stop: trio.Event) -> str | None:
        settings, tls, grace = self.settings.ingest, self.settings.tls, self._grace
        if settings.server == "hypercorn" or settings.address == OFF:
            app = ingest_app(self.edge, settings)
            return await self._listen(nursery, app, settings.address, stop, tls=tls)
        listener = partial(serve_ingest, tls=tls, grace_seconds=grace)
        url: str = await nursery.start(listener, self.edge, settings, settings.address, stop)
        return url

    async def _listen_for_grpc(self, nursery: trio.Nursery, stop: trio.Event) -> str | None:
        settings, tls = self.settings.ingest, self.settings.tls
        if OFF in (settings.address, settings.grpc_address):
            return None
        listener = partial(serve_grpc, tls=tls, grace_seconds=self._grace)
        url: str = await nursery.start(listener, self.edge, settings, stop)
        return url

    async def _listen(
        self, nursery: trio.Nursery, app: Any, address: str, stop: trio.Event, *, tls: Any
    ) -> str | None:
        if address == OFF:
            return None
        url: str = await nursery.start(
            partial(
                serve,
                app,
                address,
                stop,
                tls=tls,
                keep_alive_seconds=self.settings.ingest.keep_alive_seconds,
                grace_seconds=self._grace,
            )
        )
        return url

    def stop(self) -> None:
        """Begin to shut down."""
        self._stop.set()

    async def _report_drain(self) -> None:
        while True:
            await trio.sleep(2)
            left = [
                f"{s['name']} {s['currentSize']}"
                for s in self._performance.fill()
                if s["currentSize"]
            ]
            _log.info("draining: %s", ", ".join(left) or "almost done")

    async def _watch_rules(self) -> None:
        while True:
            await trio.sleep(self.settings.rules.poll_seconds)
            await self.reload_rules()

    async def reload_rules(self) -> None:
        """Look at the rule files now."""
        before = self.registry.store.problems
        changed = await self._threads.run(self.registry.refresh)
        if changed:
            events.RULES_CHANGED(tenants=", ".join(sorted(changed)))
        problems = self.registry.store.problems
        for path, problem in problems.items():
            if before.get(path) != problem:
                events.RULES_BROKEN(problem=problem)
        for path in before.keys() - problems.keys():
            events.RULES_MENDED(file=path)

    # What the pipeline tells

    def _stored(self, signals: list[Signal]) -> None:
        self.subscriptions.publish(signals)
        self.exports.tell(signals)

    def _active_tenants(self) -> Iterator[str]:
        yield from list(self.pipeline.correlate.tenants)
        yield from self.registry.store.tenants()

    # What is live: betrace.service.api.backend.Backend

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self._state == "ready"

    def wall_time(self, trio_time: float) -> float:
        """A time of Trio's clock as seconds since 1970."""
        return trio_time + self._clock_offset

    def traces(self) -> Mapping[str, TenantTraces]:
        """Open traces by tenant, as of now."""
        return dict(self.pipeline.correlate.tenants)

    def spans_in_flight(self) -> int:
        """Spans accepted and on their way to their traces."""
        return self.account().in_flight

    def account(self) -> SpanAccount:
        """Where every span is."""
        return span_account(self.pipeline, self.recovery.replayed.spans)

    def components(self) -> Mapping[str, Json]:
        """The state of each part."""
        return components(self, self._state)

    async def scrape(self) -> bytes:
        """All metrics in Prometheus' text format, rendered in a thread; the Trio thread only reads
        the numbers. Raises :exc:`channels.ThreadTimeout` where the disk does not answer."""
        families = self._exposition.read()
        return await self._scrapes.run(self._exposition.render, families, timeout=SCRAPE_SECONDS)

    def subscribe_signals(self, tenant: str) -> Any:
        """The tenant's signals from now on."""
        return self.subscriptions.open(tenant)

    def queue_stats(self) -> list[Json]:
        """A row for each channel; reading takes the peak."""
        return self._performance.queues()

    def cache_stats(self) -> Mapping[str, Json]:
        """Statistics by cache."""
        return self.caches.statistics()

    def performance_metrics(self) -> Json:
        """Rates, latencies and totals."""
        return self._performance.metrics()

    def trace_windows(self) -> Json:
        """Open traces and their memory, as of the last second."""
        return self._performance.trace_windows()

    def system_stats(self) -> Json:
        """The process."""
        return self._performance.system()

    def close(self) -> None:
        """End the worker threads; the stores are closed by :func:`open_service`."""
        self.pipeline.close_threads()
        self.removal.close()
        self._threads.close()
        self._loading.close()
        self.gate.close()
        self._rebuilding.close()
        self.daily.close()
        self.exports.close()
        self._scrapes.close()


def open_service(settings: Settings, stack: ExitStack) -> Callable[[], Service]:
    """Open the stores (blocking, so call it before Trio runs) and return what makes the service
    within Trio; ``stack`` closes them."""
    data = settings.storage.path
    data.mkdir(parents=True, exist_ok=True)
    raise_limit()
    log = stack.enter_context(
        SpanLog(data, segment_bytes=settings.log.segment_bytes, open_files=affordable())
    )
    ledger = open_ledger(settings)
    stack.callback(ledger.close)
    duck = settings.duckdb
    store = stack.enter_context(
        DuckStore(
            data,
            memory_bytes=duck.memory_bytes,
            threads=duck.threads,
            pool_max=duck.pool_max,
            pool_idle=duck.pool_idle,
            pool_timeout=duck.pool_timeout_seconds,
            idle_close=duck.idle_close_seconds,
        )
    )
    rules = Path(settings.rules.directory) if settings.rules.directory else data / "rules"
    kept = settings.caches
    registry = RuleRegistry(
        RuleStore(rules), kept.rule_sets, kept.rule_sets_ttl_seconds, kept.rule_sets_bytes
    )
    reserves = open_reserves(data, settings, stack)
    directory = TenantDirectory(data / "tenants.sqlite")
    stack.callback(directory.close)
    token = operator_token(settings.auth) if settings.auth.enabled else None
    return lambda: Service(settings, log, registry, ledger, store, reserves, directory, token)
