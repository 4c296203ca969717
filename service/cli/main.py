"""The command line: ``betrace``, also ``python -m betrace.service``.

This module assembles the commands and explains errors. A command's module is imported when the
command is used, so that a command is as fast as its own imports.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import version as installed_version
from typing import Any

import click

from betrace.service.cli.common import COULD_NOT_RUN, HELP, Failure, json_option

# By command: the module below betrace.service.cli, and the name of the command in it.
_COMMANDS = {
    "acknowledge": ("signals", "acknowledge"),
    "alerts": ("alerts", "alerts"),
    "archive": ("archive", "archive"),
    "backup": ("backup", "backup"),
    "cluster": ("cluster", "cluster"),
    "dead-letters": ("dead_letters", "dead_letters"),
    "demo": ("demo.run", "demo"),
    "doctor": ("doctor.command", "doctor"),
    "ledger": ("ledger", "ledger"),
    "replay": ("replay", "replay"),
    "restore": ("backup", "restore"),
    "rules": ("rules", "rules"),
    "serve": ("serve", "serve"),
    "signals": ("signals", "signals"),
    "tenants": ("tenants", "tenants"),
    "trace": ("traces", "trace"),
    "traces": ("traces", "traces"),
    "tui": ("tui", "tui"),
    "undecided": ("undecided", "undecided"),
}

# By top-level package: what it is called, and the extra that installs it.
_EXTRAS = {
    "nats": ("the NATS client", "cluster"),
    "opentelemetry": ("the OpenTelemetry SDK", "tracing"),
    "plotext": ("Textual", "tui"),
    "textual": ("Textual", "tui"),
    "textual_plotext": ("Textual", "tui"),
    "tigerbeetle": ("the TigerBeetle client", "tigerbeetle"),
}


class Commands(click.Group):
    """Loads its commands when they are used, and turns their errors into sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_COMMANDS])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return super().get_command(ctx, name)
        module, attribute = _COMMANDS[name]
        command: click.Command = getattr(import_module(f"betrace.service.cli.{module}"), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # the reader has gone, as in betrace … | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(COULD_NOT_RUN)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            command = ctx.invoked_subcommand or ""
            lines = [_explain(leaf, command) for leaf in _leaves(error)]
            raise Failure("\n".join(dict.fromkeys(lines))) from error


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _explain(error: BaseException, command: str) -> str:
    """What went wrong and what to do, in one sentence."""
    from httpx import HTTPError, InvalidURL

    from betrace.service.config.load import ConfigError
    from betrace.service.receiver.sockets import ListenError
    from betrace.service.rules.store import RuleStoreError
    from betrace.service.storage.dead_letters import DeadLetterError
    from betrace.service.storage.duck.schema import StoreError
    from betrace.service.storage.jetstream.errors import (
        JetStreamError,
        NatsUnavailable,
        StreamFull,
    )
    from betrace.service.storage.jetstream.setup import SetupError
    from betrace.service.storage.ledger.base import LedgerError
    from betrace.service.storage.lockfile import LockedError
    from betrace.service.storage.triage import TriageError
    from betrace.service.tenancy.authentication import SecretError
    from betrace.service.tenancy.directory import DirectoryError
    from betrace.service.tenancy.tokens import BadKeyError

    if isinstance(error, ModuleNotFoundError) and (missing := _missing_extra(error, command)):
        return missing
    start = (ConfigError, DeadLetterError, ListenError, LedgerError, LockedError, StoreError)
    if isinstance(
        error, (*start, BadKeyError, DirectoryError, RuleStoreError, SecretError, TriageError)
    ):
        return str(error)
    if isinstance(error, SetupError):
        return str(error)
    if isinstance(error, NatsUnavailable):
        return f"{error}; check that the NATS servers run and that cluster.servers is right"
    if isinstance(error, StreamFull):
        return f"JetStream has no space left ({error}); give the servers more, or raise its limits"
    if isinstance(error, JetStreamError):
        return f"JetStream refused ({error}); check the user's permissions and limits"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"{where}{error.strerror or error}; check that the path is right, that it can be read "
            "and written, and that the disk is not full"
        )
    if isinstance(error, InvalidURL):
        return f"the URL of the service is invalid ({error}); correct --url or BETRACE_URL"
    if isinstance(error, HTTPError):
        return f"the service did not answer ({error or type(error).__name__}); try again"
    return (
        f"this is a bug: {type(error).__name__}: {error}; please report it with the output of "
        "`betrace --debug …`"
    )


def _missing_extra(error: ModuleNotFoundError, command: str) -> str | None:
    found = _EXTRAS.get((error.name or "").partition(".")[0])
    if found is None:
        return None
    package, extra = found
    if command in ("demo", "tui"):
        extra = command
    return f"betrace {command} needs {package}; install it with: pip install 'betrace[{extra}]'"


def _version_text() -> str:
    return f"betrace {installed_version('betrace')} (Python {sys.version.split()[0]})"


def _print_version(ctx: click.Context, param: click.Parameter, given: bool) -> None:
    if given:
        click.echo(_version_text())
        ctx.exit()


@click.group(cls=Commands, context_settings=HELP)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@click.option("--debug", is_flag=True, help="Show the tracebacks of errors.")
def cli(debug: bool) -> None:
    """Behavioural assertions for distributed traces.

    Exit codes: 0 all is well, 1 the command found something, 2 wrong usage, 3 it could not run.

    \b
    Example:
      betrace demo
    """


@cli.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version.

    \b
    Example:
      betrace version --json
    """
    if as_json:
        python = sys.version.split()[0]
        click.echo(json.dumps({"betrace": installed_version("betrace"), "python": python}))
    else:
        click.echo(_version_text())


def main() -> None:
    """Run the command line of this process."""
    cli(prog_name="betrace")
