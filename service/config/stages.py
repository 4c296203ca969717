"""Settings of the pipeline: stages, traces, rules, caches, and what happens on failure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from betrace.service.config.base import (
    MIB,
    Count,
    Fraction,
    Seconds,
    SecondsOrZero,
    SettingsSection,
    Size,
    Workers,
)


class PipelineSettings(SettingsSection):
    """Stages and the channels between them. A full channel makes the stage before it wait. When the
    first channel is full, requests are refused."""

    ingest_capacity_spans: Count = 10_000
    """Capacity of the span-ingestion channel."""
    ingest_workers: Workers = 1
    """Workers of the span-ingestion stage. One with large batches is faster than ten: see
    docs/decisions/0003-one-worker-large-batches.md."""
    ingest_batch_spans: Count = 8_000
    """Waiting requests are decoded together, up to this many spans."""
    correlate_capacity_spans: Count = 5_000
    """Capacity of the trace-correlation channel."""
    correlate_workers: Workers = 1
    """Workers of the trace-correlation stage."""
    correlate_batch_spans: Count = 5_000
    """Waiting batches are folded together, up to this many spans."""
    evaluate_capacity_traces: Count = 5_000
    """Capacity of the rule-evaluation channel."""
    evaluate_workers: Workers = 1
    """Workers of the rule-evaluation stage."""
    evaluate_batch_traces: Count = 5_000
    """Maximum waiting traces that are decided together."""
    store_capacity_signals: Count = 10_000
    """Capacity of the storage-write channel."""
    store_workers: Workers = 2
    """Workers of the storage-write stage."""
    stall_seconds: Seconds = 30
    """A stage with input but no progress for this long is reported as stalled."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for stage, unit in (("ingest", "spans"), ("correlate", "spans"), ("evaluate", "traces")):
            batch: int = getattr(self, f"{stage}_batch_{unit}")
            capacity: int = getattr(self, f"{stage}_capacity_{unit}")
            if batch > capacity:
                raise ValueError(
                    f"pipeline.{stage}_batch_{unit} ({batch}) exceeds "
                    f"pipeline.{stage}_capacity_{unit} ({capacity}), so a batch could never fill; "
                    "lower the first or raise the second"
                )
        return self


class Traces(SettingsSection):
    """When a trace is evaluated, and how long it stays open."""

    idle_seconds: Seconds = 5
    """A trace is closed after this long without a new span."""
    max_age_seconds: Seconds = 3600
    """A trace is closed at this age, even if spans still arrive."""
    sweep_seconds: Seconds = 300
    """How often expired traces are removed and their memory freed."""
    long_lived_spans: Count = 1000
    """Signals of a trace with more spans than this also carry the window of spans in which the
    breach was seen. Windows are only context: rules always evaluate the whole trace."""
    window_spans: Count = 100
    """Spans per window of a long-lived trace."""
    window_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of a window that overlaps with the next one."""
    late_filter_bytes: Size = 32 * MIB
    """Memory of the filter that tells late spans from new traces. 32 MiB cover the last 8 to 16
    million traces. A late span of an older trace starts a new trace."""
    relational_spans_max: Count = 50_000
    """Rules that relate spans read traces back from the span log when they close. A trace with more
    spans than this is not read: such rules stay undecided for it, which is counted and logged."""
    max_open: Count = 1_000_000
    """Maximum open traces of all tenants. Above it, those idle longest are closed early."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.idle_seconds > self.max_age_seconds:
            raise ValueError(
                f"traces.idle_seconds ({self.idle_seconds:g}) exceeds traces.max_age_seconds "
                f"({self.max_age_seconds:g}), so no trace would ever be closed as idle; "
                "lower the first or raise the second"
            )
        if self.window_spans > self.long_lived_spans:
            raise ValueError(
                f"traces.window_spans ({self.window_spans}) exceeds traces.long_lived_spans "
                f"({self.long_lived_spans}); lower the first or raise the second"
            )
        return self


class Rules(SettingsSection):
    """Where rules come from."""

    directory: str = ""
    """Directory of rule files (*.yaml): those of the tenant `default` directly in it, those of
    other tenants in folders with their names. If empty, only rules saved with the API apply."""
    all_tenants_directory: str = ""
    """Directory of rule files (*.yaml) that apply to every tenant. Tenants see these rules and
    cannot change them. An own rule with the same id is ignored. Empty for none."""
    poll_seconds: Seconds = 2
    """How often the directories are checked for changes. SIGHUP checks them at once."""
    match_max_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = 64 * 1024
    """Longest text that `matches` searches. A rule whose verdict depends on a longer one is
    undecided. The most expensive search of 64 KiB takes a second, of a longer text proportionally
    more, and no other tenant's spans are processed meanwhile."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.directory and self.directory == self.all_tenants_directory:
            raise ValueError(
                "rules.directory and rules.all_tenants_directory are the same; give the rules for "
                "all tenants a directory of their own"
            )
        return self

    @property
    def shared(self) -> Path | None:
        """The directory of rules for all tenants."""
        return Path(self.all_tenants_directory) if self.all_tenants_directory else None


class CacheSettings(SettingsSection):
    """Caches: number of entries, lifetime, and bytes where entries differ widely in size."""

    rule_sets: Count = 500
    """Maximum tenants with compiled rules in the cache."""
    rule_sets_ttl_seconds: Seconds = 1800
    """Compiled rules are dropped when unused for this long."""
    rule_sets_bytes: Size = 512 * MIB
    """Memory of compiled rules in the cache. Rules with patterns take about 2 MiB per tenant,
    others a few KiB per rule."""
    public_keys: Count = 1000
    """Maximum public keys of tenants in the cache."""
    public_keys_ttl_seconds: Seconds = 3600
    """A public key is read again after this long. A revoked key is dropped at once."""
    trace_metadata: Count = 10_000
    """Maximum recent traces in the caches: their state, for late spans, and their stored metadata,
    for API clients."""
    trace_metadata_ttl_seconds: Seconds = 300
    """Metadata of a trace is dropped after this long."""
    trace_metadata_bytes: Size = 64 * MIB
    """Memory of stored metadata of recent traces."""
    warm_up_seconds: Seconds = 10
    """The caches are filled for active tenants this long after the start."""


class BreakerSettings(SettingsSection):
    """A circuit breaker, as resilience4j defines it."""

    timeout_seconds: Seconds
    """A call that takes longer is given up and counts as failed."""
    failure_rate: Fraction = 0.5
    """It opens when at least this fraction of the window's calls failed."""
    slow_call_seconds: Seconds
    """A call that takes longer counts as slow."""
    slow_call_rate: Fraction = 1.0
    """It opens when at least this fraction of the window's calls were slow."""
    window_calls: Count = 100
    """The rates cover this many of the latest calls."""
    minimum_calls: Count
    """It cannot open before this many calls."""
    open_seconds: Seconds
    """It stays open this long before it lets trial calls through."""
    half_open_calls: Count = 10
    """Trial calls, whose rates decide whether it closes."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.minimum_calls > self.window_calls:
            raise ValueError(
                f"minimum_calls ({self.minimum_calls}) is greater than window_calls "
                f"({self.window_calls}), so the breaker could never open; "
                "lower the first or raise the second"
            )
        return self


class EvaluationBreaker(BreakerSettings):
    """The circuit breaker of rule evaluation."""

    timeout_seconds: Seconds = 10
    """A call that takes longer is given up and counts as failed."""
    slow_call_seconds: Seconds = 5
    """A call that takes longer counts as slow."""
    minimum_calls: Count = 100
    """It cannot open before this many calls."""
    open_seconds: Seconds = 30
    """It stays open this long before it lets trial calls through."""


class StorageBreaker(BreakerSettings):
    """The circuit breakers of storage: one for the ledger, one for DuckDB."""

    timeout_seconds: Seconds = 5
    """A call that takes longer is given up and counts as failed."""
    slow_call_seconds: Seconds = 2.5
    """A call that takes longer counts as slow."""
    minimum_calls: Count = 50
    """It cannot open before this many calls."""
    open_seconds: Seconds = 15
    """It stays open this long before it lets trial calls through."""


class ExportBreaker(BreakerSettings):
    """The circuit breakers of export, one per destination. A call is a batch of signals."""

    timeout_seconds: Seconds = 10
    """A call that takes longer is given up and counts as failed."""
    slow_call_seconds: Seconds = 10
    """A call that takes longer counts as slow."""
    window_calls: Count = 10
    """The rates cover this many of the latest calls."""
    minimum_calls: Count = 5
    """It cannot open before this many calls."""
    open_seconds: Seconds = 30
    """It stays open this long before it lets trial calls through."""
    half_open_calls: Count = 1
    """Trial calls, whose rates decide whether it closes."""


class BreakersSettings(SettingsSection):
    """Circuit breakers."""

    evaluation: EvaluationBreaker = EvaluationBreaker()
    storage: StorageBreaker = StorageBreaker()
    export: ExportBreaker = ExportBreaker()


class Redelivery(SettingsSection):
    """What happens to an item whose processing fails."""

    attempts: Annotated[int, Field(ge=0, le=100)] = 3
    """Retries before the item becomes a dead letter."""
    delay_seconds: SecondsOrZero = 1
    """Delay between attempts."""
    transient_retry_seconds: Seconds = 60
    """A dead letter with a transient error is retried after this long."""


class DeadLetterSettings(SettingsSection):
    """Items that a stage could not process, kept until they are retried or discarded."""

    max_bytes: Size = 256 * MIB
    """Size of all dead letters. Above it, the oldest are moved to files in dead-letters-
    exported."""


class FallbackSettings(SettingsSection):
    """Local files for writes that the ledger or DuckDB does not accept. They are written back when
    it works again."""

    max_bytes: Size = 1024 * MIB
    """Size of the files of each store. When they are full, requests are eventually refused."""
    file_bytes: Size = 8 * MIB
    """A new file is begun at this size."""


class Audit(SettingsSection):
    """Records of operator actions, in audit.jsonl in the data directory, and of accepted
    requests."""

    max_bytes: Size = 16 * MIB
    """The file is renamed at this size, and a new one is begun."""
    files: Annotated[int, Field(ge=1, le=1000)] = 5
    """Renamed files to keep. The oldest is deleted."""
    batches: bool = False
    """Whether to record each accepted request in batches.jsonl: tenant, time, spans, bytes, and
    position in the log. This never delays requests: records that do not fit are dropped and
    counted."""


class Otlp(SettingsSection):
    """Signals as log records, for an OpenTelemetry Collector or another OTLP/HTTP receiver."""

    endpoint: str = ""
    """The URL, such as http://collector:4318/v1/logs; empty for off."""
    headers: str = ""
    """Request headers, in the format of OTEL_EXPORTER_OTLP_HEADERS: name=value,name2=value2."""


class Webhook(SettingsSection):
    """Signals as alerts, in the format of Alertmanager's webhooks."""

    url: str = ""
    """The URL to post to; empty for off."""
    headers: str = ""
    """Request headers: name=value,name2=value2."""
    external_url: str = ""
    """The API's public URL for links to signals as JSON, if api.public_url is empty."""


EXPORT_OTLP, EXPORT_WEBHOOK = EXPORTS = ("export-otlp", "export-webhook")
"""Names of the export destinations, of their exporters and of their breakers."""


class Export(SettingsSection):
    """Export of signals to other systems, at least once each. See docs/export.md."""

    otlp: Otlp = Otlp()
    webhook: Webhook = Webhook()

    @property
    def destinations(self) -> list[str]:
        """The names of the destinations that are on."""
        given = {EXPORT_OTLP: self.otlp.endpoint, EXPORT_WEBHOOK: self.webhook.url}
        return [name for name, url in given.items() if url]

    @model_validator(mode="after")
    def _are_urls(self) -> Self:
        given = {"otlp.endpoint": self.otlp.endpoint, "webhook.url": self.webhook.url}
        for name, url in given.items():
            if url and not url.startswith(("http://", "https://")):
                raise ValueError(
                    f"export.{name} is {url!r}: write a URL that begins with http:// or https://"
                )
        return self


class Checkpoint(SettingsSection):
    """Checkpoints of open traces, so that a restart reads little of the log."""

    interval_seconds: Seconds = 5
    """The shortest time between two checkpoints."""
    max_interval_seconds: Seconds = 60
    """The longest time between two checkpoints."""
    log_bytes: Size = 32 * MIB
    """A checkpoint is written after `interval_seconds` if a restart would otherwise read more of
    the log than this, and after `max_interval_seconds` in any case."""
