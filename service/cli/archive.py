"""``betrace archive``: days that are over, as Parquet."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import click

from betrace.service.cli.api_client import Failure

FOUND = 1
COULD_NOT = 3


@click.command()
@click.option(
    "--before",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="DATE",
    help="Days before this one, in UTC; else all days before today.",
)
@click.option("--tenant", metavar="NAME", help="Only this tenant.")
@click.option("--directory", metavar="DIR", help="Where the archive is (archive.directory).")
@click.option("--data", metavar="DIR", help="Where data is kept (storage.path).")
@click.option("--config", type=click.Path(path_type=Path), help="A config.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object for each file.")
def archive(
    before: datetime | None,
    tenant: str | None,
    directory: str | None,
    data: str | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Write days that are over as Parquet files, one for each segment of the span log.

    Every file's rows are counted against the spans that were accepted before it takes its place.
    What is in the archive already is left alone. Then the log of days past retention.log_days is
    deleted; while the service runs, it does that itself, once a day.

    Exit code 1 if parts of the log are damaged; those stay in the log as well.

    \b
    Examples:
      betrace archive
      betrace archive --before 2025-02-01 --directory /mnt/archive
    """
    from betrace.service.config.load import load
    from betrace.service.export.archiver import Archiver, archive_directory, log_until, today
    from betrace.service.storage.lockfile import LockedError
    from betrace.service.storage.spanlog.log import SpanLog

    given = {"storage.path": data, "archive.directory": directory}
    settings = load(config, {name: value for name, value in given.items() if value is not None})
    path = settings.storage.path
    if not path.is_dir():
        raise Failure(f"there is no data in {path}; name its directory with --data")
    until = before.date() if before else today()
    if until > today():
        raise click.UsageError("--before must not be after today: the day is not over")
    try:
        log, owned = SpanLog(path), True
    except LockedError:
        log, owned = SpanLog(path, read_only=True), False
    with log:
        if tenant is not None and tenant not in log.tenants():
            known = ", ".join(log.tenants()) or "none"
            raise Failure(f"the tenant {tenant} has no spans; there are: {known}")
        tenants = None if tenant is None else [tenant]
        keeper = Archiver(
            log,
            archive_directory(settings),
            path / "checkpoints",
            settings.ingest.max_body_bytes,
        )
        for file in keeper.archive(until, tenants):
            shown = {"path": str(file.path), "spans": file.spans, "bytes": file.path.stat().st_size}
            click.echo(json.dumps(shown) if as_json else f"{file.path}  {file.spans} spans")
        past = log_until(settings, today())
        if past is not None and owned:
            keeper.release(min(past, until), archived=True, tenants=tenants)
    done = keeper.done
    told = f"{done.spans} spans in {done.files} new files"
    if done.released_segments:
        told += f"; {done.released_bytes} bytes of the log were past retention and are deleted"
    if past is not None and not owned:
        told += "; the running service deletes from the log what is past retention"
    click.echo(told, err=True)
    for segment in done.damaged:
        click.echo(
            f"betrace: {segment} is damaged; what can be read is archived, and it stays in the log",
            err=True,
        )
    for failure in done.failures:
        click.echo(f"betrace: {failure}", err=True)
    sys.exit(COULD_NOT if done.failures else FOUND if done.damaged else 0)
