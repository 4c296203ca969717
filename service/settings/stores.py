"""Settings of the stores: span log, ledger, DuckDB."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.settings.base import (
    MIB,
    Address,
    Count,
    Seconds,
    Section,
    Size,
    Workers,
    split_address,
)


class Storage(Section):
    """Where data is kept."""

    path: Path = Path("./data")
    """Directory of the span log, signals, rules, checkpoints and dead letters; made if missing."""


class Log(Section):
    """The span log: everything accepted, the source of truth."""

    ack: Literal["written", "synced"] = "written"
    """When a request is answered: written survives the death of the process, synced (after a
    shared sync of the disk) that of the machine."""
    flush_seconds: Seconds = 1
    """With ack = written, the disk is synced this often."""
    buffer_spans: Count = 1000
    """A write gathers about this many spans where they are waiting."""
    segment_bytes: Size = 128 * MIB
    """A file of the log is closed and a new one begun at this size."""
    retention_days: Annotated[int, Field(ge=0, le=36_500)] = 0
    """Days are deleted when older than this; 0 keeps all."""


class Ledger(Section):
    """The record of signals, as transfers of a double-entry ledger."""

    kind: Literal["sqlite", "tigerbeetle"] = "sqlite"
    """sqlite is embedded; tigerbeetle needs a server of its own."""
    batch_signals: Count = 128
    """Signals written at once, at most."""
    flush_ms: Count = 500
    """A batch that is not full is written after this."""
    tigerbeetle_addresses: list[Address] = Field(default_factory=lambda: ["127.0.0.1:3000"])
    """The replicas, each as ip:port (no host names)."""
    tigerbeetle_cluster_id: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """The cluster id the servers were formatted with."""
    tigerbeetle_max_batch: Annotated[int, Field(ge=1, le=8189)] = 8189
    """Events in one call, at most; 253 for a server started with --development."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind != "tigerbeetle":
            return self
        if not self.tigerbeetle_addresses:
            raise ValueError(
                'ledger.kind is "tigerbeetle" but ledger.tigerbeetle_addresses is empty; '
                'name a replica, such as "127.0.0.1:3000"'
            )
        for address in self.tigerbeetle_addresses:
            try:
                ipaddress.ip_address(split_address(address)[0])
            except ValueError:
                raise ValueError(
                    f"ledger.tigerbeetle_addresses has the host name in {address!r}, which the "
                    "client cannot look up; write its IP address"
                ) from None
        if self.batch_signals > self.tigerbeetle_max_batch:
            raise ValueError(
                f"ledger.batch_signals ({self.batch_signals}) is more than "
                f"ledger.tigerbeetle_max_batch ({self.tigerbeetle_max_batch}), which the server "
                "would refuse; lower the first"
            )
        return self


class DuckDb(Section):
    """The query store: a DuckDB file per tenant."""

    batch_rows: Count = 1000
    """Rows of one transaction, at most."""
    flush_ms: Count = 500
    """A batch that is not full is written after this."""
    pool_max: Workers = 5
    """Connections per tenant, at most."""
    pool_idle: Annotated[int, Field(ge=0, le=1000)] = 1
    """Connections per tenant kept when idle."""
    pool_timeout_seconds: Seconds = 5
    """How long a caller waits for a connection when all are in use."""
    idle_close_seconds: Seconds = 300
    """A tenant's file is closed when unused for this long."""
    memory_bytes: Annotated[int, Field(ge=64 * MIB, le=1 << 44)] = 512 * MIB
    """Memory that DuckDB may use for all tenants together."""
    threads: Workers = 2
    """Threads that DuckDB may use."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pool_idle > self.pool_max:
            raise ValueError(
                f"duckdb.pool_idle ({self.pool_idle}) is more than duckdb.pool_max "
                f"({self.pool_max}); lower the first or raise the second"
            )
        return self
