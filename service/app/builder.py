"""Opens the stores and builds the parts of the service from the settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import trio

from betrace.channels import ThreadRunner
from betrace.service.api.audit import AuditTrail
from betrace.service.api.cache_control import CacheControl
from betrace.service.api.endpoint import Tools
from betrace.service.api.metrics.exposition import Exposition
from betrace.service.api.performance import Performance
from betrace.service.api.rule_writer import RuleWriter
from betrace.service.api.signals_by_rule import SignalsByRule
from betrace.service.api.sources import Sources
from betrace.service.api.subscriptions import Subscriptions
from betrace.service.api.tenant_administration import TenantAdministration
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.api.trace_view import TraceReader
from betrace.service.api.unstored_signals import UnstoredSignals
from betrace.service.app import sharing
from betrace.service.app.service import Service
from betrace.service.config.settings import Settings
from betrace.service.export.alerts.alerts import Alerts
from betrace.service.export.archiver import Archiver, Throttle, archive_directory
from betrace.service.export.daily import Daily
from betrace.service.export.destinations import Exports
from betrace.service.pipeline.breakers import Breakers
from betrace.service.pipeline.build import Stores, build_pipeline
from betrace.service.pipeline.damage import report_skipped
from betrace.service.pipeline.data_directory import DataDirectory
from betrace.service.pipeline.recovery.local_tenants import LocalTenants
from betrace.service.pipeline.recovery.lost_ledger import refuse_if_lost
from betrace.service.pipeline.recovery.rebuild import Rebuild
from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.pipeline.recovery.removal import Removal
from betrace.service.pipeline.recovery.scrub import Scrub
from betrace.service.pipeline.watch import Watch
from betrace.service.receiver.admission import Admission, TenantStates
from betrace.service.rules.patterns import set_match_bytes
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.rules.watch import RuleWatch
from betrace.service.signals import Signal
from betrace.service.storage.audit_log import AuditLog
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.open import open_ledger
from betrace.service.storage.ledger.record import Record
from betrace.service.storage.local_stores import open_local_stores
from betrace.service.storage.paths import tenant_archive
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.open_files import affordable, raise_limit
from betrace.service.telemetry.latencies import Latencies
from betrace.service.tenancy.authentication import OperatorTokens, operator_tokens
from betrace.service.tenancy.changes import TenantChanges
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.gate import Gate

if TYPE_CHECKING:
    from betrace.service.cluster.query.node import ClusterConnection, QueryNode
    from betrace.service.cluster.query.tenant_names import TenantNames

_log = logging.getLogger("service")

Json = dict[str, Any]


# Opening and building


def open_service(settings: Settings, stack: ExitStack) -> Callable[[], Service]:
    """Open the stores, which blocks, so call it before Trio runs. ``stack`` closes them. Returns a
    function that builds the service within Trio."""
    make = open_query_service(settings, stack)
    return lambda: make(None)


def open_query_service(
    settings: Settings, stack: ExitStack
) -> Callable[[ClusterConnection | None], Service]:
    """As :func:`open_service`, but the service is a query node of the given cluster."""
    data = settings.storage.path
    data.mkdir(parents=True, exist_ok=True)
    raise_limit()
    set_match_bytes(settings.rules.match_max_bytes)
    stores = _open_stores(data, settings, stack)
    directory, tokens = open_tenants(settings, stack)
    return lambda cluster: build(settings, stores, directory, tokens, cluster)


def open_tenants(
    settings: Settings, stack: ExitStack
) -> tuple[TenantDirectory, OperatorTokens | None]:
    """The tenant directory, and the operators' tokens; None if authentication is off."""
    directory = TenantDirectory(settings.storage.path / "tenants.sqlite")
    stack.callback(directory.close)
    return directory, operator_tokens(settings.auth) if settings.auth.enabled else None


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
    cluster: ClusterConnection | None = None,
) -> Service:
    """Build all parts, within Trio. ``tokens`` is None if authentication is off; ``cluster`` is for
    a query node."""
    return _ServiceBuilder(settings, stores, directory, tokens, cluster).service()


class _ServiceBuilder:
    """Builds the parts in the order in which they need each other: first what spans and signals
    pass through, then recovery and upkeep, then queries and administration."""

    def __init__(
        self,
        settings: Settings,
        stores: Stores,
        directory: TenantDirectory,
        tokens: OperatorTokens | None,
        cluster: ClusterConnection | None,
    ) -> None:
        self._settings, self._stores, self._cluster = settings, stores, cluster
        stores.log.on_skipped = report_skipped
        self._threads, self._cache_thread = ThreadRunner("service", 2), ThreadRunner("caches", 1)
        self._gate = Gate(
            settings,
            directory,
            tokens,
            lambda name: self._tenants.exists(name),
            lambda: [*self._stored_tenants(), *stores.registry.store.tenants()],
        )
        self._visible = self._gate.current_entries(stores.ledger)  # without deleted tenants
        self._sharing = (
            sharing.alone(self._visible, stores.local)
            if cluster is None
            else sharing.shared(
                cluster, settings, stores.local, self._threads, self._tenant_names()
            )
        )
        self._build_flow()
        self._node = self._query_node()
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
        shared = self._sharing
        self._exports = Exports(settings, shared.queues, breakers, self._muted, shared.turns)
        self._alerts = Alerts(
            settings,
            shared.queues,
            shared.alerts,
            breakers,
            self._muted,
            lambda tenant, rule: stores.local.triage.current_mute(tenant, rule) is not None,
            shared.turns,
        )
        self._subscriptions = Subscriptions()
        self._unstored = UnstoredSignals()
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
            tenants=TenantStates(
                gate.closed,
                self._pipeline.must_wait,
                gate.tenant_limit,
                self._pipeline.ingest.set_aside,
            ),
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
        if self._cluster is not None:  # evaluators are other processes
            for signal in signals:
                self._pipeline.evaluate.counts.add(signal)
        self._rule_signals.add(signals)
        self._unstored.add(signals)
        self._subscriptions.publish(signals)
        self._exports.notify(signals)
        self._alerts.notify(signals)

    def _query_node(self) -> QueryNode | None:
        """What feeds storage-write on a cluster."""
        if self._cluster is None:
            return None
        from betrace.service.cluster.query.node import QueryNode, QueryStores

        stores = QueryStores(
            self._settings.storage.path,
            self._stores.duckdb,
            self._stores.local.undecided,
            self._stores.registry.store,
            self._gate.closed,
            self._tenant_names(),
            lambda: self._pipeline.project.fallback.pending,
            self._threads,
        )
        node = QueryNode(self._cluster, stores, self._sharing.followers)
        node.connect(self._pipeline.queues["storage-write"].send, self._pipeline.in_flight)
        return node

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
            None if self._node is None else self._node.reread,
        )
        self._scrub = Scrub(
            data,
            stores.log,
            settings.log.scrub_bytes_per_second,
            self._rebuild.suspect,
            gate.closed,
        )
        self._rule_writer = RuleWriter(
            stores.registry,
            gate.closed,
            gate.tenant_limit,
            None if self._node is None else self._node.rules.exchange_now,
        )
        erase = (
            self._erase_rules,
            stores.local.triage.delete_tenant,
            self._alerts.forget,
            self._unstored.forget,
            stores.local.undecided.delete_tenant,
            self._erase_archive,
        )
        self._removal = Removal(
            data, stores, gate, self._pipeline, self._recovery, self._rebuild, threads, erase
        )
        self._daily = self._make_daily()
        self._rule_watch = RuleWatch(stores.registry, threads, settings.rules.poll_seconds)
        self._watch = Watch(
            self._pipeline.stages,
            self._pipeline.queues,
            self._admission.refusals.requests,
            self._admission.refusals.spans,
            settings.pipeline.stall_seconds,
        )

    def _make_daily(self) -> Daily:
        settings, stores = self._settings, self._stores
        if self._cluster is not None:
            from betrace.service.app.archive import cluster_daily

            return cluster_daily(settings, stores.duckdb, self._cluster)

        def make_archiver() -> Archiver:
            return Archiver(
                stores.log,
                archive_directory(settings),
                settings.storage.path / "checkpoints",
                settings.ingest.max_body_bytes,
                Throttle(),
            )

        return Daily(settings, stores.duckdb, make_archiver)

    def _erase_rules(self, tenant: str) -> None:
        if self._node is None:
            self._rule_writer.delete_all(tenant)
        else:
            self._rule_writer.settle()
            self._node.rules.erase(tenant)
            self._stores.registry.forget(tenant)

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
            self._gate,
            self._tenant_changes(),
            self._stored_tenants,
            self._subscriptions,
            self._threads,
            self._audit,
        )

    def _tenant_changes(self) -> TenantChanges:
        """What changes tenants."""
        if self._node is None or self._cluster is None:
            return LocalTenants(self._gate, self._removal, self._threads)
        from betrace.service.cluster.query.tenants import ClusterTenants

        self._node.tenants = ClusterTenants(
            self._cluster.tenants,
            self._gate,
            self._removal,
            self._threads,
            lambda: {
                *self._stored_tenants(),
                *self._stores.ledger.tenants(),
                *self._stores.registry.store.tenants(),
            },
            self._node.rules.drop,
            self._subscriptions.end,
        )
        return self._node.tenants

    def _tenant_names(self) -> TenantNames:
        """The names of tenants in the logs of a cluster."""
        from betrace.service.cluster.query.tenant_names import TenantNames

        return TenantNames(self._gate.generations, self._gate.closed)

    def _stored_tenants(self) -> list[str]:
        """The tenants that have something on disk, and those of the cluster that have sent
        spans."""
        stores = self._stores
        if self._cluster is None:
            return stores.log.tenants()
        return [*stores.duckdb.tenants(), *self._gate.implicit]

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
            scrub=self._scrub,
            node=self._node,
        )

    def _tools(self, sources: Sources) -> Tools:
        """What the API calls."""
        stores, settings = self._stores, self._settings
        reader = TraceReader(
            stores.duckdb,
            self._trace_metadata,
            stores.log if self._node is None else self._node.spans,
            stores.registry.store.rules,
            self._pipeline.open_traces if self._cluster is None else self._cluster.open_traces,
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
            self._unstored,
            shared_triage=self._sharing.triage,
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
            scrub=self._scrub,
            node=self._node,
        )
        return service
