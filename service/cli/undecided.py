"""``betrace undecided``: traces that a rule could not judge, over the service's API."""

from __future__ import annotations

from typing import Any

import click

from betrace.service.cli.api_client import PAGE, ServiceApi
from betrace.service.cli.common import (
    HELP,
    Server,
    print_json,
    print_table,
    server_options,
    tenant_option,
)

Json = dict[str, Any]


@click.command(context_settings=HELP)
@click.option("--rule", metavar="ID", help="Only of this rule.")
@click.option("--trace", "trace_id", metavar="ID", help="Only of this trace.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True)
@tenant_option
@server_options
def undecided(
    server: Server,
    tenant: str | None,
    limit: int,
    as_json: bool,
    **filters: str | None,
) -> None:
    """List the traces that a rule could not judge, newest first, and why.

    Nothing was raised or retracted for them. A trace is undecided, for example, if it has too many
    spans to be read back from the log (traces.relational_spans_max).

    \b
    Examples:
      betrace undecided
      betrace undecided --rule n-plus-one --json
    """
    api = ServiceApi(server, "/api/v1/undecided", tenant=tenant)
    given: Json = {name: value for name, value in filters.items() if value is not None}
    found: list[Json] = []
    while len(found) < limit:
        page = api.ask("GET", params={**given, "limit": min(PAGE, limit - len(found))})
        found += page["undecided"]
        if page["next"] is None:
            break
        given["cursor"] = page["next"]
    if as_json:
        print_json(found, indent=2)
    elif not found:
        click.echo("no undecided traces")
    else:
        print_table(
            ("AT", "RULE", "TRACE", "REASON"),
            ([each["at"], each["rule_id"], each["trace_id"], each["reason"]] for each in found),
        )
