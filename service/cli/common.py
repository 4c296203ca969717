"""What the commands share: exit codes, options, kinds of values, and how they print.

A command exits with 0 when all is well, :data:`FOUND` when it found something, 2 for wrong usage
(click's own), and :data:`COULD_NOT_RUN`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from betrace.service.config.cluster import ClusterSettings
    from betrace.service.storage.jetstream.client import NatsClient

T = TypeVar("T")

FOUND = 1
COULD_NOT_RUN = 3

URL = "http://127.0.0.1:8090"
# BETRACE_AUTH__OPERATOR_TOKEN configures the service; on its machine the commands use it as well.
TOKEN_VARIABLES = ["BETRACE_TOKEN", "BETRACE_AUTH__OPERATOR_TOKEN"]
HELP = {"help_option_names": ["-h", "--help"]}

_DAY_CHARACTERS = len("2025-01-31")
_MAX_SECONDS = 3660 * 86_400
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
# JSON escapes the control characters below U+0020 itself. DEL and the C1 controls, among them an
# 8-bit CSI, and what hides or reorders text are left to this.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")

Command = Callable[..., Any]


class Failure(click.ClickException):
    """The command could not run, or the service refused. The message has one sentence with a
    remedy per line."""

    exit_code = COULD_NOT_RUN

    def show(self, file: Any = None) -> None:
        for line in self.message.split("\n"):
            warn(line)


# Printing


def printable(text: object) -> str:
    """``text`` with every character escaped that a terminal might not print: control characters,
    escape sequences, line breaks, and invisible or bidirectional formatting."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text)
    )


def warn(text: object) -> None:
    """Print one line on standard error."""
    click.echo(f"betrace: {printable(text)}", err=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, each escaped."""
    for line in lines:
        click.echo(printable(line))


def print_json(value: Any, indent: int | None = None) -> None:
    """Print ``value`` as JSON that is safe in a terminal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    click.echo(_UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows below their head, in columns."""
    cells = [head, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


# Kinds of values


class Duration(click.ParamType[int]):
    """Seconds, from a number with a unit."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, unit = value[:-1], value[-1:]
        valid = unit in _UNITS and number.isascii() and number.isdigit() and len(number) < 10
        if not valid or int(number) * _UNITS[unit] > _MAX_SECONDS:
            self.fail(f"{value!r} is not a duration: write 90s, 30m, 12h or 365d", param, ctx)
        return int(number) * _UNITS[unit]


class Moment(click.ParamType[int]):
    """Nanoseconds since 1970, from a date, a time, or how long ago."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from betrace.service.times import read_time

        if isinstance(value, int):
            return value
        text = str(value)
        if len(text) == _DAY_CHARACTERS and text.count("-") == 2:
            text += "T00:00:00Z"
        elif text[:1].isdigit() and text[-1:] in _UNITS:
            text = f"-{text}"
        try:
            return read_time(text)
        except ValueError:
            self.fail(
                f"{value!r} is not a time: write a date (2025-01-31, from 0:00 UTC), a time "
                "(2025-01-31T12:00:00Z), or how long ago (90m, 12h, 7d)",
                param,
                ctx,
            )


def with_client(settings: ClusterSettings, work: Callable[[NatsClient], Awaitable[T]]) -> T:
    """Connect to the NATS servers of a cluster and do some work, in a Trio run of its own."""
    import trio

    from betrace.service.storage.jetstream.client import NatsClient

    async def main() -> T:
        client = await NatsClient.connect(settings, "betrace command")
        try:
            return await work(client)
        finally:
            await client.close()

    return trio.run(main)


# Options


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_config_option = click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="A config.toml."
)
# By option name: the setting, its metavar (None for a flag), and the help.
_SETTINGS: dict[str, tuple[str, str | None, str]] = {
    "data": ("storage.path", "DIR", "The data directory"),
    "rules": (
        "rules.directory",
        "DIR",
        "Rule files: those of the tenant `default` in DIR, those of others in DIR/<tenant>",
    ),
    "ingest": ("ingest.address", "HOST:PORT", "Where to receive spans, or off"),
    "grpc": ("ingest.grpc_address", "HOST:PORT", "Where to receive OTLP over gRPC, or off"),
    "api": ("api.address", "HOST:PORT", "Where the API listens, or off"),
    "metrics": ("metrics.address", "HOST:PORT", "A listener for metrics alone, or off"),
    "insecure": (
        "auth.insecure",
        None,
        "Listen on non-loopback addresses without authentication",
    ),
    "directory": ("archive.directory", "DIR", "Where the archive is"),
}


def settings_options(*names: str) -> Callable[[Command], Command]:
    """Add ``--config`` and options that override settings. The command gets ``config``, and
    ``overrides`` for :func:`betrace.service.config.load.load`."""

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def with_overrides(**given: Any) -> Any:
            values = {_SETTINGS[name][0]: given.pop(name) for name in names}
            given["overrides"] = {key: value for key, value in values.items() if value}
            return command(**given)

        decorated: Command = with_overrides
        for name in reversed(names):
            setting, metavar, text = _SETTINGS[name]
            decorated = click.option(
                f"--{name}", metavar=metavar, is_flag=metavar is None, help=f"{text} ({setting})."
            )(decorated)
        return _config_option(decorated)

    return add


@dataclass(frozen=True, slots=True)
class Server:
    """A running service that a command talks to. ``ca`` is a PEM file of trusted certificates;
    None means those of the system."""

    url: str
    token: str | None = None
    ca: Path | None = None


url_option = click.option(
    "--url",
    default=URL,
    envvar="BETRACE_URL",
    show_default=True,
    help="The service's API; also BETRACE_URL.",
)
token_option = click.option(
    "--token",
    envvar=TOKEN_VARIABLES,
    help="The operator token, if authentication is on; also BETRACE_TOKEN.",
)
ca_option = click.option(
    "--ca",
    envvar="BETRACE_CA",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Trust the certificates in this PEM file, such as a self-signed one; also BETRACE_CA.",
)


tenant_option = click.option(
    "--tenant",
    envvar="BETRACE_TENANT",
    metavar="NAME",
    help="The tenant; by default that of the token, or `default`. Also BETRACE_TENANT.",
)


def server_options(command: Command) -> Command:
    """Add ``--url``, ``--token``, ``--ca`` and ``--json``. The command gets ``server`` and
    ``as_json``."""

    @functools.wraps(command)
    def with_server(*, url: str, token: str | None, ca: Path | None, **given: Any) -> Any:
        return command(server=Server(url, token, ca), **given)

    return url_option(token_option(ca_option(json_option(with_server))))
