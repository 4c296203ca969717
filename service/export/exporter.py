"""Sends signals to a destination, each at least once, however long that takes.

The ledger is the queue, or in a cluster the ``OUT`` streams: it is durable, ordered and complete.
An exporter stores only its progress, the last exported entry of each queue, after the destination
accepted the signals. So export never blocks the pipeline, drops nothing while the destination is
down, and continues after a restart; signals in transit at that moment are sent twice. A new
destination starts with signals recorded from then on.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Awaitable, Callable

import trio

from betrace.channels import Breaker, BreakerOpen, BreakerTimeout, ThreadRunner, TransientError
from betrace.service.export.turns import Progress
from betrace.service.pipeline.breakers import PoisonError
from betrace.service.signals import Signal
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.signal_queues import SignalQueues
from betrace.service.telemetry import events

_log = logging.getLogger("service.export")

BATCH_SIGNALS = 500
POLL_SECONDS = 30.0  # for signals without a notification, such as those written back late
SAVE_SECONDS = 5.0  # limit on saving the progress after a cancellation
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
    """Sends the signals of all queues to one destination, except those of shadow rules. Call its
    methods on the Trio thread. :meth:`run` may be cancelled and called again.

    Args:
      name: of the destination.
      deliver: sends signals; raises :exc:`Unavailable` or :exc:`Unacceptable`.
      queues: where the signals are.
      progress: of the destination.
      breaker: refuses calls while the destination fails, and limits their duration.
      threads: read the queues.
    """

    def __init__(
        self,
        name: str,
        deliver: Deliver,
        queues: SignalQueues,
        progress: Progress,
        breaker: Breaker,
        threads: ThreadRunner,
    ) -> None:
        self.name = name
        self._deliver = deliver
        self._queues = queues
        self._progress = progress
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

    def notify(self, queues: set[str]) -> None:
        """Note that these queues have new signals."""
        self._new |= queues
        self._wake.set()

    async def run(self) -> None:
        """Send until cancelled."""
        self.waiting_since = None
        await self._start()
        while True:
            with trio.move_on_after(POLL_SECONDS) as poll:
                await self._wake.wait()
            self._wake = trio.Event()
            queues, self._new = self._new, set()
            try:
                if poll.cancelled_caught:
                    queues |= set(await self._threads.run(self._queues.names))
                await self._catch_up(sorted(queues))
            except (LedgerError, TransientError, OSError) as error:
                self._new |= queues
                _log.warning("cannot read signals for %s; trying again: %s", self.name, error)

    async def _start(self) -> None:
        """Read the progress; a new destination starts at the end of the queues."""
        pause = FIRST_PAUSE
        while True:
            try:
                done = await self._progress.load()
                if done is None:
                    done = await self._threads.run(self._ends)
                    await self._progress.save(done)
                self._done = done
                self._new |= set(await self._threads.run(self._queues.names))
            except (LedgerError, TransientError, OSError) as error:
                _log.warning("cannot start the export to %s; trying again: %s", self.name, error)
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._wake.set()
                return

    def _ends(self) -> dict[str, int]:
        return {name: self._queues.end(name) for name in self._queues.names()}

    async def _catch_up(self, queues: list[str]) -> None:
        """Send everything that these queues have, one page at a time each."""
        while queues:
            signals, upto, queues = await self._threads.run(self._page, queues)
            if not upto:
                return
            heard = [signal for signal in signals if not signal.shadow]
            if heard:
                self.waiting_since = min(signal.detected_at for signal in heard) / 1e9
            for first in range(0, len(heard), BATCH_SIGNALS):
                await self._send(heard[first : first + BATCH_SIGNALS])
            self._done |= upto
            with trio.move_on_after(SAVE_SECONDS, shield=True):  # a repetition costs more
                await self._progress.save(dict(self._done))
            self.waiting_since = None

    def _page(self, queues: list[str]) -> tuple[list[Signal], dict[str, int], list[str]]:
        """Read a page of signals. Return them, the new progress by queue, and the queues that may
        have more; those with a full page come last."""
        signals: list[Signal] = []
        upto: dict[str, int] = {}
        share = max(BATCH_SIGNALS // len(queues), 1)
        later: list[str] = []
        for number, name in enumerate(queues):
            if len(signals) >= BATCH_SIGNALS:
                return signals, upto, queues[number:] + later
            if not self._queues.may_read(name, self._done):
                later.append(name)
                continue
            page = self._queues.read(name, self._done.get(name, 0), share)
            if page.upto > self._done.get(name, 0):
                upto[name] = page.upto
                signals += [signal for _, signal in page.signals]
            if page.more:
                later.append(name)
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
