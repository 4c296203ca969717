"""Settings of the stores: span log, ledger, DuckDB."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from betrace.service.config.base import MIB, Count, Seconds, Section, Size, Workers, split_address


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
    segment_bytes: Size = 128 * MIB
    """A file of the log is closed and a new one begun at this size."""


class TigerBeetle(Section):
    """The servers, where ledger.kind is tigerbeetle."""

    addresses: str = "127.0.0.1:3000"
    """The replicas' addresses, ip:port without host names, several separated by commas."""
    cluster_id: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """What the cluster was formatted with."""
    batch_transfers: Annotated[int, Field(ge=1, le=8189)] = 8189
    """Transfers of one request, at most; 253 for a server started with --development."""
    start_seconds: Seconds = 5
    """How long the start waits for the cluster; without it, signals wait in local files."""
    close_seconds: Seconds = 5
    """How long the stop waits for a call that hangs."""

    @field_validator("addresses")
    @classmethod
    def _addresses(cls, text: str) -> str:
        for each in text.split(","):
            host, port = split_address(each.strip())
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise ValueError(
                    f"has {host}; TigerBeetle's client knows no host names: write an IP address"
                ) from None
            if not port:
                raise ValueError("has port 0: write the port that the replica listens on")
        return ",".join(each.strip() for each in text.split(","))


class Ledger(Section):
    """The record of signals, as transfers of a double-entry ledger. It is written as soon as there
    is something; what arrives meanwhile makes the next batch."""

    kind: Literal["sqlite", "tigerbeetle"] = "sqlite"
    """Where it is: in a SQLite file of the data directory, or in a TigerBeetle cluster."""
    batch_signals: Count = 128
    """Signals written at once, at most."""
    tigerbeetle: TigerBeetle = TigerBeetle()


class DuckDb(Section):
    """The query store: a DuckDB file per tenant."""

    batch_rows: Count = 1000
    """Rows of one transaction, at most."""
    flush_ms: Count = 250
    """A batch that is not full is written after this, unless commits take their share already."""
    flush_most_seconds: Seconds = 30
    """A batch is written after this, whatever commits cost. Rows wait so long only where hundreds
    of tenants are active; a restart reads that much more of the span log."""
    waiting_rows: Count = 160_000
    """Rows that may wait for a commit, of all tenants together; about 0.5 kB each. Where three
    quarters of them wait, the tenant with the most is written, whatever commits cost."""
    commit_cores: Annotated[float, Field(gt=0, le=64)] = 0.025
    """CPU time that commits may take, in cores: with more tenants each one's rows wait longer.
    Commits with signals go first and may take five times as much."""
    pool_max: Workers = 5
    """Connections per tenant, at most."""
    pool_idle: Annotated[int, Field(ge=0, le=1000)] = 1
    """Connections per tenant kept when idle."""
    pool_timeout_seconds: Seconds = 5
    """How long a caller waits for a connection when all are in use."""
    idle_close_seconds: Seconds = 300
    """A tenant's file is closed when unused for this long."""
    memory_bytes: Annotated[int, Field(ge=64 * MIB, le=1 << 44)] = 1024 * MIB
    """Memory that DuckDB may use for all tenants together. A tenant whose rows are not checkpointed
    yet takes almost 1 MB; beyond three quarters of it, files are checkpointed before their time.
    Of pages of files a thirty-second part stays after a checkpoint: the system has them in its
    cache."""
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


class Archive(Section):
    """The archive: days that are over as Parquet files, for any engine to query."""

    enabled: bool = False
    """Whether the service archives every day; betrace archive does it at any time."""
    directory: str = ""
    """Where the files are; empty: archive in storage.path."""
    hour_utc: Annotated[int, Field(ge=0, le=23)] = 1
    """The hour at which the day before is archived, and old data deleted."""


class Retention(Section):
    """When data is deleted, once a day. Signals stay: the ledger is a record."""

    log_days: Annotated[int, Field(ge=0, le=36_500)] = 0
    """The span log of days longer ago than this is deleted, with archive.enabled only once it is
    archived; 0 keeps all."""
    trace_days: Annotated[int, Field(ge=0, le=36_500)] = 0
    """Traces last seen longer ago than this leave the index; 0 keeps all."""
