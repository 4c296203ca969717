"""Settings of the stores: span log, ledger, DuckDB, archive and retention."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from betrace.service.config.base import (
    MIB,
    Count,
    Seconds,
    SettingsSection,
    Size,
    Workers,
    split_address,
)


class Storage(SettingsSection):
    """Where data is kept."""

    path: Path = Path("./data")
    """Directory of the span log, signals, rules, checkpoints and dead letters. Created if
    missing."""


class Log(SettingsSection):
    """The span log: everything accepted. It is the source of truth."""

    ack: Literal["written", "synced"] = "written"
    """When a request is acknowledged: `written` survives a process crash, `synced` a machine crash.
    Waiting requests share a disk sync."""
    flush_seconds: Seconds = 1
    """How often the disk is synced with ack = written."""
    segment_bytes: Size = 128 * MIB
    """Size at which a log file is closed and a new one is begun."""
    scrub_bytes_per_second: Annotated[int, Field(ge=0, le=1 << 30)] = 2 * MIB
    """The rate at which the log and DuckDB's files are read once a day, to find damage in data that
    nobody reads. 0 turns this off."""


class TigerBeetle(SettingsSection):
    """The TigerBeetle cluster, if ledger.kind is tigerbeetle. Needs the extra `tigerbeetle`."""

    addresses: str = "127.0.0.1:3000"
    """The replicas' addresses as ip:port, separated by commas. Host names are not supported."""
    cluster_id: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """The cluster id given when the cluster was formatted."""
    batch_transfers: Annotated[int, Field(ge=1, le=8189)] = 8189
    """Maximum transfers per request; 253 for a server started with --development."""
    start_seconds: Seconds = 5
    """How long the start waits for the cluster. After that, signals wait in local files."""
    close_seconds: Seconds = 5
    """How long the shutdown waits for a hung call."""

    @field_validator("addresses")
    @classmethod
    def _addresses(cls, text: str) -> str:
        for each in text.split(","):
            host, port = split_address(each.strip())
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise ValueError(
                    f"has {host}; TigerBeetle's client does not resolve host names: write an IP "
                    "address"
                ) from None
            if not port:
                raise ValueError("has port 0: write the port that the replica listens on")
        return ",".join(each.strip() for each in text.split(","))


class LedgerSettings(SettingsSection):
    """The record of signals, as transfers in a double-entry ledger. A batch is written as soon as
    there is one; signals that arrive in the meantime form the next batch."""

    kind: Literal["sqlite", "tigerbeetle"] = "sqlite"
    """Where it is: a SQLite file in the data directory, or a TigerBeetle cluster."""
    batch_signals: Count = 128
    """Maximum signals per batch."""
    tigerbeetle: TigerBeetle = TigerBeetle()


class DuckDb(SettingsSection):
    """The query store: a DuckDB file per tenant."""

    batch_rows: Count = 1000
    """Maximum rows per transaction."""
    flush_ms: Count = 250
    """A batch that is not full is written after this long, unless commits already use their share
    of CPU time."""
    flush_most_seconds: Seconds = 30
    """A batch is written after this long, whatever commits cost. Rows wait this long only if
    hundreds of tenants are active. A restart reads that much more of the span log."""
    waiting_rows: Count = 160_000
    """Maximum rows of all tenants that wait for a commit; about 0.5 kB each. At three quarters of
    it, the tenant with the most rows is written, whatever commits cost."""
    commit_cores: Annotated[float, Field(gt=0, le=64)] = 0.025
    """CPU time for commits, in cores. With more tenants, each one's rows wait longer. Commits with
    signals go first and may use five times as much."""
    pool_max: Workers = 5
    """Maximum connections per tenant."""
    pool_idle: Annotated[int, Field(ge=0, le=1000)] = 1
    """Idle connections kept per tenant."""
    pool_timeout_seconds: Seconds = 5
    """How long a caller waits for a connection if all are in use."""
    idle_close_seconds: Seconds = 300
    """A tenant's file is closed when unused for this long."""
    memory_bytes: Annotated[int, Field(ge=64 * MIB, le=1 << 44)] = 1024 * MIB
    """Memory that DuckDB may use for all tenants together. A tenant with rows that are not yet
    checkpointed takes almost 1 MB; above three quarters of the limit, files are checkpointed early.
    After a checkpoint, only 1/32 of the file pages stay in memory, because the system caches
    them."""
    threads: Workers = 2
    """Threads that DuckDB may use."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pool_idle > self.pool_max:
            raise ValueError(
                f"duckdb.pool_idle ({self.pool_idle}) is greater than duckdb.pool_max "
                f"({self.pool_max}); lower the first or raise the second"
            )
        return self


class Archive(SettingsSection):
    """The archive: finished days as Parquet files, for any query engine."""

    enabled: bool = False
    """Whether the service archives every day. `betrace archive` does it at any time."""
    directory: str = ""
    """Directory of the files; if empty, archive in storage.path."""
    hour_utc: Annotated[int, Field(ge=0, le=23)] = 1
    """The hour at which the previous day is archived and old data is deleted."""


class Retention(SettingsSection):
    """How long data is kept; it is deleted once a day. Signals are never deleted."""

    log_days: Annotated[int, Field(ge=0, le=36_500)] = 0
    """Days of the span log to keep; 0 keeps all. With archive.enabled, a day is deleted only once
    it is archived. On a cluster, it is the setting of the evaluators."""
    trace_days: Annotated[int, Field(ge=0, le=36_500)] = 0
    """Days to keep a trace in the index after its last span; 0 keeps all."""
