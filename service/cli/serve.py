"""``betrace serve``, and running the service in this process until a signal stops it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from betrace.service.cli.common import Failure, json_option, settings_options
from betrace.service.cli.garbage import short_pauses

if TYPE_CHECKING:
    from betrace.service.app.cluster import ClusterProcess
    from betrace.service.app.roles import Role
    from betrace.service.app.service import Addresses, Service
    from betrace.service.config.settings import Settings

    Running = Service | ClusterProcess

_log = logging.getLogger("service.running")

_STOP = (signal.SIGTERM, signal.SIGINT)
_RELOAD = signal.SIGHUP
_NOTICE_SECONDS = 3.0
SWITCH_SECONDS = 0.0005
"""A thread that computes gives up the interpreter's lock after this long (default: 0.005). Trio's
thread needs the lock again after each system call, several times for a request."""

# A task that runs with the service: started when the service is ready, cancelled when it stops.
Companion = Callable[["Addresses"], Awaitable[None]]


@click.command()
@click.option(
    "--role",
    metavar="ROLES",
    help="What this process does in a cluster: edge, evaluator, query, or several of them, "
    "separated by commas. Needs a section [cluster] in config.toml.",
)
@settings_options("data", "rules", "ingest", "grpc", "api", "metrics", "insecure")
@json_option
def serve(role: str | None, config: Path | None, overrides: dict[str, Any], as_json: bool) -> None:
    """Run the service.

    config.toml has every setting. Environment variables such as BETRACE_STORAGE__PATH override
    it, and options override both. Port 0 means any free port. SIGTERM or Ctrl-C stops the service
    once everything it has accepted is stored; a second one stops it at once. SIGHUP reloads the
    rule files. The log goes to standard error. The addresses are printed when the service is
    ready.

    \b
    Examples:
      betrace serve --data ./data --rules ./rules
      betrace serve --config config.toml --role edge,evaluator
    """
    from betrace.service.app.roles import RoleError, read_roles, refuse_unsupported
    from betrace.service.config.load import load
    from betrace.service.telemetry.logs import set_up_logging

    settings = load(config, overrides)
    try:
        roles = read_roles(role, settings.cluster is not None)
        if roles:
            refuse_unsupported(settings)
    except RoleError as error:
        raise Failure(str(error)) from None
    if settings.rules.directory and not Path(settings.rules.directory).is_dir():
        raise Failure(
            f"the rule directory {settings.rules.directory} does not exist; "
            "create it, or name another with --rules"
        )
    set_up_logging(settings.logging)

    async def print_addresses(addresses: Addresses) -> None:
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(addresses)))
        else:
            for line in _address_lines(addresses, roles):
                click.echo(line)
        sys.stdout.flush()
        await trio.sleep_forever()

    run_service(settings, print_addresses, roles=roles)


def _address_lines(addresses: Addresses, roles: Sequence[str]) -> Iterator[str]:
    """What is served where; on a cluster, by the roles of the process."""
    if not roles or "edge" in roles:
        yield f"spans    {_url(addresses.ingest, '/v1/traces')}  (OTLP over HTTP)"
        yield f"spans    {_url(addresses.grpc, '')}  (OTLP over gRPC)"
    if not roles or "query" in roles:
        yield f"pages    {_url(addresses.api, '/')}"
        yield f"API      {_url(addresses.api, '/docs')}"
    else:
        yield f"health   {_url(addresses.api, '/readyz')}"
    yield f"metrics  {_url(addresses.metrics or addresses.api, '/metrics')}"


def _url(base: str | None, path: str) -> str:
    return "off" if base is None else base + path


def run_service(
    settings: Settings,
    companion: Companion | None = None,
    notice: Callable[[str], None] = _log.info,
    roles: Sequence[Role] = (),
) -> None:
    """Run the service, or the roles of a process of a cluster, until SIGTERM or SIGINT, then drain;
    a second signal ends the process at once. SIGHUP reloads the rule files. The service also stops
    when ``companion`` returns.
    ``notice`` gets a text if the start takes long.

    Raises what keeps the service from starting:
    :exc:`~betrace.service.receiver.sockets.ListenError`,
    :exc:`~betrace.service.storage.lockfile.LockedError`,
    :exc:`~betrace.service.storage.duck.schema.StoreError`,
    :exc:`~betrace.service.storage.ledger.base.LedgerError`, :exc:`OSError`; perhaps in an
    exception group.
    """
    from betrace.service.app.builder import open_service  # takes a second, which --help should not
    from betrace.service.cli.rules import record_rules_directory

    sys.setswitchinterval(SWITCH_SECONDS)
    with short_pauses(), ExitStack() as stack:
        make: Callable[[], Running]
        if roles:
            from betrace.service.app.cluster import open_cluster

            make = open_cluster(settings, roles, stack)
        else:
            make = open_service(settings, stack)
        record_rules_directory(settings)
        trio.run(_main, make, companion, notice)


async def _main(
    make: Callable[[], Running], companion: Companion | None, notice: Callable[[str], None]
) -> None:
    service = make()
    try:
        with trio.open_signal_receiver(*_STOP, _RELOAD) as signals:
            async with trio.open_nursery() as nursery:
                running = _Running(service, nursery)
                nursery.start_soon(running.obey, signals)
                nursery.start_soon(_explain_slow_start, running, notice)
                addresses: Addresses = await nursery.start(running.serve)
                running.ready = True
                if companion is not None:
                    nursery.start_soon(running.accompany, companion, addresses)
    finally:
        service.close()


class _Running:
    def __init__(self, service: Running, nursery: trio.Nursery) -> None:
        self.ready = False
        self.compilation = service.compilation
        self._service = service
        self._nursery = nursery
        self._companion_scope = trio.CancelScope()

    async def serve(
        self, task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await self._service.run(task_status=task_status)
        self._nursery.cancel_scope.cancel()

    async def accompany(self, companion: Companion, addresses: Addresses) -> None:
        with self._companion_scope:
            await companion(addresses)
        self._service.stop()

    async def obey(self, signals: AsyncIterator[int]) -> None:
        stopping = False
        async for number in signals:
            if number == _RELOAD:
                await self._reload()
                continue
            name = signal.Signals(number).name
            if stopping:
                _log.warning("%s again: stopping at once", name)
                logging.shutdown()
                os._exit(128 + number)
            stopping = True
            if self.ready:
                _log.info("%s: stopping; send it again to stop at once", name)
                self._companion_scope.cancel()
                self._service.stop()
            else:
                _log.info("%s: stopping before the service was ready", name)
                self._nursery.cancel_scope.cancel()

    async def _reload(self) -> None:
        if self.ready:
            _log.info("SIGHUP: reloading the rule files")
            await self._service.reload_rules()


async def _explain_slow_start(running: _Running, notice: Callable[[str], None]) -> None:
    """While kernels are compiled, which takes long once, say every few seconds how far it is."""
    started = trio.current_time()
    while not running.ready:
        await trio.sleep(_NOTICE_SECONDS)
        if running.compilation.running:
            notice(
                f"compiling kernels: {running.compilation.progress} after "
                f"{trio.current_time() - started:.0f} s; later starts take a second"
            )
