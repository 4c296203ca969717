"""``betrace backup`` and ``betrace restore``: copies of the data directory."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from betrace.service.cli.common import (
    Failure,
    json_option,
    print_json,
    refuse_on_cluster,
    settings_options,
    warn,
)

_REPORT_SECONDS = 5.0
_BACKUP = (
    "back the streams up with `nats stream backup`, and copy the ledger of a stopped query node"
)


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

    \b
    Example:
      betrace backup /mnt/backup/betrace-$(date +%F) --data ./data
    """
    from betrace.service.config.load import load
    from betrace.service.pipeline.recovery.backup import BackupError, back_up

    settings = load(config, overrides)
    refuse_on_cluster(settings, "backup", _BACKUP)
    data = settings.storage.path
    try:
        made = back_up(
            data, directory, version("betrace"), _report("copied"), archive=not without_archive
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

    \b
    Example:
      betrace restore /mnt/backup/betrace-2026-11-29 --data ./data
    """
    from betrace.service.config.load import load
    from betrace.service.pipeline.recovery.backup import BackupError
    from betrace.service.pipeline.recovery.backup import restore as copy_back

    settings = load(config, overrides)
    refuse_on_cluster(settings, "restore", _BACKUP)
    data = settings.storage.path
    try:
        found = copy_back(directory, data, _report("restored"))
    except BackupError as error:
        raise Failure(_text(error)) from error
    if as_json:
        print_json({"path": str(data), "files": len(found.files), "bytes": found.bytes})
        return
    click.echo(f"{data}: {len(found.files)} files, {found.bytes:,} bytes")
    click.echo(f"Start the service with: betrace serve --data {data}")


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
