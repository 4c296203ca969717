"""``betrace dead-letters``: what the running service could not process, over its API."""

from __future__ import annotations

import json
from typing import Any

import click

from betrace.service.cli.api_client import PAGE, AdminApi, Failure, remote_options


def _filters(command: Any) -> Any:
    stage = click.option("--stage", help="Only of this stage, such as rule-evaluation.")
    tenant = click.option("--tenant", help="Only of this tenant.")
    return stage(tenant(command))


@click.group("dead-letters", context_settings={"help_option_names": ["-h", "--help"]})
def dead_letters() -> None:
    """What the service could not process: look at it, try it again, discard it.

    \b
    Example:
      betrace dead-letters list
      betrace dead-letters retry --all
    """


@dead_letters.command("list")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True)
@_filters
@remote_options
def list_letters(
    limit: int, stage: str | None, tenant: str | None, url: str, token: str | None, as_json: bool
) -> None:
    """List dead letters, oldest first.

    \b
    Example:
      betrace dead-letters list --stage rule-evaluation
    """
    api = _letters(url, token)
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(found) < limit:
        size = min(PAGE, limit - len(found))
        asked = _given(stage=stage, tenant=tenant, limit=size, cursor=cursor)
        page = api.ask("GET", params=asked)
        found += page["deadLetters"]
        cursor = page["next"]
        if cursor is None:
            break
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo("no dead letters")
        return
    rows = [("ID", "STAGE", "TENANT", "ATTEMPTS", "LAST FAILED", "NEXT RETRY", "ERROR")]
    rows += [
        (
            letter["id"],
            letter["stage"],
            letter["tenant"],
            str(letter["attempts"]),
            letter["last_failed"][:19] + "Z",
            (letter["next_retry"] or "when told to")[:19],
            letter["error"].partition("\n")[0][:80],
        )
        for letter in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())
    if cursor is not None:
        click.echo(f"there are more than {limit}: ask with a larger --limit")


@dead_letters.command("show")
@click.argument("letter_id", metavar="ID", type=click.IntRange(1))
@remote_options
def show_letter(letter_id: int, url: str, token: str | None, as_json: bool) -> None:
    """Show one dead letter: its error, its attempts and what is in it.

    \b
    Example:
      betrace dead-letters show 17
    """
    letter = _letters(url, token).find("GET", f"/{letter_id}")
    if letter is None:
        raise Failure(_missing(letter_id))
    if as_json:
        click.echo(json.dumps(letter, indent=2))
        return
    payload = letter.pop("payload")
    width = max(map(len, letter))
    for name, value in letter.items():
        click.echo(f"{name.replace('_', ' ').ljust(width)}  {'-' if value is None else value}")
    click.echo(json.dumps(payload, indent=2))


@dead_letters.command("retry")
@click.argument("letter_ids", metavar="[ID]...", type=click.IntRange(1), nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that the filters let through.")
@_filters
@remote_options
def retry_letters(
    letter_ids: tuple[int, ...],
    everything: bool,
    stage: str | None,
    tenant: str | None,
    url: str,
    token: str | None,
    as_json: bool,
) -> None:
    """Have dead letters tried again now.

    \b
    Example:
      betrace dead-letters retry 17 18
      betrace dead-letters retry --all --tenant acme
    """
    if bool(letter_ids) == everything:
        raise click.UsageError("name the letters by their ids, or use --all")
    if letter_ids and (stage or tenant):
        raise click.UsageError("--stage and --tenant are for --all")
    api = _letters(url, token)
    if everything:
        answer = api.ask("POST", "/retry", params=_given(stage=stage, tenant=tenant))
        _report(answer.get("retried", 0), [], "will be tried again", as_json)
    else:
        _each(api, letter_ids, "retry", "will be tried again", as_json)


@dead_letters.command("discard")
@click.argument("letter_ids", metavar="ID...", type=click.IntRange(1), nargs=-1, required=True)
@remote_options
def discard_letters(
    letter_ids: tuple[int, ...], url: str, token: str | None, as_json: bool
) -> None:
    """Delete dead letters for good: their spans or signals are lost to the rules.

    \b
    Example:
      betrace dead-letters discard 17
    """
    _each(_letters(url, token), letter_ids, "discard", "discarded", as_json)


def _letters(url: str, token: str | None) -> AdminApi:
    return AdminApi(url, token, "/dead-letters")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _each(
    api: AdminApi, letter_ids: tuple[int, ...], action: str, done: str, as_json: bool
) -> None:
    missing = [each for each in letter_ids if api.find("POST", f"/{each}/{action}") is None]
    _report(len(letter_ids) - len(missing), missing, done, as_json)
    if missing:
        raise click.exceptions.Exit(1)


def _report(number: int, missing: list[int], done: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"done": number, "missing": missing}))
        return
    click.echo(f"{number} {'letter' if number == 1 else 'letters'} {done}")
    for each in missing:
        click.echo(f"betrace: {_missing(each)}", err=True)


def _missing(letter_id: int) -> str:
    return (
        f"there is no dead letter {letter_id} to act on; it may have been retried meanwhile, see "
        "`betrace dead-letters list`"
    )
