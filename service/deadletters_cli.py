"""``betrace dead-letters``: what the running service could not process, over its API."""

from __future__ import annotations

import json
from typing import Any

import click
import httpx

URL = "http://127.0.0.1:8090"
TIMEOUT_SECONDS = 10.0
PAGE = 1000


class Unreachable(click.ClickException):
    """The service did not do it; the message says why and what to do."""

    exit_code = 3

    def show(self, file: Any = None) -> None:
        click.echo(f"betrace: {self.message}", err=True)


class _Api:
    """The administration of a running service."""

    def __init__(self, url: str, token: str | None) -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS)
        self._url = url

    def ask(
        self, method: str, path: str, params: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """The answer, None where there is no such letter. Raises :exc:`Unreachable`."""
        used = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            answer = self._client.request(method, f"/api/admin/dead-letters{path}", params=used)
            body = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Unreachable(
                f"there is no BeTrace service at {self._url} ({error}); start it with `betrace "
                "serve`, or name it with --url"
            ) from None
        if answer.status_code == 404 and path:
            return None
        if answer.is_error:
            told = body.get("error", {})
            raise Unreachable(f"{told.get('message', answer.status_code)}; {told.get('hint', '')}")
        found: dict[str, Any] = body
        return found


def _options(command: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option(
            "--token",
            envvar="BETRACE_AUTH__OPERATOR_TOKEN",
            help="The operator token, where authentication is on.",
        ),
        click.option(
            "--url", default=URL, envvar="BETRACE_URL", show_default=True, help="Of the API."
        ),
    ):
        command = option(command)
    return command


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
@_options
def list_letters(
    limit: int, stage: str | None, tenant: str | None, url: str, token: str | None, as_json: bool
) -> None:
    """List dead letters, oldest first.

    \b
    Example:
      betrace dead-letters list --stage rule-evaluation
    """
    api = _Api(url, token)
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(found) < limit:
        size = min(PAGE, limit - len(found))
        asked = {"stage": stage, "tenant": tenant, "limit": size, "cursor": cursor}
        page = api.ask("GET", "", asked) or {}
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
@_options
def show_letter(letter_id: int, url: str, token: str | None, as_json: bool) -> None:
    """Show one dead letter: its error, its attempts and what is in it.

    \b
    Example:
      betrace dead-letters show 17
    """
    letter = _Api(url, token).ask("GET", f"/{letter_id}")
    if letter is None:
        raise Unreachable(_missing(letter_id))
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
@_options
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
    api = _Api(url, token)
    if everything:
        answer = api.ask("POST", "/retry", {"stage": stage, "tenant": tenant}) or {}
        _report(answer.get("retried", 0), [], "will be tried again", as_json)
    else:
        _each(api, letter_ids, "retry", "will be tried again", as_json)


@dead_letters.command("discard")
@click.argument("letter_ids", metavar="ID...", type=click.IntRange(1), nargs=-1, required=True)
@_options
def discard_letters(
    letter_ids: tuple[int, ...], url: str, token: str | None, as_json: bool
) -> None:
    """Delete dead letters for good: their spans or signals are lost to the rules.

    \b
    Example:
      betrace dead-letters discard 17
    """
    _each(_Api(url, token), letter_ids, "discard", "discarded", as_json)


def _each(api: _Api, letter_ids: tuple[int, ...], action: str, done: str, as_json: bool) -> None:
    missing = [each for each in letter_ids if api.ask("POST", f"/{each}/{action}") is None]
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
