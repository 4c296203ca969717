"""Settings of the listeners, of who may use them, and of the process."""

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
    Section,
    Size,
    Workers,
)
from betrace.service.tenants import TENANT_RULE, is_tenant_name

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,A-Z]+")


def _http_or_empty(text: str) -> str:
    if text and not text.startswith(("http://", "https://")):
        raise ValueError("is not a URL: write http://host:port/v1/traces, or nothing")
    return text


def _origins(origins: list[str]) -> list[str]:
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"has {origin!r}, which is not an origin: write scheme, host and port only, in "
                'lower case, such as "https://shop.example"'
            )
    return origins


class Ingest(Section):
    """The listeners that receive spans: OTLP over HTTP, and over gRPC."""

    address: Listen = "127.0.0.1:4318"
    """Where OTLP over HTTP is received, as host:port; off for an instance that only answers
    queries, which then has no gRPC either."""
    grpc_address: Listen = "127.0.0.1:4317"
    """Where OTLP over gRPC is received, as host:port, or off."""
    max_body_bytes: Size = 20 * MIB
    """Largest request body, before and after decompression; above it the answer is 413."""
    max_buffered_bytes: Size = 256 * MIB
    """Request bodies held in memory at once, those still arriving included; above it 503."""
    cors_origins: Annotated[list[str], AfterValidator(_origins)] = Field(default_factory=list)
    """Origins of pages that may send spans from a browser, such as "https://shop.example"; "*" for
    all, only without authentication."""
    max_connections: Count = 1024
    """Connections open at once; more wait to be accepted."""
    head_timeout_seconds: Seconds = 10
    """The headers of a request must arrive within this after its first byte; otherwise the answer
    is 408 and the connection ends. The same limit applies to TLS handshakes."""
    body_timeout_seconds: Seconds = 30
    """A body must have arrived within this; then the answer is 503 and the connection ends."""
    answer_timeout_seconds: Seconds = 30
    """A queued request whose outcome is not known within this gets 503; its spans may yet be
    accepted."""
    keep_alive_seconds: Seconds = 75
    """An idle connection stays open this long; exporters send every 5 s to 60 s."""
    refuse_above: Fraction = 0.9
    """Requests get 503 while the span-ingestion channel is fuller than this fraction."""
    offer_timeout_ms: Count = 100
    """A request that cannot be queued within this gets 503."""
    retry_after_min_seconds: Annotated[int, Field(ge=1, le=3600)] = 1
    """Least Retry-After of a 503 or 429. Python and JavaScript exporters drop a batch when it
    is more than their 10 s in all."""
    retry_after_max_seconds: Annotated[int, Field(ge=1, le=3600)] = 5
    """Most Retry-After, given when the service is fullest."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.retry_after_min_seconds > self.retry_after_max_seconds:
            raise ValueError(
                f"ingest.retry_after_min_seconds ({self.retry_after_min_seconds}) is more than "
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


class Api(Section):
    """The listener for queries, administration, health and documentation."""

    address: Listen = "127.0.0.1:8090"
    """Where it listens, as host:port, or off."""
    max_body_bytes: Size = 4 * MIB
    """Largest request body: a rule, or the trace of a rule test."""
    query_timeout_seconds: Seconds = 10
    """A query that takes longer gets 503."""
    query_threads: Workers = 8
    """Queries that run at once; more wait, within query_timeout_seconds."""
    max_streams: Count = 100
    """Server-sent event streams open at once; more get 503."""


class Metrics(Section):
    """Metrics."""

    address: Listen = "127.0.0.1:9090"
    """A listener for /metrics alone, as host:port, or off; the API serves /metrics as well."""
    window_seconds: Seconds = 60
    """Rates and latency percentiles cover this long."""


class Quotas(Section):
    """How many spans a tenant may send; above it the answer is 429."""

    spans_per_second: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Of each tenant that has no quota of its own; 0 is no limit."""
    burst_seconds: Seconds = 10
    """A tenant that was silent may send this many seconds' worth at once."""
    tenants: dict[str, Annotated[int, Field(ge=0, le=1_000_000_000)]] = Field(default_factory=dict)
    """Quotas of single tenants, such as { acme = 50000 }."""
    tracked_tenants: Count = 10_000
    """Tenants whose use is remembered; the one silent longest is forgotten first."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for tenant in self.tenants:
            if not is_tenant_name(tenant):
                raise ValueError(f"quotas.tenants names {tenant!r}, but {TENANT_RULE}")
        return self


class Auth(Section):
    """Who may use the service. Off, whoever reaches a listener may use it, as the tenant they name;
    on, a tenant proves itself with a token that its key signed (`betrace tenants`), an operator
    with the operator token."""

    enabled: bool = False
    """Ask for tokens."""
    operator_token: SecretStr = SecretStr("")
    """The operator token, 20 characters or more; better in the variable
    BETRACE_AUTH__OPERATOR_TOKEN, or in a file, than here."""
    operator_token_file: str = ""
    """A file that holds the operator token alone, where operator_token is empty."""
    scrape_token: SecretStr = SecretStr("")
    """A token that may read /metrics and nothing else, for Prometheus; empty for none. The operator
    token may read it as well."""
    clock_skew_seconds: Annotated[float, Field(ge=0, le=600)] = 30
    """How much the clock of whoever makes tokens may differ."""
    remembered_tokens: Count = 10_000
    """Tokens that are not verified again with each request, until they expire or their keys are
    revoked."""
    insecure: bool = False
    """Listen on addresses that other machines can reach without authentication all the same."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.operator_token.get_secret_value() or self.operator_token_file
        if self.enabled and not given:
            raise ValueError(
                "auth.enabled is true, but there is no operator token; set "
                "auth.operator_token_file to a file that holds one, such as "
                "`openssl rand -hex 32` makes"
            )
        if 0 < len(self.scrape_token.get_secret_value()) < 20:
            raise ValueError(
                "auth.scrape_token has less than 20 characters; use a random one, such as "
                "`openssl rand -hex 32` makes"
            )
        return self


class Tls(Section):
    """TLS of all listeners."""

    certificate: str = ""
    """File of the certificate chain (PEM); empty for plain HTTP."""
    key: str = ""
    """File of its private key (PEM)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.certificate) != bool(self.key):
            given, missing = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise ValueError(f"tls.{given} is set but tls.{missing} is not; set both or neither")
        return self


class Shutdown(Section):
    """How it stops: not ready, a pause, no more requests, drain, checkpoint, close."""

    delay_seconds: SecondsOrZero = 0
    """Pause between turning not ready and refusing requests, for load balancers to notice."""
    grace_seconds: Seconds = 30
    """Stages and requests in progress have this long to finish: three quarters of it are for
    requests that are still arriving, which then get 503, the rest for what had arrived."""


class Tracing(Section):
    """The service's own traces, of batches that a stage takes long for."""

    endpoint: Annotated[str, AfterValidator(_http_or_empty)] = ""
    """Where they are sent: a URL of OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; empty
    for none. Headers for it, such as a token, are in the variable OTEL_EXPORTER_OTLP_HEADERS."""
    slow_batch_ms: Count = 1000
    """A batch that a stage works on for this long becomes a trace; at most one a second."""
    tenant: str = "betrace"
    """They are sent as this tenant's (header X-Scope-OrgID), whose own batches are never traced, so
    that the service may be its own endpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not is_tenant_name(self.tenant):
            raise ValueError(f"tracing.tenant is {self.tenant!r}, but {TENANT_RULE}")
        return self


class Logging(Section):
    """The service's own log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is written."""
    format: Literal["text", "logfmt", "json"] = "text"
    """Of a line: text to read, key=value pairs, or a JSON object."""
