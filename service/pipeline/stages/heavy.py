"""Requests that take long to decode: a few kilobytes may become 20 MiB, or 100 000 spans.

They bypass the channel of span-ingestion and are handled one at a time in a thread of their own, so
that no other request waits for them. Tenants take turns by CPU time (deficit round robin: Shreedhar
and Varghese, 1995): a tenant that used more than its turn waits until the others have used as much.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from betrace.service.pipeline.request import Request

TURN_SECONDS: Final = 0.02
"""CPU seconds of a tenant in one turn. A request that takes longer is paid back."""
MOST_REQUESTS: Final = 64
"""Requests that may wait, in equal shares of the tenants that wait."""
_LEAST_REQUESTS = 2

_log = logging.getLogger("service.pipeline")


@dataclass(slots=True, eq=False)
class _Line:
    """The waiting requests of a tenant, in the order of their arrival."""

    requests: deque[Request] = field(default_factory=deque)
    credit: float = 0.0
    """CPU seconds that the tenant may use in its turn; negative if it used too much."""


class HeavyRequests:
    """The requests that wait, by tenant. Use it on Trio's thread only.

    ``handle`` handles a request, sets its outcome whatever happens, and returns the CPU seconds
    that it took.
    """

    def __init__(self, handle: Callable[[Request], Awaitable[float]]) -> None:
        self._handle = handle
        self._lines: dict[str, _Line] = {}
        self._turns: deque[str] = deque()
        self._added = trio.Event()
        self._closed = False
        self.handled = 0
        """Requests since the start."""
        self.seconds = 0.0
        """CPU seconds that they took."""

    def __len__(self) -> int:
        """How many requests wait or are being handled."""
        return sum(len(line.requests) for line in self._lines.values())

    def full(self, tenant: str) -> bool:
        """Whether the tenant has its share of what may wait."""
        line = self._lines.get(tenant)
        share = max(MOST_REQUESTS // (len(self._lines) or 1), _LEAST_REQUESTS)
        return line is not None and len(line.requests) >= share

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. The caller looks at :meth:`full` first."""
        line = self._lines.get(request.tenant)
        if line is None:
            line = self._lines[request.tenant] = _Line()
            self._turns.append(request.tenant)
        line.requests.append(request)
        self._added.set()

    def close(self) -> None:
        """Have :meth:`run` return when nothing waits any more."""
        self._closed = True
        self._added.set()

    async def run(self, may_run: Callable[[], bool] = lambda: True) -> None:
        """Handle what waits until :meth:`close`; nothing while ``may_run`` is false."""
        while True:
            if not self._turns:
                if self._closed:
                    return
                self._added = trio.Event()
                await self._added.wait()
                continue
            if not may_run():
                await trio.sleep(0.1)
                continue
            await self._take_turn()

    async def _take_turn(self) -> None:
        tenant = self._turns.popleft()
        line = self._lines[tenant]
        self._turns.append(tenant)
        alone = len(self._lines) == 1  # then it owes nobody anything
        line.credit = TURN_SECONDS if alone else min(line.credit + TURN_SECONDS, TURN_SECONDS)
        while line.requests and line.credit > 0:
            started = time.perf_counter()
            request = line.requests[0]
            try:
                used = await self._handle(request)
            except Exception:  # a bug; the client has an answer or will time out
                _log.exception("a large request of %s could not be handled", tenant)
                used = time.perf_counter() - started
            line.requests.popleft()
            line.credit -= used
            self.handled += 1
            self.seconds += used
        if not line.requests:
            del self._lines[tenant]
            self._turns.remove(tenant)
        await trio.lowlevel.checkpoint()
