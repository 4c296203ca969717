"""The settings: their names, units, defaults, bounds and meaning. ``config.toml`` and
``docs/configuration.md`` are generated from here (:mod:`betrace.service.cli.docs.configuration`);
loading is in :mod:`betrace.service.config.load`.

The text below a setting is its documentation. A name says its unit where it has one:
``_seconds``, ``_ms``, ``_bytes``, ``_spans``, ``_signals``, ``_rows``.
"""

from __future__ import annotations

from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, model_validator

from betrace.service.config.alerts import AlertSettings
from betrace.service.config.base import OFF, is_loopback, split_address
from betrace.service.config.cluster import ClusterSettings
from betrace.service.config.edge import (
    Api,
    Auth,
    Ingest,
    Logging,
    Metrics,
    QuotaSettings,
    Shutdown,
    Tls,
    Tracing,
)
from betrace.service.config.stages import (
    Audit,
    BreakersSettings,
    CacheSettings,
    Checkpoint,
    DeadLetterSettings,
    Export,
    FallbackSettings,
    PipelineSettings,
    Redelivery,
    Rules,
    Traces,
)
from betrace.service.config.stores import (
    Archive,
    DuckDb,
    LedgerSettings,
    Log,
    Retention,
    Storage,
)

_ANY_HOST = ("0.0.0.0", "::")


def _same_host(host: str, listening: str) -> bool:
    """Whether requests to ``host`` reach a listener on the address ``listening``."""
    one, other = ("127.0.0.1" if each == "localhost" else each for each in (host, listening))
    return one == other or (other in _ANY_HOST and is_loopback(one))


class Settings(BaseModel):
    """All settings. Immutable; :func:`betrace.service.config.load.load` makes one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ingest: Ingest = Ingest()
    api: Api = Api()
    metrics: Metrics = Metrics()
    storage: Storage = Storage()
    log: Log = Log()
    pipeline: PipelineSettings = PipelineSettings()
    traces: Traces = Traces()
    rules: Rules = Rules()
    ledger: LedgerSettings = LedgerSettings()
    duckdb: DuckDb = DuckDb()
    archive: Archive = Archive()
    retention: Retention = Retention()
    caches: CacheSettings = CacheSettings()
    breakers: BreakersSettings = BreakersSettings()
    export: Export = Export()
    alerts: AlertSettings = AlertSettings()
    redelivery: Redelivery = Redelivery()
    dead_letters: DeadLetterSettings = DeadLetterSettings()
    fallback: FallbackSettings = FallbackSettings()
    audit: Audit = Audit()
    checkpoint: Checkpoint = Checkpoint()
    quotas: QuotaSettings = QuotaSettings()
    auth: Auth = Auth()
    tls: Tls = Tls()
    shutdown: Shutdown = Shutdown()
    logging: Logging = Logging()
    tracing: Tracing = Tracing()
    cluster: ClusterSettings | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.auth.enabled and "*" in self.ingest.cors_origins:
            raise ValueError(
                'ingest.cors_origins has "*" while auth.enabled is true; name the origins whose '
                "pages may send"
            )
        taken: dict[tuple[str, int], str] = {}
        addresses = {
            "ingest.address": self.ingest.address,
            "ingest.grpc_address": OFF if self.ingest.address == OFF else self.ingest.grpc_address,
            "api.address": self.api.address,
            "metrics.address": self.metrics.address,
        }
        for setting, address in addresses.items():
            if address == OFF:
                continue
            host, port = split_address(address)
            if not (is_loopback(host) or self.auth.enabled or self.auth.insecure):
                raise ValueError(
                    f"{setting} is {address}, which other machines can reach, but "
                    "authentication is off; set auth.enabled, listen on 127.0.0.1, or accept the "
                    "risk with auth.insecure = true (--insecure)"
                )
            if port and (other := taken.setdefault((host, port), setting)) != setting:
                raise ValueError(
                    f"{setting} and {other} are both {address}; give each its own port"
                )
        self._exports_elsewhere(addresses)
        return self

    def _exports_elsewhere(self, addresses: dict[str, str]) -> None:
        """Refuse to send signals or alerts to a listener of this service."""
        listening = {
            (host, port): name
            for name, address in addresses.items()
            if address != OFF
            for host, port in [split_address(address)]
        }
        exports = [
            ("export.otlp.endpoint", self.export.otlp.endpoint),
            ("export.webhook.url", self.export.webhook.url),
            ("alerts.webhook.url", self.alerts.webhook.url),
            *(("alerts.alertmanager.urls", url) for url in self.alerts.alertmanager.urls),
        ]
        for setting, url in exports:
            parts = urlsplit(url)
            host, port = (
                parts.hostname or "",
                parts.port or (443 if parts.scheme == "https" else 80),
            )
            for (own, own_port), name in listening.items():
                if port == own_port and _same_host(host, own):
                    raise ValueError(
                        f"{setting} is {url}, but {name} of this service listens there; name the "
                        "Collector or the receiver that signals are for"
                    )
