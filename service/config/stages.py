"""Settings of the pipeline: stages, traces, rules, caches and what happens on failure."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from betrace.service.config.base import (
    MIB,
    Count,
    Fraction,
    Seconds,
    SecondsOrZero,
    Section,
    Size,
    Workers,
)


class Pipeline(Section):
    """Stages and the channels between them. A channel that is full makes the stage before it
    wait, up to the edge, which refuses."""

    ingest_capacity_spans: Count = 10_000
    """Capacity of the span-ingestion channel."""
    ingest_workers: Workers = 1
    """Workers of the span-ingestion stage. One with large batches beats ten, see
    docs/decisions/0003-one-worker-large-batches.md."""
    ingest_batch_spans: Count = 8_000
    """Requests that wait are decoded together up to this many spans."""
    correlate_capacity_spans: Count = 5_000
    """Capacity of the trace-correlation channel."""
    correlate_workers: Workers = 1
    """Workers of the trace-correlation stage."""
    correlate_batch_spans: Count = 5_000
    """Batches that wait are folded together up to this many spans."""
    evaluate_capacity_traces: Count = 5_000
    """Capacity of the rule-evaluation channel."""
    evaluate_workers: Workers = 1
    """Workers of the rule-evaluation stage."""
    evaluate_batch_traces: Count = 5_000
    """Traces that wait are decided together up to this many."""
    store_capacity_signals: Count = 10_000
    """Capacity of the storage-write channel."""
    store_workers: Workers = 2
    """Workers of the storage-write stage."""
    stall_seconds: Seconds = 30
    """A stage that has input and makes no progress for this long is reported as stalled."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for stage, unit in (("ingest", "spans"), ("correlate", "spans"), ("evaluate", "traces")):
            batch: int = getattr(self, f"{stage}_batch_{unit}")
            capacity: int = getattr(self, f"{stage}_capacity_{unit}")
            if batch > capacity:
                raise ValueError(
                    f"pipeline.{stage}_batch_{unit} ({batch}) is more than "
                    f"pipeline.{stage}_capacity_{unit} ({capacity}), so a batch could never fill; "
                    "lower the first or raise the second"
                )
        return self


class Traces(Section):
    """When a trace is due for evaluation, and how long traces are kept open."""

    idle_seconds: Seconds = 5
    """A trace without a new span for this long is closed."""
    max_age_seconds: Seconds = 3600
    """A trace is closed at this age even if spans still arrive."""
    sweep_seconds: Seconds = 300
    """Expired traces are looked for, and their memory freed, this often."""
    long_lived_spans: Count = 1000
    """Above this many spans a trace is evaluated window by window."""
    window_spans: Count = 100
    """Spans in a window of a long-lived trace."""
    window_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of a window kept as context for the next one."""
    late_filter_bytes: Size = 32 * MIB
    """Memory of the filter that tells late spans from new traces; 32 MiB remember the last 8 to 16
    million traces. A late span of an older trace begins a new one."""
    max_open: Count = 1_000_000
    """Open traces of all tenants; above it those idle longest are closed early."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.idle_seconds > self.max_age_seconds:
            raise ValueError(
                f"traces.idle_seconds ({self.idle_seconds:g}) is more than traces.max_age_seconds "
                f"({self.max_age_seconds:g}), so no trace would ever be closed as idle; "
                "lower the first or raise the second"
            )
        if self.window_spans > self.long_lived_spans:
            raise ValueError(
                f"traces.window_spans ({self.window_spans}) is more than traces.long_lived_spans "
                f"({self.long_lived_spans}); lower the first or raise the second"
            )
        return self


class Rules(Section):
    """Where rules come from."""

    directory: str = ""
    """Rule files (*.yaml): of the tenant default directly, of others in a folder of their name.
    Empty: only rules saved over the API."""
    poll_seconds: Seconds = 2
    """The directory is looked at for changes this often; SIGHUP looks at once."""


class Caches(Section):
    """Caches: how many entries, for how long, and how many bytes where entries differ widely."""

    rule_sets: Count = 500
    """Tenants whose compiled rules are kept."""
    rule_sets_ttl_seconds: Seconds = 1800
    """Compiled rules are dropped when they were not used for this long."""
    rule_sets_bytes: Size = 512 * MIB
    """Memory of compiled rules in the cache: rules with patterns take about 2 MiB a tenant,
    others a few KiB a rule."""
    public_keys: Count = 1000
    """Public keys of tenants that are kept."""
    public_keys_ttl_seconds: Seconds = 3600
    """A public key is read again after this. A revoked key is dropped at once."""
    trace_metadata: Count = 10_000
    """Recent traces of which is kept: the state, for spans that come late, and what the store
    says of them, for those who look at them."""
    trace_metadata_ttl_seconds: Seconds = 300
    """What is known of a trace is dropped after this."""
    trace_metadata_bytes: Size = 64 * MIB
    """Memory of what the store says of recent traces."""
    warm_up_seconds: Seconds = 10
    """So long after the start the caches are filled for the active tenants."""


class Breaker(Section):
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
    """The rates are those of this many last calls."""
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
                f"minimum_calls ({self.minimum_calls}) is more than window_calls "
                f"({self.window_calls}), so the breaker could never open; "
                "lower the first or raise the second"
            )
        return self


class EvaluationBreaker(Breaker):
    """The circuit breaker of rule evaluation."""

    timeout_seconds: Seconds = 10
    """A call that takes longer is given up and counts as failed."""
    slow_call_seconds: Seconds = 5
    """A call that takes longer counts as slow."""
    minimum_calls: Count = 100
    """It cannot open before this many calls."""
    open_seconds: Seconds = 30
    """It stays open this long before it lets trial calls through."""


class StorageBreaker(Breaker):
    """The circuit breakers of storage: one for the ledger, one for DuckDB."""

    timeout_seconds: Seconds = 5
    """A call that takes longer is given up and counts as failed."""
    slow_call_seconds: Seconds = 2.5
    """A call that takes longer counts as slow."""
    minimum_calls: Count = 50
    """It cannot open before this many calls."""
    open_seconds: Seconds = 15
    """It stays open this long before it lets trial calls through."""


class ExportBreaker(Breaker):
    """The circuit breakers of export: one for each destination. A call is a batch of signals."""

    timeout_seconds: Seconds = 10
    """A call that takes longer is given up and counts as failed."""
    slow_call_seconds: Seconds = 10
    """A call that takes longer counts as slow."""
    window_calls: Count = 10
    """The rates are those of this many last calls."""
    minimum_calls: Count = 5
    """It cannot open before this many calls."""
    open_seconds: Seconds = 30
    """It stays open this long before it lets trial calls through."""
    half_open_calls: Count = 1
    """Trial calls, whose rates decide whether it closes."""


class Breakers(Section):
    """Circuit breakers."""

    evaluation: EvaluationBreaker = EvaluationBreaker()
    storage: StorageBreaker = StorageBreaker()
    export: ExportBreaker = ExportBreaker()


class Redelivery(Section):
    """What happens to an item whose processing fails."""

    attempts: Annotated[int, Field(ge=0, le=100)] = 3
    """It is tried again this often, then becomes a dead letter."""
    delay_seconds: SecondsOrZero = 1
    """Pause between attempts."""
    transient_retry_seconds: Seconds = 60
    """A dead letter of a transient error is tried again after this."""


class DeadLetters(Section):
    """Items that a stage failed on for good, kept until they are retried or discarded."""

    max_bytes: Size = 256 * MIB
    """Of all of them; beyond it the oldest are moved to files in dead-letters-exported."""


class Fallback(Section):
    """Local files for what the ledger or DuckDB does not take, written back when it does."""

    max_bytes: Size = 1024 * MIB
    """Of the files of each store; when they are full, requests are refused in the end."""
    file_bytes: Size = 8 * MIB
    """A file of this size is followed by another."""


class Audit(Section):
    """What operators did, in audit.jsonl of the data directory, and what was accepted."""

    max_bytes: Size = 16 * MIB
    """The file is renamed at this size and a new one begun."""
    files: Annotated[int, Field(ge=1, le=1000)] = 5
    """Renamed files kept; the oldest is deleted."""
    batches: bool = False
    """Whether each accepted request is recorded too, in batches.jsonl: tenant, time, spans, bytes,
    place in the log. It never holds up requests: what does not fit is dropped, and counted."""


class Otlp(Section):
    """Signals as log records, to an OpenTelemetry Collector or whatever takes OTLP over HTTP."""

    endpoint: str = ""
    """Such as http://127.0.0.1:4318/v1/logs; empty: off."""
    headers: str = ""
    """Headers sent along, as OTEL_EXPORTER_OTLP_HEADERS has them: name=value,name2=value2."""


class Webhook(Section):
    """Signals as alerts, to whatever takes Alertmanager's webhooks."""

    url: str = ""
    """Where they are posted; empty: off."""
    headers: str = ""
    """Headers sent along: name=value,name2=value2."""
    external_url: str = ""
    """The API's address for others, for links in alerts, such as https://betrace.example.org."""


EXPORT_OTLP, EXPORT_WEBHOOK = EXPORTS = ("export-otlp", "export-webhook")
"""Names of the export destinations, of their exporters and of their breakers."""


class Export(Section):
    """Sending signals to other systems, each at least once. See docs/export.md."""

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


class Checkpoint(Section):
    """Saving the state of open traces, so that a restart reads little of the log."""

    interval_seconds: Seconds = 5
    """How often it is saved."""
