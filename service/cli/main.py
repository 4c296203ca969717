"""The command line: ``betrace``, also ``python -m betrace.service``.

Exit codes: 0 good, 1 it found something, 2 wrong usage, 3 could not run. Modules that take long
to import are imported by the commands that need them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import click

from betrace.service.cli.api_client import Failure
from betrace.service.cli.archive import archive
from betrace.service.cli.dead_letters import dead_letters
from betrace.service.cli.doctor.command import doctor
from betrace.service.cli.replay import replay
from betrace.service.cli.tenants import tenants

FOUND = 1
COULD_NOT_RUN = 3

ADDRESS = "HOST:PORT"


class Commands(click.Group):
    """Commands whose errors are sentences, not tracebacks."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # such as betrace … | head: nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(COULD_NOT_RUN)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            raise Failure("\n".join(dict.fromkeys(map(_explain, _leaves(error))))) from error


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _explain(error: BaseException) -> str:
    """What went wrong and what to do, in a sentence."""
    from httpx import HTTPError

    from betrace.service.cli.demo.run import DemoError
    from betrace.service.cli.rules import InputError
    from betrace.service.config.load import ConfigError
    from betrace.service.receiver.sockets import ListenError
    from betrace.service.rules.store import RuleStoreError
    from betrace.service.storage.duck.files import StoreError
    from betrace.service.storage.ledger.base import LedgerError
    from betrace.service.storage.lockfile import LockedError
    from betrace.service.tenancy.authentication import SecretError
    from betrace.service.tenancy.directory import DirectoryError
    from betrace.service.tenancy.tokens import BadKeyError

    told = (ConfigError, DemoError, InputError, ListenError, LedgerError, LockedError)
    tenancy = (BadKeyError, DirectoryError, SecretError)
    if isinstance(error, (*told, *tenancy, RuleStoreError, StoreError)):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"{where}{error.strerror or error}; check that the path is right, may be read and "
            "written, and that the disk has room"
        )
    if isinstance(error, HTTPError):
        return f"the service did not answer ({error or type(error).__name__}); try again"
    return (
        f"a bug: {type(error).__name__}: {error}; please report it with what "
        "`betrace --debug …` prints"
    )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def cli(debug: bool) -> None:
    """Behavioural assertions for distributed traces.

    Exit codes: 0 good, 1 it found something, 2 wrong usage, 3 could not run.

    \b
    Example:
      betrace demo
    """


def _as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


@cli.command()
@click.option("--config", type=click.Path(path_type=Path), help="A config.toml.")
@click.option("--data", metavar="DIR", help="Where data is kept (storage.path).")
@click.option(
    "--rules",
    metavar="DIR",
    help="Rule files: of the tenant `default` in DIR, of others in DIR/<tenant> (rules.directory).",
)
@click.option("--ingest", metavar=ADDRESS, help="Where spans come in, or off (ingest.address).")
@click.option("--grpc", metavar=ADDRESS, help="OTLP over gRPC, or off (ingest.grpc_address).")
@click.option("--api", metavar=ADDRESS, help="Where the API listens, or off (api.address).")
@click.option("--metrics", metavar=ADDRESS, help="A listener for metrics, or off.")
@click.option("--insecure", is_flag=True, help="Let other machines in without authentication.")
@_as_json
def serve(
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
    """Run the service.

    Every setting is in config.toml; variables such as BETRACE_STORAGE__PATH override it, options
    override both. Port 0 is any free port. SIGTERM or Ctrl-C stops it when everything it has
    accepted is stored, a second one at once; SIGHUP looks at the rule files now. Its log is on
    standard error; where it listens is printed when it is ready.

    \b
    Example:
      betrace serve --data ./data --rules ./rules
    """
    import trio

    from betrace.service.cli.serve import run_service
    from betrace.service.config.load import load
    from betrace.service.telemetry.logs import set_up_logging

    given = {
        "storage.path": data,
        "rules.directory": rules,
        "ingest.address": ingest,
        "ingest.grpc_address": grpc,
        "api.address": api,
        "metrics.address": metrics,
        "auth.insecure": insecure or None,
    }
    settings = load(config, {key: value for key, value in given.items() if value is not None})
    if settings.rules.directory and not Path(settings.rules.directory).is_dir():
        raise Failure(
            f"the directory of rules, {settings.rules.directory}, is not there; "
            "make it, or name another with --rules"
        )
    set_up_logging(settings.logging)

    async def say_where(addresses: Any) -> None:
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(addresses)))
        else:
            click.echo(f"spans    {_url(addresses.ingest, '/v1/traces')}  (OTLP over HTTP)")
            click.echo(f"spans    {_url(addresses.grpc, '')}  (OTLP over gRPC)")
            click.echo(f"API      {_url(addresses.api, '/docs')}")
            click.echo(f"metrics  {_url(addresses.metrics or addresses.api, '/metrics')}")
        sys.stdout.flush()
        await trio.sleep_forever()

    run_service(settings, say_where)


def _url(base: str | None, path: str) -> str:
    return "off" if base is None else base + path


@cli.command()
@click.option("--once", is_flag=True, help="Send every kind of trace once, check, and end.")
@click.option("--ingest", metavar=ADDRESS, default="127.0.0.1:0", help="Else any free port.")
@click.option("--api", metavar=ADDRESS, default="127.0.0.1:0", help="Else any free port.")
@click.option("--metrics", metavar=ADDRESS, default="off", help="Else with the API only.")
@_as_json
def demo(once: bool, ingest: str, api: str, metrics: str, as_json: bool) -> None:
    """See it work: the service on a temporary directory, and a sample shop that sends to it.

    The shop is instrumented with the OpenTelemetry SDK; some of what it does breaks the sample
    rules. Signals are printed as they are stored. With --once every kind of trace is sent once
    and the signals are compared with what is expected: exit code 1 if one is missing or was not
    expected.

    \b
    Examples:
      betrace demo
      betrace demo --once --json
    """
    from betrace.service.cli.demo.run import run_demo

    addresses = {"ingest": ingest, "api": api, "metrics": metrics}
    sys.exit(run_demo(addresses, once=once, as_json=as_json))


@cli.group()
def rules() -> None:
    """Check rule files, and try them on a trace.

    \b
    Example:
      betrace rules check rules/*.yaml
    """


@rules.command("check")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@_as_json
def rules_check(files: Sequence[str], as_json: bool) -> None:
    """Check rule files; exit code 1 if one has errors.

    A directory stands for the rule files in it.

    \b
    Example:
      betrace rules check rules/payments.yaml
    """
    from betrace.service.cli.rules import check_files

    report = check_files([Path(name) for name in files])
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        for line in report.lines():
            click.echo(line)
    sys.exit(FOUND if report.problems else 0)


@rules.command("test")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--trace",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A trace in OTLP, JSON or protobuf; gzip as well.",
)
@click.option("--rule", "rule_id", metavar="ID", help="Only this rule of the file.")
@_as_json
def rules_test(file: Path, trace: Path, rule_id: str | None, as_json: bool) -> None:
    """Say what rules say of a trace, and why; exit code 1 if the trace breaks one.

    The trace is taken as complete. What `GET /api/v1/traces/{id}` answers can be used as it is.

    \b
    Example:
      curl -s http://127.0.0.1:8090/api/v1/traces/$ID >trace.json
      betrace rules test rules/payments.yaml --trace trace.json
    """
    from betrace.service.cli.rules import judge

    judgements = judge(file, trace, rule_id)
    if as_json:
        click.echo(json.dumps([j.to_json() for j in judgements], indent=2, ensure_ascii=False))
    else:
        for line in (line for judgement in judgements for line in judgement.lines()):
            click.echo(line)
    sys.exit(FOUND if any(judgement.verdict.breach for judgement in judgements) else 0)


@cli.command()
@click.option(
    "--url", default="http://127.0.0.1:8090", show_default=True, help="Where the service's API is."
)
@click.option("--token", envvar="BETRACE_TOKEN", help="The operator token; also BETRACE_TOKEN.")
@click.option("--tenant", help="Whose signals and rules, with authentication off.")
@click.option("--read-only", is_flag=True, help="Look only: no action is possible.")
def tui(url: str, token: str | None, tenant: str | None, read_only: bool) -> None:
    """Watch and operate a running service in the terminal.

    Press ? for the keys. Exit code 3 if the service cannot be reached.

    \b
    Example:
      betrace tui --url http://127.0.0.1:8090 --read-only
    """
    from betrace.tui.app import run

    sys.exit(run(url, token, tenant, read_only))


@cli.command()
@_as_json
def version(as_json: bool) -> None:
    """Print the version.

    \b
    Example:
      betrace version --json
    """
    number = installed_version("betrace")
    python = sys.version.split()[0]
    shown = json.dumps({"betrace": number, "python": python})
    click.echo(shown if as_json else f"betrace {number} (Python {python})")


cli.add_command(archive)
cli.add_command(dead_letters)
cli.add_command(doctor)
cli.add_command(replay)
cli.add_command(tenants)


def main() -> None:
    """Run the command line of this process."""
    cli(prog_name="betrace")
