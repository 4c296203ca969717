"""Keeps the connection to the service, and reports its status.

The full state is read first; then snapshots arrive as server-sent events. If the stream does not
work (a proxy buffers it, or too many are open), the state is polled and the stream is retried every
`STREAM_AGAIN` seconds. If the service is gone, the connection is retried after pauses that grow to
`LONGEST_PAUSE`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from betrace.tui.client import ApiClient, ClientError
from betrace.tui.json_values import Json

Status = Literal["connecting", "connected", "lost"]

POLL_SECONDS = 1.0
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 10.0
STREAM_AGAIN = 30.0
"""Seconds of polling before the stream is tried again."""


@dataclass(frozen=True, slots=True)
class Link:
    """The status of the connection. Times are seconds since 1970."""

    status: Status
    since: float
    """When this status began."""
    message: str = ""
    """Why it was lost."""
    retry_at: float = 0.0
    """When the next attempt is due."""
    polling: bool = False
    """Whether the state is polled because there is no stream."""


class ServiceConnection:
    """Reads snapshots until cancelled. `run` is a task.

    Args:
      client: sends the requests; its owner closes it.
      on_link: called when the status of the connection changes.
      on_snapshot: called with each snapshot.
    """

    def __init__(
        self,
        client: ApiClient,
        on_link: Callable[[Link], None],
        on_snapshot: Callable[[Json], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._on_link = on_link
        self._on_snapshot = on_snapshot
        self._clock = clock
        self._wake = asyncio.Event()
        self.link = Link("connecting", clock())

    async def run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                self._on_snapshot(await self._client.snapshot())
                pause = FIRST_PAUSE
                self._set(Link("connected", self._clock()))
                await self._follow()
            except ClientError as error:
                retry_at = self._clock() + pause
                since = self.link.since if self.link.status == "lost" else self._clock()
                self._set(Link("lost", since, str(error), retry_at))
                await self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def refresh(self) -> None:
        """Read the state now, or retry a lost connection now."""
        self._wake.set()
        if self.link.status == "connected":
            self._on_snapshot(await self._client.snapshot())

    async def _follow(self) -> None:
        """Receive snapshots until the connection is lost."""
        while True:
            try:
                async for name, data in self._client.snapshots():
                    if name == "snapshot":
                        self._on_snapshot(data)
                        if self.link.polling:
                            self._set(replace(self.link, polling=False))
            except ClientError as error:
                if error.kind == "unreachable":
                    raise
            self._set(replace(self.link, polling=True))
            await self._poll()

    async def _poll(self) -> None:
        now = asyncio.get_running_loop().time
        until = now() + STREAM_AGAIN
        while now() < until:
            self._on_snapshot(await self._client.snapshot())
            await asyncio.sleep(POLL_SECONDS)

    async def _pause(self, seconds: float) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return

    def _set(self, link: Link) -> None:
        if link != self.link:
            self.link = link
            self._on_link(link)
