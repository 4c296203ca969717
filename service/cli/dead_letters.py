"""``betrace dead-letters``: what the running service could not process, over its API."""

from __future__ import annotations

import json
from typing import Any

import click

from betrace.service.cli.api_client import PAGE, ServiceApi
from betrace.service.cli.common import (
    FOUND,
    HELP,
    Failure,
    Server,
    print_json,
    print_lines,
    print_table,
    server_options,
    warn,
)


def _filters(command: Any) -> Any:
    stage = click.option("--stage", help="Only letters of this stage, such as rule-evaluation.")
    tenant = click.option("--tenant", help="Only letters of this tenant.")
    return stage(tenant(command))


@click.group("dead-letters", context_settings=HELP)
def dead_letters() -> None:
    """List, retry and discard what the service could not process.

    \b
    Example:
      betrace dead-letters list
      betrace dead-letters retry --all
    """


@dead_letters.command("list")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="How many to list.",
)
@_filters
@server_options
def list_letters(
    limit: int, stage: str | None, tenant: str | None, server: Server, as_json: bool
) -> None:
    """List dead letters, oldest first.

    \b
    Example:
      betrace dead-letters list --stage rule-evaluation
    """
    api = _letters(server)
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(found) < limit:
        size = min(PAGE, limit - len(found))
        params = _given(stage=stage, tenant=tenant, limit=size, cursor=cursor)
        page = api.ask("GET", params=params)
        found += page["deadLetters"]
        cursor = page["next"]
        if cursor is None:
            break
    if as_json:
        print_json(found, indent=2)
        return
    if not found:
        click.echo("no dead letters")
        return
    print_table(
        ("ID", "STAGE", "TENANT", "ATTEMPTS", "LAST FAILED", "NEXT RETRY", "ERROR"),
        [
            (
                letter["id"],
                letter["stage"],
                letter["tenant"],
                letter["attempts"],
                letter["last_failed"][:19] + "Z",
                (letter["next_retry"] or "on request")[:19],
                letter["error"].partition("\n")[0][:80],
            )
            for letter in found
        ],
    )
    if cursor is not None:
        click.echo(f"there are more than {limit}; list more with --limit")


@dead_letters.command("show")
@click.argument("letter_id", metavar="ID", type=click.IntRange(1))
@server_options
def show_letter(letter_id: int, server: Server, as_json: bool) -> None:
    """Show one dead letter: its error, its attempts and its content.

    \b
    Example:
      betrace dead-letters show 17
    """
    letter = _letters(server).find("GET", f"/{letter_id}")
    if letter is None:
        raise Failure(_missing(letter_id))
    if as_json:
        print_json(letter, indent=2)
        return
    payload = letter.pop("payload")
    width = max(map(len, letter))
    for name, value in letter.items():
        first, *more = str("-" if value is None else value).split("\n")
        print_lines([f"{name.replace('_', ' ').ljust(width)}  {first}"])
        print_lines(f"{'':{width}}  {line}" for line in more)
    print_lines(json.dumps(payload, indent=2).split("\n"))


@dead_letters.command("retry")
@click.argument("letter_ids", metavar="[ID]...", type=click.IntRange(1), nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Retry every letter the filters select.")
@_filters
@server_options
def retry_letters(
    letter_ids: tuple[int, ...],
    everything: bool,
    stage: str | None,
    tenant: str | None,
    server: Server,
    as_json: bool,
) -> None:
    """Process dead letters again, now.

    \b
    Example:
      betrace dead-letters retry 17 18
      betrace dead-letters retry --all --tenant acme
    """
    if bool(letter_ids) == everything:
        raise click.UsageError("name the letters by their ids, or use --all")
    if letter_ids and (stage or tenant):
        raise click.UsageError("--stage and --tenant work only with --all")
    api = _letters(server)
    if everything:
        answer = api.ask("POST", "/retry", params=_given(stage=stage, tenant=tenant))
        _report(answer.get("retried", 0), [], "will be retried", as_json)
    else:
        _each(api, letter_ids, "retry", "will be retried", as_json)


@dead_letters.command("discard")
@click.argument("letter_ids", metavar="ID...", type=click.IntRange(1), nargs=-1, required=True)
@server_options
def discard_letters(letter_ids: tuple[int, ...], server: Server, as_json: bool) -> None:
    """Delete dead letters permanently. The rules never see their spans or signals.

    \b
    Example:
      betrace dead-letters discard 17
    """
    _each(_letters(server), letter_ids, "discard", "discarded", as_json)


def _letters(server: Server) -> ServiceApi:
    return ServiceApi(server, "/api/admin/dead-letters")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _each(
    api: ServiceApi, letter_ids: tuple[int, ...], action: str, done: str, as_json: bool
) -> None:
    missing = [each for each in letter_ids if api.find("POST", f"/{each}/{action}") is None]
    _report(len(letter_ids) - len(missing), missing, done, as_json)
    if missing:
        raise click.exceptions.Exit(FOUND)


def _report(number: int, missing: list[int], done: str, as_json: bool) -> None:
    if as_json:
        print_json({"done": number, "missing": missing})
        return
    click.echo(f"{number} {'letter' if number == 1 else 'letters'} {done}")
    for each in missing:
        warn(_missing(each))


def _missing(letter_id: int) -> str:
    return (
        f"there is no dead letter {letter_id}; it may have been retried in the meantime: see "
        "`betrace dead-letters list`"
    )
