"""Whether the edges of a cluster accept spans: an operator pauses and resumes all of them.

The state is a key of the configuration bucket, which edges and query nodes follow. It stays when
processes restart.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.errors import NatsUnavailable

_KEY = "ingestion"
_PAUSED, _OPEN = b"paused", b"open"
_RETRY_SECONDS = 0.25


class IngestionSwitch:
    """Follows the state. ``pause`` and ``resume`` are called when it changes, on the Trio
    thread."""

    def __init__(
        self, config: ConfigBucket, pause: Callable[[], None], resume: Callable[[], None]
    ) -> None:
        self._config = config
        self._pause = pause
        self._resume = resume

    async def set(self, *, paused: bool) -> None:
        """Pause or resume all edges, which follow within a second. Raises
        :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
        await self._config.put(_KEY, _PAUSED if paused else _OPEN)
        self._follow(paused)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled. Starts when the present state is known."""
        while True:
            try:
                entry = await self._config.get(_KEY)
                break
            except NatsUnavailable:
                await trio.sleep(_RETRY_SECONDS)
        self._follow(entry is not None and entry.value == _PAUSED)
        task_status.started()
        async for change in self._config.watch(_KEY):
            self._follow(change.value == _PAUSED)

    def _follow(self, paused: bool) -> None:
        (self._pause if paused else self._resume)()
