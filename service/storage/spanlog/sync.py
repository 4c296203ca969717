"""How many tenants' logs are synced at once: each file, or the whole filesystem by one call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from betrace.service.storage.disk import Disk
from betrace.service.storage.spanlog.filesystem import reliable
from betrace.service.storage.spanlog.tenant_log import Dirty, TenantLog

MANY = 32
"""Dirty logs from which one call for all is tried; below it costs no less than their files."""
SLOW_SECONDS = 0.25
"""Of such a call: others write to the filesystem, and the logs would wait for their data."""
REST_SECONDS = 60.0
"""For which the files are then synced instead."""
_THREADS = 4

Result = int | OSError
"""Of a tenant: the bytes that became durable, or why they did not."""


class LogSyncer:
    """Syncs the logs below ``directory``; one call at a time. Close it."""

    def __init__(
        self, directory: Path, disk: Disk, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._disk = disk
        self._clock = clock
        self._threads = ThreadPoolExecutor(_THREADS, "span-log-sync")
        # Held open: a failed write is told to descriptors that are older than it.
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._device = os.fstat(self._descriptor).st_dev
        self._reliable = reliable(directory)
        self._rests_until = 0.0

    def sync(self, logs: Sequence[TenantLog]) -> list[Result]:
        """Make durable what was written to each before the call, and say for each how it went."""
        together = []
        if len(logs) >= MANY and self._reliable and self._clock() >= self._rests_until:
            # What an earlier process wrote is not: its failures were told to its descriptors.
            together = [k for k, log in enumerate(logs) if self._can(log)]
        if len(together) < MANY:
            return self._by_file([(log, log.take_dirty()) for log in logs])
        alone = sorted(set(range(len(logs))).difference(together))
        results = dict(zip(together, self._at_once([logs[k] for k in together]), strict=True))
        apart = self._by_file([(logs[k], logs[k].take_dirty()) for k in alone])
        results |= dict(zip(alone, apart, strict=True))
        return [results[k] for k in range(len(logs))]

    def _can(self, log: TenantLog) -> bool:
        return not log.recovered and log.on_device(self._device)

    def _at_once(self, logs: Sequence[TenantLog]) -> list[Result]:
        taken = [(log, log.take_dirty()) for log in logs]
        began = self._clock()
        try:
            self._disk.sync_filesystem(self._descriptor)
        except OSError:
            # Somebody's write failed: the files say whose. Each is told of its own failures,
            # whatever the call for all has told.
            return self._by_file(taken)
        ended = self._clock()
        if ended - began > SLOW_SECONDS:
            self._rests_until = ended + REST_SECONDS
        return [log.settle(dirty) for log, dirty in taken]

    def _by_file(self, taken: Sequence[tuple[TenantLog, Dirty]]) -> list[Result]:
        if len(taken) == 1:
            return [_sync_files(taken[0])]
        return list(self._threads.map(_sync_files, taken))

    def close(self) -> None:
        """Give the threads and the descriptor back."""
        self._threads.shutdown()
        os.close(self._descriptor)


def _sync_files(taken: tuple[TenantLog, Dirty]) -> Result:
    log, dirty = taken
    try:
        return log.sync_files(dirty)
    except OSError as error:
        return error
