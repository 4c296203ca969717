"""``betrace tui``: the terminal interface of a running service."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from betrace.service.cli.common import ca_option, token_option, url_option


@click.command()
@url_option
@token_option
@ca_option
@click.option("--tenant", help="Show this tenant's signals and rules, if authentication is off.")
@click.option("--read-only", is_flag=True, help="Only look: all actions are disabled.")
def tui(url: str, token: str | None, ca: Path | None, tenant: str | None, read_only: bool) -> None:
    """Watch and operate a running service in the terminal.

    Press ? for the keys. Exit code 3 if the service cannot be reached.

    \b
    Example:
      betrace tui --url http://127.0.0.1:8090 --read-only
    """
    from betrace.tui.app import run  # needs the extra `tui`

    sys.exit(run(url, token, tenant, read_only, ca))
