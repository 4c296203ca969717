"""``betrace doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from betrace.service.cli.common import (
    FOUND,
    json_option,
    print_json,
    print_lines,
    settings_options,
)


@click.command()
@settings_options("data", "rules", "ingest", "grpc", "api", "metrics", "insecure")
@click.option(
    "--scrub",
    is_flag=True,
    help="Read all of the span log and of DuckDB's files, however long it takes.",
)
@json_option
def doctor(config: Path | None, overrides: dict[str, Any], scrub: bool, as_json: bool) -> None:
    """Check configuration, disk, ports, stores, ledger and clock, and say what to do.

    Use the same options and environment variables as for `serve`. It changes nothing, and may be
    used while the service runs. Exit code 1 if something needs attention.

    \b
    Examples:
      betrace doctor --config config.toml
      betrace doctor --data ./data --json
      betrace doctor --data ./data --scrub
    """
    from betrace.service.cli.doctor.checks import diagnose

    diagnosis = diagnose(config, overrides, scrub)
    if as_json:
        print_json(diagnosis.to_json(), indent=2)
    else:
        print_lines(diagnosis.lines())
    sys.exit(0 if diagnosis.good else FOUND)
