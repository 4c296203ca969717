"""Running the service in this process: its log, its signals, and what stops its start."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import trio

from betrace.service.cli.garbage import short_pauses
from betrace.service.config.settings import Settings

if TYPE_CHECKING:
    from betrace.service.app import Addresses, Service

_log = logging.getLogger("betrace.service.cli.serve")

_STOP = (signal.SIGTERM, signal.SIGINT)
_RELOAD = signal.SIGHUP
_COMPILE_NOTICE_SECONDS = 4.0  # loading compiled kernels from the cache takes less

# A task beside the service: it is called when the service is ready, and cancelled when it stops.
Companion = Callable[["Addresses"], Awaitable[None]]


def run_service(
    settings: Settings,
    companion: Companion | None = None,
    notice: Callable[[str], None] = _log.info,
) -> None:
    """Run the service until a SIGTERM or SIGINT, then drain; a second one ends the process at
    once. SIGHUP looks at the rule files. Without ``companion`` the service runs alone; with one
    it also stops when that returns. ``notice`` is told of a start that takes long.

    Raises what keeps the service from starting:
    :exc:`~betrace.service.receiver.sockets.ListenError`,
    :exc:`~betrace.service.storage.lockfile.LockedError`,
    :exc:`~betrace.service.storage.duck.files.StoreError`,
    :exc:`~betrace.service.storage.ledger.base.LedgerError`, :exc:`OSError`; perhaps in an
    exception group.
    """
    from betrace.service.app import open_service  # takes a second: not for --help and rules check

    with short_pauses(), ExitStack() as stack:
        make = open_service(settings, stack)
        trio.run(_main, make, companion, notice)


async def _main(
    make: Callable[[], Service], companion: Companion | None, notice: Callable[[str], None]
) -> None:
    service = make()
    try:
        with trio.open_signal_receiver(*_STOP, _RELOAD) as signals:
            async with trio.open_nursery() as nursery:
                running = _Running(service, nursery)
                nursery.start_soon(running.obey, signals)
                nursery.start_soon(_tell_if_slow, running, notice)
                addresses: Addresses = await nursery.start(running.serve)
                running.ready = True
                if companion is not None:
                    nursery.start_soon(running.accompany, companion, addresses)
    finally:
        service.close()


class _Running:
    def __init__(self, service: Service, nursery: trio.Nursery) -> None:
        self.ready = False
        self._service = service
        self._nursery = nursery
        self._beside = trio.CancelScope()

    async def serve(
        self, task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await self._service.run(task_status=task_status)
        self._nursery.cancel_scope.cancel()

    async def accompany(self, companion: Companion, addresses: Addresses) -> None:
        with self._beside:
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
                _log.warning("%s again: ending at once", name)
                logging.shutdown()
                os._exit(128 + number)
            stopping = True
            if self.ready:
                _log.info("%s: stopping; once more ends at once", name)
                self._beside.cancel()
                self._service.stop()
            else:
                _log.info("%s: stopping before the service was ready", name)
                self._nursery.cancel_scope.cancel()

    async def _reload(self) -> None:
        if self.ready:
            _log.info("SIGHUP: looking at the rule files")
            await self._service.reload_rules()


async def _tell_if_slow(running: _Running, notice: Callable[[str], None]) -> None:
    await trio.sleep(_COMPILE_NOTICE_SECONDS)
    if not running.ready:
        notice(
            "compiling the kernels, which takes about a minute; "
            "they are kept, so that later starts take seconds"
        )
