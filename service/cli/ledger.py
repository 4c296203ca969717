"""``betrace ledger``: rebuilding a lost ledger."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from betrace.service.cli.common import (
    FOUND,
    HELP,
    Failure,
    json_option,
    print_json,
    print_lines,
    settings_options,
    warn,
)


@click.group("ledger", context_settings=HELP)
def ledger() -> None:
    """The record of signals.

    \b
    Example:
      betrace ledger rebuild --data ./data
    """


@ledger.command()
@click.option(
    "--exported",
    is_flag=True,
    help="Do not send the signals to the destinations of [export] again.",
)
@settings_options("data")
@json_option
def rebuild(exported: bool, config: Path | None, overrides: dict[str, Any], as_json: bool) -> None:
    """Rebuild a lost ledger from DuckDB.

    The service must be stopped. Signals that the ledger has stay as they are; those that only
    DuckDB has are recorded. After ledger.sqlite was lost, each destination of [export] gets
    all signals again, with the same ids, because nobody knows what it already has; --exported
    prevents that.

    Exit code 1 if some signals could not be restored exactly.

    \b
    Example:
      betrace ledger rebuild --data ./data
    """
    from betrace.service.config.load import load
    from betrace.service.pipeline.recovery.lost_ledger import rebuild_ledger
    from betrace.service.storage.duck.store import DuckStore
    from betrace.service.storage.local_stores import open_local_stores
    from betrace.service.storage.lockfile import LockedError, LockFile
    from betrace.service.storage.spanlog.log import LOCK_FILE
    from betrace.service.tenancy.directory import TenantDirectory

    settings = load(config, overrides)
    data = settings.storage.path
    if not data.is_dir():
        raise Failure(f"there is no data in {data}; name the data directory with --data")
    with ExitStack() as stack:
        try:
            stack.callback(LockFile(data / LOCK_FILE).release)
        except LockedError as error:
            raise Failure(f"the service runs ({error}); stop it first") from None
        directory = TenantDirectory(data / "tenants.sqlite")
        stack.callback(directory.close)
        store = stack.enter_context(DuckStore(data, settings.duckdb))
        local = open_local_stores(data, settings, stack)
        done = rebuild_ledger(settings, store, local, directory, exported)
    if as_json:
        print_json(asdict(done))
    else:
        print_lines([f"recorded {done.signals} signals of {done.tenants} tenants"])
    if done.uncertain:
        some = ", ".join(done.uncertain[:5])
        warn(
            f"{len(done.uncertain)} signals were recorded without knowing how often their breach "
            f"had been retracted before; the first: {some}"
        )
    sys.exit(FOUND if done.uncertain else 0)
