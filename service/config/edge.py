"""Settings of the listeners, of authentication and quotas, and of the process."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from betrace.service.config.base import (
    MIB,
    Count,
    Fraction,
    Listen,
    Seconds,
    SecondsOrZero,
    SettingsSection,
    Size,
    Workers,
)
from betrace.service.tenants import DEFAULT_TENANT, TENANT_RULE, is_tenant_name

_BASE_URL = re.compile(r"https?://[^/?#\s\"'<>]+/?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,A-Z]+")


def _http_or_empty(text: str) -> str:
    if text and not text.startswith(("http://", "https://")):
        raise ValueError("is not a URL: write http://host:port/v1/traces, or leave it empty")
    return text


def _base_url(text: str) -> str:
    if text and not _BASE_URL.fullmatch(text):
        raise ValueError(
            f"is {text!r}: write scheme, host and port only, such as https://betrace.example.org"
        )
    return text.rstrip("/")


def _origins(origins: list[str]) -> list[str]:
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"has {origin!r}, which is not an origin: write scheme, host and port only, in "
                'lower case, such as "https://shop.example"'
            )
    return origins


class Ingest(SettingsSection):
    """The listeners that receive spans: OTLP over HTTP and over gRPC."""

    address: Listen = "127.0.0.1:4318"
    """The address for OTLP over HTTP, as host:port; off for an instance that only answers queries,
    which turns gRPC off as well."""
    grpc_address: Listen = "127.0.0.1:4317"
    """The address for OTLP over gRPC, as host:port, or off."""
    max_body_bytes: Size = 20 * MIB
    """Largest request body, before and after decompression. Larger bodies get 413."""
    max_buffered_bytes: Size = 256 * MIB
    """Memory for request bodies, including those still arriving. Above it, requests get 503."""
    cors_origins: Annotated[list[str], AfterValidator(_origins)] = Field(default_factory=list)
    """Origins of pages that may send spans from a browser, such as "https://shop.example"; "*" for
    all, only without authentication."""
    max_connections: Count = 1024
    """Maximum open connections, at most a third of the files that the process may open. For more,
    slow and idle connections are closed."""
    head_timeout_seconds: Seconds = 10
    """Time limit for a request's headers, from its first byte. Later ones get 408 and the
    connection is closed. The same limit applies to TLS handshakes."""
    body_timeout_seconds: Seconds = 30
    """Time limit for a request body. Later ones get 503 and the connection is closed."""
    answer_timeout_seconds: Seconds = 30
    """Time limit for the outcome of a queued request. Later ones get 503; their spans may still be
    accepted."""
    keep_alive_seconds: Seconds = 75
    """How long an idle connection stays open. Exporters send every 5 s to 60 s."""
    max_tenants: Count = 1000
    """Maximum tenants without authentication, when anyone may name a new one. Spans and rules of
    another new tenant get 403; existing tenants, and those that operators create, are not
    affected. On a cluster, the limit is for the tenants of all edges together."""
    refuse_above: Fraction = 0.9
    """Requests get 503 while the span-ingestion channel is fuller than this fraction."""
    offer_timeout_ms: Count = 100
    """A request that cannot be queued within this time gets 503."""
    retry_after_min_seconds: Annotated[int, Field(ge=1, le=3600)] = 1
    """Smallest Retry-After of a 503 or 429. Python and JavaScript exporters drop a batch if it
    exceeds their total of 10 s."""
    retry_after_max_seconds: Annotated[int, Field(ge=1, le=3600)] = 5
    """Largest Retry-After, sent when the service is fullest, or when spans cannot be stored for
    longer than this."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.retry_after_min_seconds > self.retry_after_max_seconds:
            raise ValueError(
                f"ingest.retry_after_min_seconds ({self.retry_after_min_seconds}) exceeds "
                f"ingest.retry_after_max_seconds ({self.retry_after_max_seconds}); "
                "lower the first or raise the second"
            )
        if self.max_buffered_bytes < self.max_body_bytes:
            raise ValueError(
                f"ingest.max_buffered_bytes ({self.max_buffered_bytes}) is less than "
                f"ingest.max_body_bytes ({self.max_body_bytes}), so the largest body could never "
                "be received; raise the first or lower the second"
            )
        return self


class Api(SettingsSection):
    """The listener for queries, administration, health and documentation."""

    address: Listen = "127.0.0.1:8090"
    """The address to listen on, as host:port, or off."""
    public_url: Annotated[str, AfterValidator(_base_url)] = ""
    """The URL under which people reach this listener, such as https://betrace.example.org. Signals
    in the API and alerts then link to their pages; empty for no links."""
    max_connections: Count = 512
    """Maximum open connections, at most an eighth of the files that the process may open. For
    more, idle connections are closed."""
    max_body_bytes: Size = 4 * MIB
    """Largest request body, such as a rule or the trace of a rule test."""
    query_timeout_seconds: Seconds = 10
    """Time limit for a query. Slower ones get 503."""
    query_threads: Workers = 8
    """Maximum concurrent queries. More wait, within query_timeout_seconds. One tenant may have half
    of them."""
    max_streams: Count = 100
    """Maximum open server-sent event streams. More get 503."""

    def page_url(self, path: str, tenant: str) -> str | None:
        """The address of a page, such as ``/signals/<id>``; None without ``public_url``."""
        if not self.public_url:
            return None
        return self.public_url + path + ("" if tenant == DEFAULT_TENANT else f"?tenant={tenant}")


class Metrics(SettingsSection):
    """Metrics, and the window of /api/performance."""

    address: Listen = "127.0.0.1:9090"
    """A listener for /metrics alone, as host:port, or off. The API serves /metrics too."""
    window_seconds: Seconds = 60
    """Length of the window for rates and latency percentiles."""
    max_rule_series: Count = 2000
    """Maximum series of betrace_rule_signals_total and of betrace_rule_evaluations_total. Rules
    beyond it are counted together, with the labels tenant and rule `(other)`."""


class QuotaSettings(SettingsSection):
    """How many spans a tenant may send. Requests above the quota get 429."""

    spans_per_second: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Quota of each tenant without one of its own; 0 means no limit."""
    burst_seconds: Seconds = 10
    """An idle tenant may send this many seconds' worth at once."""
    tenants: dict[str, Annotated[int, Field(ge=0, le=1_000_000_000)]] = Field(default_factory=dict)
    """Quotas of individual tenants, such as { acme = 50000 }."""
    tracked_tenants: Count = 10_000
    """Maximum tenants whose usage is tracked. The one idle longest is dropped first."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for tenant in self.tenants:
            if not is_tenant_name(tenant):
                raise ValueError(f"quotas.tenants names {tenant!r}, but {TENANT_RULE}")
        return self


class Auth(SettingsSection):
    """Who may use the service. With authentication off, anyone who can reach a listener may use it,
    as any tenant. With it on, a tenant sends a token signed with its key (`betrace tenants`), and
    an operator sends the operator token."""

    enabled: bool = False
    """Whether requests need a token."""
    operator_token: SecretStr = SecretStr("")
    """The operator token, at least 20 characters. Prefer the variable BETRACE_AUTH__OPERATOR_TOKEN
    or a file."""
    operator_token_file: str = ""
    """A file with only the operator token, used if operator_token is empty."""
    read_only_token: SecretStr = SecretStr("")
    """A token for people and dashboards that only look: it can read what the operator token can,
    and change nothing. At least 20 characters; empty for none. Prefer the variable
    BETRACE_AUTH__READ_ONLY_TOKEN or a file."""
    read_only_token_file: str = ""
    """A file with only this token, used if read_only_token is empty."""
    scrape_token: SecretStr = SecretStr("")
    """A token for Prometheus that can only read /metrics; empty for none. The operator token can
    read /metrics too."""
    clock_skew_seconds: Annotated[float, Field(ge=0, le=600)] = 30
    """Allowed clock difference to the machine that makes tokens."""
    remembered_tokens: Count = 10_000
    """Maximum verified tokens kept, so that they are not verified with each request. A token is
    dropped when it expires or its key is revoked."""
    insecure: bool = False
    """Listen on non-loopback addresses without authentication."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.operator_token.get_secret_value() or self.operator_token_file
        if self.enabled and not given:
            raise ValueError(
                "auth.enabled is true, but there is no operator token; make one with "
                "`openssl rand -hex 32`, and set auth.operator_token_file to its file"
            )
        if 0 < len(self.scrape_token.get_secret_value()) < 20:
            raise ValueError(
                "auth.scrape_token has less than 20 characters; make a random one with "
                "`openssl rand -hex 32`"
            )
        return self


class Tls(SettingsSection):
    """TLS of all listeners."""

    certificate: str = ""
    """PEM file with the certificate chain; empty for plain HTTP."""
    key: str = ""
    """PEM file with its private key."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.certificate) != bool(self.key):
            given, missing = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise ValueError(f"tls.{given} is set but tls.{missing} is not; set both or neither")
        return self


class Shutdown(SettingsSection):
    """How the service stops: not ready, a delay, no more requests, drain, checkpoint, close."""

    delay_seconds: SecondsOrZero = 0
    """Delay between becoming not ready and refusing requests, so that load balancers notice."""
    grace_seconds: Seconds = 30
    """Time limit for stages and requests in progress. Requests still arriving after three quarters
    of it get 503; the rest of the time is for what has arrived."""


class Tracing(SettingsSection):
    """The service's own traces, of slow batches. Needs the extra `tracing`."""

    endpoint: Annotated[str, AfterValidator(_http_or_empty)] = ""
    """Where traces are sent with OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; empty for
    none. Set headers, such as a token, in the variable OTEL_EXPORTER_OTLP_HEADERS."""
    slow_batch_ms: Count = 1000
    """A batch that keeps a stage busy this long becomes a trace; at most one per second."""
    tenant: str = "betrace"
    """The tenant of these traces (header X-Scope-OrgID). Its own batches are never traced, so the
    service can be its own endpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not is_tenant_name(self.tenant):
            raise ValueError(f"tracing.tenant is {self.tenant!r}, but {TENANT_RULE}")
        return self


class Logging(SettingsSection):
    """The service's own log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest severity that is written."""
    format: Literal["text", "logfmt", "json"] = "text"
    """Format of a line: text for people, key=value pairs, or a JSON object."""
