"""``betrace backup`` and ``betrace restore``: copies of the data directory."""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from betrace.service.cli.common import (
    Failure,
    json_option,
    print_json,
    printable,
    settings_options,
    warn,
    with_client,
)

if TYPE_CHECKING:
    from betrace.service.config.cluster import ClusterSettings
    from betrace.service.config.settings import Settings
    from betrace.service.storage.jetstream.client import NatsClient
    from betrace.service.storage.jetstream.configuration import RestoredConfiguration

_REPORT_SECONDS = 5.0


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--without-archive", is_flag=True, help="Leave out archive/ in the data directory.")
@settings_options("data")
@json_option
def backup(
    directory: Path,
    without_archive: bool,
    config: Path | None,
    overrides: dict[str, Any],
    as_json: bool,
) -> None:
    """Copy the data directory to a new DIRECTORY, while the service runs or when it is stopped.

    The copy holds every signal and every span stored before the command began. While the service
    runs, the DuckDB files are left out; after a restore they are rebuilt from the ledger and the
    span log. config.toml, TLS keys and a TigerBeetle cluster are not in the data directory: back
    them up as well.

    On a cluster, back up a query node. The copy also holds what the whole cluster has in common,
    such as rules. Edges and evaluators keep nothing that must be backed up.

    \b
    Example:
      betrace backup /mnt/backup/betrace-$(date +%F) --data ./data
    """
    from betrace.service.config.load import load
    from betrace.service.pipeline.recovery.backup import BackupError, back_up

    settings = load(config, overrides)
    data = settings.storage.path
    try:
        made = back_up(
            data,
            directory,
            version("betrace"),
            _report("copied"),
            archive=not without_archive,
            cluster=_read_cluster(settings),
        )
    except (BackupError, sqlite3.Error) as error:
        raise Failure(_text(error)) from error
    if as_json:
        print_json(
            {
                "path": str(directory),
                "files": len(made.files),
                "bytes": made.bytes,
                "duckdb": made.duckdb,
            }
        )
        return
    click.echo(f"{directory}: {len(made.files)} files, {made.bytes:,} bytes")
    if not made.duckdb:
        click.echo("The service is running, so a restore rebuilds the DuckDB files.")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@settings_options("data")
@json_option
def restore(directory: Path, config: Path | None, overrides: dict[str, Any], as_json: bool) -> None:
    """Copy a backup to the data directory, which must be empty or missing.

    Every file is checked against its digest. Then start the service as usual: it continues as
    after a crash at the time of the backup.

    On a cluster, DIRECTORY is the backup of a query node. A new cluster, after `betrace cluster
    init`, also gets the rules and whatever else was common to the old one.

    \b
    Example:
      betrace restore /mnt/backup/betrace-2026-11-29 --data ./data
    """
    from betrace.service.config.load import load
    from betrace.service.pipeline.recovery.backup import CLUSTER_FILE, BackupError
    from betrace.service.pipeline.recovery.backup import restore as copy_back

    settings = load(config, overrides)
    data = settings.storage.path
    try:
        found = copy_back(directory, data, _report("restored"))
    except BackupError as error:
        raise Failure(_text(error)) from error
    common = None
    if settings.cluster is not None and CLUSTER_FILE in found.files:
        common = _write_cluster(settings.cluster, (directory / CLUSTER_FILE).read_bytes())
    if as_json:
        print_json(
            {
                "path": str(data),
                "files": len(found.files),
                "bytes": found.bytes,
                "cluster": None if common is None else dataclasses.asdict(common),
            }
        )
        return
    click.echo(f"{data}: {len(found.files)} files, {found.bytes:,} bytes")
    for line in _cluster_lines(common):
        click.echo(printable(line))
    role = "" if settings.cluster is None else " --role query"
    click.echo(f"Start the service with: betrace serve{role} --data {data}")


def _read_cluster(settings: Settings) -> bytes | None:
    """What the cluster has in common; None without a cluster."""
    from betrace.service.storage.spanlog.log import LOCK_FILE

    if settings.cluster is None:
        return None
    data = settings.storage.path
    if not (data / LOCK_FILE).exists():
        raise Failure(
            f"{data} is not the data directory of a query node; edges and evaluators keep nothing "
            "that must be backed up"
        )
    from betrace.service.storage.jetstream.configuration import CommonBuckets, read_configuration
    from betrace.service.storage.jetstream.layout import Layout

    layout = Layout.of(settings.cluster)
    return with_client(
        settings.cluster, lambda client: read_configuration(CommonBuckets.of(client, layout))
    )


def _write_cluster(settings: ClusterSettings, copy: bytes) -> RestoredConfiguration:
    """Give a new cluster what the old one had in common."""
    from betrace.service.storage.jetstream.configuration import (
        CommonBuckets,
        NoConfiguration,
        write_configuration,
    )
    from betrace.service.storage.jetstream.layout import Layout
    from betrace.service.storage.jetstream.setup import check

    async def work(client: NatsClient) -> RestoredConfiguration:
        await check(client, settings)
        return await write_configuration(CommonBuckets.of(client, Layout.of(settings)), copy)

    try:
        return with_client(settings, work)
    except NoConfiguration as error:
        raise Failure(f"the rules in the backup cannot be used: {error}") from error


def _cluster_lines(common: RestoredConfiguration | None) -> list[str]:
    if common is None:
        return []
    if common.same_cluster:
        return ["This is the cluster of the backup, so its rules stay as they are."]
    lines = [f"The cluster received {len(common.written)} keys of the old one, such as its rules."]
    if common.kept:
        lines.append(f"It keeps its own {', '.join(common.kept)}.")
    return lines


def _text(error: Exception) -> str:
    if isinstance(error, sqlite3.Error):
        return f"an SQLite file cannot be copied: {error}; check it with betrace doctor"
    return str(error)


def _report(verb: str) -> Callable[[int], None]:
    """A function that adds up bytes and prints the sum every few seconds."""
    total, reported = 0, time.monotonic()

    def add(size: int) -> None:
        nonlocal total, reported
        total += size
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            warn(f"{verb} {total / 1e6:,.0f} MB so far")

    return add
