"""Brings one destination up to date with the alerts, however often it fails in between."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from betrace.channels import Breaker, BreakerOpen, BreakerTimeout
from betrace.service.export.alerts.alert import State
from betrace.service.export.exporter import FIRST_PAUSE, LONGEST_PAUSE, Unacceptable, Unavailable
from betrace.service.storage.alert_store import AlertKey
from betrace.service.telemetry import events

LOOK_SECONDS = 1.0  # between looks at what is due to be sent again


@dataclass(frozen=True, slots=True)
class Sending:
    """A request: the alerts in it with their states and revisions, and its body."""

    alerts: tuple[tuple[AlertKey, State, int], ...]
    body: bytes


Due = Callable[[str, int], Awaitable[Sending | None]]
"""Returns what a destination should get next, at a time."""
Accepted = Callable[[str, Sending, int], Awaitable[None]]
"""Notes that a destination has it."""


class AlertSender:
    """Sends to the destination ``name``. ``post`` raises :exc:`Unavailable` or
    :exc:`Unacceptable`."""

    def __init__(
        self,
        name: str,
        post: Callable[[bytes], Awaitable[None]],
        due: Due,
        accepted: Accepted,
        breaker: Breaker,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.name = name
        self.breaker = breaker
        self._post = post
        self._due = due
        self._accepted = accepted
        self._clock_ns = clock_ns
        self._wake = trio.Event()
        self._failing = 0
        self.sent = 0
        """Alerts that the destination accepted since the start, repetitions included."""
        self.rejected = 0
        """Alerts that it will never accept."""
        self.failures = 0
        """Failed requests that were retried."""

    def wake(self) -> None:
        """Note that alerts changed."""
        self._wake.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            sending = await self._due(self.name, self._clock_ns())
            if sending is None:
                with trio.move_on_after(LOOK_SECONDS):
                    await self._wake.wait()
                self._wake = trio.Event()
            else:
                await self._send(sending)

    async def _send(self, sending: Sending) -> None:
        """Send, and wait after a failure; what is due is then determined anew."""
        try:
            await self.breaker.call(self._post, sending.body)
        except Unacceptable as error:
            self.rejected += len(sending.alerts)
            tenant, rule = sending.alerts[0][0]
            events.ALERT_REJECTED(destination=self.name, tenant=tenant, rule=rule, error=error)
        except BreakerOpen as refused:
            await _pause(LONGEST_PAUSE if math.isinf(refused.retry_in) else refused.retry_in)
            return
        except (Unavailable, BreakerTimeout) as error:
            self._note(error)
            wait = min(FIRST_PAUSE * 2 ** min(self._failing - 1, 10), LONGEST_PAUSE)
            if isinstance(error, Unavailable):
                wait = max(wait, min(error.retry_after, LONGEST_PAUSE))
            await _pause(wait)
            return
        else:
            self.sent += len(sending.alerts)
            self._note(None)
        await self._accepted(self.name, sending, self._clock_ns())

    def _note(self, error: Exception | None) -> None:
        if error is not None:
            self.failures += 1
            if not self._failing:
                events.ALERTS_FAILING(destination=self.name, error=error)
            self._failing += 1
        elif self._failing:
            events.ALERTS_WORK(destination=self.name, failures=self._failing)
            self._failing = 0


async def _pause(seconds: float) -> None:
    await trio.sleep(seconds * random.uniform(0.8, 1.2))
