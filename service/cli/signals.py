"""``betrace signals``: a tenant's signals, also as they are raised, over the service's API."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import chain
from typing import Any
from urllib.parse import quote

import click

from betrace.service.cli.api_client import PAGE, ServiceApi, user_name
from betrace.service.cli.common import (
    HELP,
    Failure,
    Moment,
    Server,
    print_json,
    print_lines,
    print_table,
    server_options,
    tenant_option,
    warn,
)
from betrace.service.rules.definition import ALERT, SEVERITIES, SHADOW

LATEST = 10
"""How many earlier signals ``--follow`` begins with."""

_HEAD = ("DETECTED", "SEVERITY", "STATUS", "SERVICE", "RULE", "TRACE", "WHAT")
_WIDTHS = (20, 8, 9, 16, 28, 32, 0)  # while following, when the rows to come are unknown
_STREAMED = ("rule", "severity", "service")  # the filters of the stream
_REMEMBERED = 10_000
_LONGEST_PAUSE = 30.0

Json = dict[str, Any]


@click.command(context_settings=HELP)
@click.option("--rule", metavar="ID", help="Only signals of this rule.")
@click.option("--severity", type=click.Choice(SEVERITIES), help="Only signals of this severity.")
@click.option(
    "--status", type=click.Choice(("active", "retracted")), help="Only signals of this status."
)
@click.option(
    "--mode",
    type=click.Choice((ALERT, SHADOW)),
    help="Only signals of rules in this mode; nobody is alerted of those of shadow rules.",
)
@click.option("--service", metavar="NAME", help="Only signals of traces of this service.")
@click.option("--since", type=Moment(), help="Only signals since a time, such as 1h.")
@click.option("--follow", "-f", is_flag=True, help="Go on with new signals as they are raised.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    help=f"How many earlier signals to list.  [default: 100, or {LATEST} with --follow]",
)
@tenant_option
@server_options
def signals(
    server: Server,
    tenant: str | None,
    since: int | None,
    follow: bool,
    limit: int | None,
    as_json: bool,
    **filters: str | None,
) -> None:
    """List the signals that rules raised, newest first.

    (muted), (shadow) and ✓ mean that its rule was muted or in shadow mode, and that someone
    acknowledged it.
    With --follow the oldest comes first, and new ones follow until Ctrl-C; with --json, each is
    then one line.

    \b
    Example:
      betrace signals --severity critical --since 1h
      betrace signals --rule payment-fraud-check --follow
    """
    api = ServiceApi(server, "/api/v1/signals", tenant=tenant)
    given: Json = {name: value for name, value in filters.items() if value is not None}
    if since is not None:
        given["since"] = since
    if follow:
        try:
            _follow(api, given, limit or (LATEST if since is None else PAGE), as_json)
        except KeyboardInterrupt:
            return
    found, more = _list(api, given, limit or 100)
    if as_json:
        print_json(found, indent=2)
    elif not found:
        click.echo("no signals")
    else:
        print_table(_HEAD, map(_row, found))
        if more:
            click.echo("there are more; list them with --limit", err=True)


@click.command(context_settings=HELP)
@click.argument("signal_id", metavar="ID")
@click.option("--note", default="", help="What is known or being done.")
@tenant_option
@server_options
def acknowledge(
    signal_id: str, note: str, tenant: str | None, server: Server, as_json: bool
) -> None:
    """Acknowledge a signal: say that you take care of it. `betrace trace`
    and `betrace signals --json` show the ID.

    \b
    Example:
      betrace acknowledge b24c2b0149daeeefac12ed570f58ae9a --note "rolling back"
    """
    api = ServiceApi(server, "/api/v1/signals", tenant=tenant, who=user_name())
    done = api.ask("POST", f"/{quote(signal_id, safe='')}/acknowledge", json={"note": note})
    if as_json:
        print_json(done)
    else:
        print_lines([f"acknowledged by {done['by']}"])


def _list(api: ServiceApi, filters: Json, limit: int) -> tuple[list[Json], bool]:
    """The newest signals, and whether there are more than ``limit``."""
    found: list[Json] = []
    cursor: str | None = None
    while len(found) < limit:
        size: Json = {"limit": min(PAGE, limit - len(found))}
        page = api.ask("GET", params=filters | size | ({"cursor": cursor} if cursor else {}))
        found += page["signals"]
        cursor = page["next"]
        if cursor is None:
            break
    return found, cursor is not None


def _follow(api: ServiceApi, filters: Json, limit: int, as_json: bool) -> None:
    """Print signals until the process is interrupted. After a lost connection, continue with those
    detected since the last one."""
    show: Callable[[Json], None] = print_json if as_json else _print_row
    if not as_json:
        _print_cells(_HEAD)
    streamed: Json = {name: filters[name] for name in _STREAMED if name in filters}
    seen: dict[str, None] = {}
    connected, pause = False, 0.0
    while True:
        try:
            # Open the stream before listing, so that no signal is missed between the two.
            with api.stream("/stream", streamed) as events:
                earlier, _ = _list(api, filters, limit)
                connected, pause, limit = True, 0.0, PAGE
                for signal in chain(reversed(earlier), events):
                    if signal["id"] in seen or not _wanted(signal, filters):
                        continue
                    show(signal)
                    seen[signal["id"]] = None
                    if len(seen) > _REMEMBERED:
                        del seen[next(iter(seen))]
                    filters["since"] = signal["detected_at"]
            warn("the service closed the stream; connecting again")
        except Failure as failure:
            if not connected:
                raise
            failure.show()
        pause = min(_LONGEST_PAUSE, 2 * pause or 1.0)
        time.sleep(pause)


def _wanted(signal: Json, filters: Json) -> bool:
    """Whether a streamed signal satisfies the filters that streams do not have."""
    found = {"status": _status(signal), "mode": signal.get("mode", ALERT)}
    return all(filters.get(name, value) == value for name, value in found.items())


def _status(signal: Json) -> str:
    """The status; streamed signals have none because they are new."""
    return str(signal.get("status") or {"raised": "active"}.get(signal["kind"], "retracted"))


def _marked_status(signal: Json) -> str:
    marks = {
        " (muted)": signal.get("muted"),
        " (shadow)": signal.get("mode") == SHADOW,
        " ✓": _acknowledged(signal),
    }
    return _status(signal) + "".join(mark for mark, shown in marks.items() if shown)


def _acknowledged(signal: Json) -> bool:
    return signal.get("acknowledged") is not None


def _row(signal: Json) -> tuple[str, ...]:
    return (
        signal["detected_at"][:19] + "Z",
        signal["severity"],
        _marked_status(signal),
        signal.get("service") or "-",
        signal["rule_id"],
        signal["trace_id"],
        signal["message"],
    )


def _print_row(signal: Json) -> None:
    _print_cells(_row(signal))


def _print_cells(cells: tuple[str, ...]) -> None:
    print_lines(["  ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True))])
    sys.stdout.flush()
