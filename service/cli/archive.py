"""``betrace archive``: finished days as Parquet files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from betrace.service.cli.archive_cluster import archive_cluster
from betrace.service.cli.common import (
    COULD_NOT_RUN,
    FOUND,
    Failure,
    json_option,
    print_json,
    print_lines,
    printable,
    settings_options,
    warn,
)

if TYPE_CHECKING:
    from betrace.service.config.settings import Settings
    from betrace.service.export.archiver import ArchiveResult
    from betrace.service.export.parquet import Archived


@click.command()
@click.option(
    "--before",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="DATE",
    help="Archive days before this one, in UTC; by default, all days before today.",
)
@click.option("--tenant", metavar="NAME", help="Archive only this tenant.")
@settings_options("directory", "data")
@json_option
def archive(
    before: datetime | None,
    tenant: str | None,
    config: Path | None,
    overrides: dict[str, Any],
    as_json: bool,
) -> None:
    """Write finished days as Parquet files, one for each segment of the span log.

    A file takes its place only after its rows are counted against the spans that were accepted.
    Files already in the archive stay as they are. Then the log of days past retention.log_days is
    deleted; while the service runs, it deletes them itself, once a day.

    Exit code 1 if parts of the log are damaged; those stay in the log.

    On a cluster, it archives all days that no node has archived yet. Evaluators delete what is past
    retention.

    \b
    Examples:
      betrace archive
      betrace archive --before 2025-02-01 --directory /mnt/archive
    """
    from betrace.service.config.load import load
    from betrace.service.export.archiver import today

    settings = load(config, overrides)
    until = before.date() if before else today()
    if until > today():
        raise click.UsageError("--before must not be after today, because today is not over")
    if settings.cluster is not None:
        if tenant is not None:
            raise click.UsageError("--tenant is not for a cluster: days are archived as a whole")
        done, note = archive_cluster(settings, settings.cluster, until, _printer(as_json)), ""
    else:
        done, note = _archive_log(settings, until, tenant, _printer(as_json))
    summary = f"{done.spans} spans in {done.files} new files"
    if done.released_segments:
        summary += f"; deleted {done.released_bytes} bytes of the log that were past retention"
    click.echo(printable(summary + note), err=True)
    for segment in done.damaged:
        warn(f"{segment} is damaged; its readable part is archived, and it stays in the log")
    for failure in done.failures:
        warn(failure)
    sys.exit(COULD_NOT_RUN if done.failures else FOUND if done.damaged else 0)


def _printer(as_json: bool) -> Callable[[Archived], None]:
    def show(file: Archived) -> None:
        if as_json:
            size = file.path.stat().st_size
            print_json({"path": str(file.path), "spans": file.spans, "bytes": size})
        else:
            print_lines([f"{file.path}  {file.spans} spans"])

    return show


def _archive_log(
    settings: Settings, until: date, tenant: str | None, show: Callable[[Archived], None]
) -> tuple[ArchiveResult, str]:
    """Archive the local log. The text continues the summary."""
    from betrace.service.export.archiver import Archiver, archive_directory, log_until, today
    from betrace.service.storage.lockfile import LockedError
    from betrace.service.storage.spanlog.log import SpanLog

    path = settings.storage.path
    if not path.is_dir():
        raise Failure(f"there is no data in {path}; name the data directory with --data")
    try:
        log, owned = SpanLog(path), True
    except LockedError:
        log, owned = SpanLog(path, read_only=True), False
    with log:
        if tenant is not None and tenant not in log.tenants():
            known = ", ".join(log.tenants()) or "none"
            raise Failure(f"the tenant {tenant} has no spans; tenants with spans: {known}")
        tenants = None if tenant is None else [tenant]
        keeper = Archiver(
            log,
            archive_directory(settings),
            path / "checkpoints",
            settings.ingest.max_body_bytes,
        )
        for file in keeper.archive(until, tenants):
            show(file)
        past = log_until(settings, today())
        if past is not None and owned:
            keeper.release(min(past, until), archived=True, tenants=tenants)
    if past is None or owned:
        return keeper.done, ""
    return keeper.done, "; the running service deletes what is past retention"
