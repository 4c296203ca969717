"""``betrace traces`` and ``betrace trace``: a tenant's traces, over the service's API."""

from __future__ import annotations

import shutil
import time
from typing import Any

import click

from betrace.service.cli.api_client import PAGE, ServiceApi
from betrace.service.cli.common import (
    HELP,
    Failure,
    Moment,
    Server,
    print_json,
    print_lines,
    print_table,
    printable,
    server_options,
    tenant_option,
)
from betrace.service.cli.waterfall import waterfall
from betrace.service.signals import incomplete_text
from betrace.service.times import short_duration

_SEARCH_SECONDS = 10.0
_WIDEST = 200

Json = dict[str, Any]


@click.command(context_settings=HELP)
@click.option("--service", metavar="NAME", help="Only traces with a span of this service.")
@click.option("--name", metavar="NAME", help="Only traces whose root span has this name.")
@click.option("--min-duration", metavar="TIME", help="Only traces this long, such as 250ms.")
@click.option("--since", type=Moment(), help="Only traces since a time, such as 1h.")
@click.option(
    "--broken/--kept",
    "has_signal",
    default=None,
    help="Only traces with an active signal, or only traces without.",
)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@tenant_option
@server_options
def traces(
    server: Server, tenant: str | None, limit: int, as_json: bool, **filters: str | int | None
) -> None:
    """List closed traces, newest first.

    \b
    Example:
      betrace traces --service checkout --min-duration 1s
      betrace traces --broken --since 1h
    """
    api = ServiceApi(server, "/api/v1/traces", tenant=tenant)
    given = {name: value for name, value in filters.items() if value is not None}
    if "has_signal" in given:
        given["has_signal"] = str(given["has_signal"]).lower()
    found, more = _list(api, given, limit)
    if as_json:
        print_json(found, indent=2)
        return
    if found:
        print_table(("START", "DURATION", "SPANS", "ERRORS", "TRACE", "ROOT"), map(_row, found))
    if more or not found:
        click.echo(more or "no traces", err=bool(found))


def _list(api: ServiceApi, filters: Json, limit: int) -> tuple[list[Json], str]:
    """The newest traces, and how to see more if there may be more. The service searches for a short
    time in each request, so a search may need several."""
    found: list[Json] = []
    cursor: str | None = None
    give_up = time.monotonic() + _SEARCH_SECONDS
    while True:
        size: Json = {"limit": min(PAGE, limit - len(found))}
        page = api.ask("GET", params=filters | size | ({"cursor": cursor} if cursor else {}))
        found += page["traces"]
        cursor = page["next"]
        if cursor is None:
            return found, ""
        if len(found) >= limit:
            return found, "there are more; list them with --limit"
        if time.monotonic() > give_up:
            return found, f"searched back to {page['searched_to']}; use other filters"


def _row(trace: Json) -> tuple[object, ...]:
    root = f"{trace['root_service'] or ''} {trace['root_name'] or ''}".strip()
    return (
        trace["start"][:19] + "Z",
        short_duration(trace["duration_ns"]),
        trace["spans"],
        trace["errors"],
        trace["trace_id"],
        root or "-",
    )


@click.command(context_settings=HELP)
@click.argument("trace_id", metavar="ID")
@tenant_option
@server_options
def trace(trace_id: str, server: Server, tenant: str | None, as_json: bool) -> None:
    """Show a trace with its signals, as a waterfall.

    Spans marked with ◆ are evidence of an active signal, ✖ stands for an error.

    \b
    Example:
      betrace trace 4854dd68e4702d4803da540b9229b497
    """
    if len(trace_id) != 32 or not all(each in "0123456789abcdefABCDEF" for each in trace_id):
        raise click.UsageError(f"{trace_id!r} is not a trace id: write 32 hex digits")
    found = ServiceApi(server, "/api/v1/traces", tenant=tenant).find("GET", f"/{trace_id}")
    if found is None:
        raise Failure(
            f"there is no trace {trace_id}; list the traces with `betrace traces`, and name "
            "another tenant with --tenant"
        )
    if as_json:
        print_json(found, indent=2)
        return
    print_lines(_summary(found))
    active = [signal for signal in found["signals"] if signal["status"] == "active"]
    for signal in active:
        click.secho(
            printable(f"● {signal['severity']}  {signal['rule_id']}  {signal['message']}"), fg="red"
        )
        print_lines([f"  signal {signal['id']}"])
    click.echo()
    evidence = {
        span for signal in active for spans in signal["evidence"].values() for span in spans
    }
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    for line in waterfall(found, evidence, width):
        colour = "yellow" if line.marked else "red" if line.failed else None
        click.secho(line.text, fg=colour)


def _summary(found: Json) -> list[str]:
    spans, errors = found["spans"], found["errors"]
    facts = [
        found["state"],
        f"{spans} span{'s' * (spans != 1)}",
        f"{errors} error{'s' * (errors != 1)}",
        short_duration(found["duration_ns"]),
        f"from {found['start'][:23]}Z",
    ]
    lines = [f"trace {found['trace_id']}  {', '.join(facts)}"]
    if found["missing"]:
        lines.append(f"✖ {found['missing']} requests are damaged or past retention")
    if found.get("missing_parents"):
        lines.append(f"✖ {incomplete_text(found['missing_parents'])}")
    if found["omitted"]:
        lines.append(f"✖ {found['omitted']} requests or spans were left out: the trace is too long")
    return lines
