"""The parts of the running service that the API reads: for metrics, health and operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from betrace.service.api.cache_control import CacheControl
from betrace.service.api.signals_by_rule import SignalsByRule
from betrace.service.config.settings import Settings
from betrace.service.export.alerts.alerts import Alerts
from betrace.service.export.daily import Daily
from betrace.service.export.destinations import Exports
from betrace.service.pipeline.accounts import SpanAccount, span_account
from betrace.service.pipeline.data_directory import DataDirectory
from betrace.service.pipeline.pipeline import Pipeline
from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.pipeline.recovery.scrub import Scrub
from betrace.service.receiver.admission import Admission
from betrace.service.rules.store import RuleStore
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import Ledger
from betrace.service.storage.spanlog.log import SpanLog

if TYPE_CHECKING:
    from betrace.service.cluster.query.node import QueryNode


@dataclass(frozen=True, slots=True)
class Sources:
    """Filled by :mod:`betrace.service.app.builder`. ``state`` returns starting, ready, draining or
    stopped; ``wall_time`` converts a time of Trio's clock to seconds since 1970."""

    settings: Settings
    started_at: float
    state: Callable[[], str]
    wall_time: Callable[[float], float]
    log: SpanLog
    rules: RuleStore
    ledger: Ledger
    duckdb: DuckStore
    pipeline: Pipeline
    admission: Admission
    recovery: Recovery
    exports: Exports
    alerts: Alerts
    daily: Daily
    caches: CacheControl
    rule_signals: SignalsByRule
    data_directory: DataDirectory
    scrub: Scrub
    node: QueryNode | None = None
    """None unless the service is a query node of a cluster."""

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here: started, and not draining."""
        return self.state() == "ready"

    def account(self) -> SpanAccount:
        """Where every span is. A query node counts those that were evaluated since it started."""
        if self.node is not None:
            spans = self.node.evaluated_spans()
            return SpanAccount(spans, 0, 0, spans, 0, 0, 0)
        return span_account(self.pipeline, self.recovery.replayed.spans)

    def accepted_spans(self) -> int:
        """Spans accepted since the start; of a cluster, those that were evaluated."""
        if self.node is not None:
            return self.node.evaluated_spans()
        return self.pipeline.ingest.counts.accepted

    def closed_traces(self) -> int:
        """Traces closed since the start."""
        if self.node is not None:
            return self.node.closed_traces()
        return self.pipeline.open_traces.counts.closed
