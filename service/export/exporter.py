"""Sends signals to a destination, each at least once, however long that takes.

The ledger is the queue: it is durable, ordered and complete. An exporter stores only its progress:
the last exported ledger entry of each tenant, written to a file after the destination accepted the
signals. So export never blocks the pipeline, drops nothing while the destination is down, and
continues after a restart; signals in transit at that moment are sent twice. A new destination
starts with signals recorded from then on.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from betrace.channels import Breaker, BreakerOpen, BreakerTimeout, ThreadRunner, TransientError
from betrace.service.durable import write_atomically
from betrace.service.pipeline.breakers import PoisonError
from betrace.service.signals import Signal
from betrace.service.storage.ledger.base import LedgerEntries, LedgerError
from betrace.service.telemetry import events

_log = logging.getLogger("service.export")

BATCH_SIGNALS = 500
POLL_SECONDS = 30.0  # for signals without a notification, such as those written back late
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0

Deliver = Callable[[list[Signal]], Awaitable[None]]


class Unavailable(TransientError):  # noqa: N818
    """The destination cannot accept the signals now; it asks to wait ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unacceptable(PoisonError):  # noqa: N818
    """The destination will never accept these signals."""


class Exporter:
    """Sends the ledger's signals to one destination, except those of shadow rules. Call its methods
    on the Trio thread.

    Args:
      name: of the destination.
      deliver: sends signals; raises :exc:`Unavailable` or :exc:`Unacceptable`.
      entries: the ledger.
      path: the progress file.
      breaker: refuses calls while the destination fails, and limits their duration.
      threads: read the ledger and the file.
    """

    def __init__(
        self,
        name: str,
        deliver: Deliver,
        entries: LedgerEntries,
        path: Path,
        breaker: Breaker,
        threads: ThreadRunner,
    ) -> None:
        self.name = name
        self._deliver = deliver
        self._entries = entries
        self._path = path
        self.breaker = breaker
        self._threads = threads
        self._done: dict[str, int] = {}
        self._new: set[str] = set()
        self._wake = trio.Event()
        self._failing = 0
        self.sent = 0
        """Signals that the destination accepted since the start."""
        self.rejected = 0
        """Signals that it will never accept; they stay in the ledger."""
        self.failures = 0
        """Failed deliveries that were retried."""
        self.waiting_since: float | None = None
        """Detection time of the oldest signal being sent, seconds since 1970."""

    def notify(self, tenants: set[str]) -> None:
        """Note that these tenants have new signals."""
        self._new |= tenants
        self._wake.set()

    async def run(self) -> None:
        """Send until cancelled."""
        await self._start()
        while True:
            with trio.move_on_after(POLL_SECONDS) as poll:
                await self._wake.wait()
            self._wake = trio.Event()
            tenants, self._new = self._new, set()
            try:
                if poll.cancelled_caught:
                    tenants |= set(await self._threads.run(self._entries.tenants))
                await self._catch_up(sorted(tenants))
            except (LedgerError, OSError) as error:
                self._new |= tenants
                _log.warning("cannot read signals for %s; trying again: %s", self.name, error)

    async def _start(self) -> None:
        """Read the progress file; for a new destination, start at the end of the ledger."""
        pause = FIRST_PAUSE
        while True:
            try:
                self._done = await self._threads.run(self._load)
                self._new |= set(await self._threads.run(self._entries.tenants))
            except (LedgerError, OSError) as error:
                _log.warning("cannot start the export to %s; trying again: %s", self.name, error)
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._wake.set()
                return

    def _load(self) -> dict[str, int]:
        try:
            return {str(k): int(v) for k, v in json.loads(self._path.read_text()).items()}
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError, TypeError) as error:
            _log.error("%s is damaged (%s); the export starts with new signals", self._path, error)
        done = {each: self._entries.last_entry(each) for each in self._entries.tenants()}
        self._save(done)
        return done

    def _save(self, done: dict[str, int]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(done).encode())

    async def _catch_up(self, tenants: list[str]) -> None:
        """Send everything that these tenants have, one page at a time each."""
        while tenants:
            signals, upto, tenants = await self._threads.run(self._page, tenants)
            if not signals:
                return
            heard = [signal for signal in signals if not signal.shadow]
            if heard:
                self.waiting_since = min(signal.detected_at for signal in heard) / 1e9
                await self._send(heard)
            self._done |= upto
            await self._threads.run(self._save, dict(self._done))
            self.waiting_since = None

    def _page(self, tenants: list[str]) -> tuple[list[Signal], dict[str, int], list[str]]:
        """Read a page of signals. Return them, the new progress by tenant, and the tenants that may
        have more; those with a full page come last."""
        signals: list[Signal] = []
        upto: dict[str, int] = {}
        share = max(BATCH_SIGNALS // len(tenants), 1)
        later: list[str] = []
        for number, tenant in enumerate(tenants):
            if len(signals) >= BATCH_SIGNALS:
                return signals, upto, tenants[number:] + later
            page = self._entries.entries(tenant, self._done.get(tenant, 0), share)
            if page:
                upto[tenant] = page[-1][0]
                signals += [signal for _, signal in page]
            if len(page) == share:
                later.append(tenant)
        return signals, upto, later

    async def _send(self, signals: list[Signal]) -> None:
        """Retry until the destination accepts the signals or rejects them for good."""
        failures = 0
        while True:
            try:
                await self.breaker.call(self._deliver, signals)
            except Unacceptable as error:
                await self._split(signals, error)
                return
            except BreakerOpen as refused:
                wait = LONGEST_PAUSE if math.isinf(refused.retry_in) else refused.retry_in
            except (Unavailable, BreakerTimeout) as error:
                failures += 1
                self._note(error)
                wait = min(FIRST_PAUSE * 2 ** min(failures - 1, 10), LONGEST_PAUSE)
                if isinstance(error, Unavailable):
                    wait = max(wait, min(error.retry_after, LONGEST_PAUSE))
            else:
                self.sent += len(signals)
                self._note(None)
                return
            await trio.sleep(wait * random.uniform(0.8, 1.2))

    async def _split(self, signals: list[Signal], error: Unacceptable) -> None:
        """Find the unacceptable signals by halving the batch, and send the others."""
        if len(signals) == 1:
            self.rejected += 1
            _log.error("%s rejected the signal %s: %s", self.name, signals[0].id, error)
            return
        middle = len(signals) // 2
        await self._send(signals[:middle])
        await self._send(signals[middle:])

    def _note(self, error: Exception | None) -> None:
        if error is not None:
            self.failures += 1
            if not self._failing:
                events.EXPORT_FAILING(destination=self.name, error=error)
            self._failing += 1
        elif self._failing:
            events.EXPORT_WORKS(destination=self.name, failures=self._failing)
            self._failing = 0

    def lag_seconds(self) -> float:
        """Return the age of the oldest signal waiting to be sent; 0 if none waits."""
        return 0.0 if self.waiting_since is None else max(time.time() - self.waiting_since, 0.0)
