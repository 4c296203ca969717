"""``betrace doctor``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="A config.toml.")
@click.option("--data", metavar="DIR", help="Where data is kept (storage.path).")
@click.option("--rules", metavar="DIR", help="Rule files (rules.directory).")
@click.option("--ingest", metavar="HOST:PORT", help="Where spans come in (ingest.address).")
@click.option("--grpc", metavar="HOST:PORT", help="OTLP over gRPC (ingest.grpc_address).")
@click.option("--api", metavar="HOST:PORT", help="Where the API listens (api.address).")
@click.option("--metrics", metavar="HOST:PORT", help="A listener for metrics (metrics.address).")
@click.option("--insecure", is_flag=True, help="As for serve.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(
    config: Path | None,
    data: str | None,
    rules: str | None,
    ingest: str | None,
    grpc: str | None,
    api: str | None,
    metrics: str | None,
    insecure: bool,
    as_json: bool,
) -> None:
    """Check configuration, disk, ports, stores, ledger and clock, and say what to do.

    Give it the options and variables that serve gets. It changes nothing, and may be used while the
    service runs. Exit code 1 if there is something to look at.

    \b
    Examples:
      betrace doctor --config config.toml
      betrace doctor --data ./data --json
    """
    from betrace.service.cli.doctor.checks import diagnose

    given = {
        "storage.path": data,
        "rules.directory": rules,
        "ingest.address": ingest,
        "ingest.grpc_address": grpc,
        "api.address": api,
        "metrics.address": metrics,
        "auth.insecure": insecure or None,
    }
    diagnosis = diagnose(config, {name: value for name, value in given.items() if value})
    if as_json:
        click.echo(json.dumps(diagnosis.to_json(), indent=2, ensure_ascii=False))
    else:
        for line in diagnosis.lines():
            click.echo(line)
    sys.exit(0 if diagnosis.good else 1)
