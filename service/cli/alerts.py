"""``betrace alerts``: what people are paged for now, over the service's API."""

from __future__ import annotations

import click

from betrace.service.cli.api_client import ServiceApi
from betrace.service.cli.common import (
    HELP,
    Server,
    print_json,
    print_table,
    server_options,
    tenant_option,
)


@click.command(context_settings=HELP)
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@tenant_option
@server_options
def alerts(server: Server, tenant: str | None, limit: int, as_json: bool) -> None:
    """List the alerts that fire now: one for each rule while it breaks.

    \b
    Examples:
      betrace alerts
      betrace alerts --tenant acme --json
    """
    answer = ServiceApi(server, "/api/v1/alerts", tenant=tenant).ask("GET", params={"limit": limit})
    found = answer["alerts"]
    if as_json:
        print_json(found, indent=2)
    elif not answer["destinations"]:
        click.echo("nobody is alerted: [alerts] in the configuration names no destination")
    elif not found:
        click.echo("no alert fires")
    else:
        rows = (
            (
                each["started"][:19] + "Z",
                each["last"][:19] + "Z",
                each["severity"],
                each["rule_id"],
                each["count"],
                ", ".join(each["delivered"]) or "-",
                each["examples"][0]["message"] if each["examples"] else "",
            )
            for each in found
        )
        print_table(("STARTED", "LAST", "SEVERITY", "RULE", "COUNT", "DELIVERED", "LATEST"), rows)
        if answer["total"] > len(found):
            click.echo(f"{answer['total']} fire; list more with --limit", err=True)
