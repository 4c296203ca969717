"""Syncs many tenants' logs at once: each file, or the whole filesystem in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from betrace.service.storage.disk import Disk
from betrace.service.storage.filesystem import reliable
from betrace.service.storage.spanlog.tenant_log import Dirty, TenantLog

MANY = 32
"""Dirty logs from which one call for all is used; below that it is not cheaper."""
SLOW_SECONDS = 0.25
"""A call that takes longer shows that other programs write to the filesystem, for whose data the
logs would wait."""
REST_SECONDS = 60.0
"""How long files are synced one by one after a slow call."""
_THREADS = 4

Result = int | OSError
"""For one tenant: the bytes that became durable, or why they did not."""


class LogSyncer:
    """Syncs the logs below ``directory``, one call at a time. Must be closed."""

    def __init__(
        self, directory: Path, disk: Disk, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._disk = disk
        self._clock = clock
        self._threads = ThreadPoolExecutor(_THREADS, "span-log-sync")
        # Stays open: a failed write is reported only to descriptors opened before it.
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._device = os.fstat(self._descriptor).st_dev
        self._reliable = reliable(directory)
        self._rests_until = 0.0

    def sync(self, logs: Sequence[TenantLog]) -> list[Result]:
        """Make durable what was written to each log before the call; returns a result for each."""
        together = []
        if len(logs) >= MANY and self._reliable and self._clock() >= self._rests_until:
            # Not what an earlier process wrote: failures were reported to that process.
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
            # Some write failed, and the files tell which: each reports its own failures even
            # after the call for all has reported them.
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
        """Stop the threads and close the descriptor."""
        self._threads.shutdown()
        os.close(self._descriptor)


def _sync_files(taken: tuple[TenantLog, Dirty]) -> Result:
    log, dirty = taken
    try:
        return log.sync_files(dirty)
    except OSError as error:
        return error
