"""Tells readers that there may be something new, by core NATS messages that are not stored.

A wakeup may be lost or come too early (a replica may be behind), so readers also look from time to
time. Nothing depends on wakeups but latency.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

_UNUSED_SECONDS = 30.0


class Sink(asyncio.Future[Any]):
    """Receives all messages of a subscription, by a call from the parser of ``nats-py``, which
    takes it for a future."""

    def __init__(self, receive: Callable[[Msg], None]) -> None:
        super().__init__()
        self._receive = receive

    def set_result(self, result: Msg) -> None:
        self._receive(result)


class Bell:
    """Counts the messages on a subject."""

    def __init__(self) -> None:
        self.count = 0
        self.used = 0.0
        self.subscription: Subscription | None = None
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        self.count += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def wait(self, count: int, seconds: float) -> bool:
        """Wait until the count differs from ``count``, at most ``seconds``; whether it does."""
        if self.count == count:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._waiting.add(future)
            timer = loop.call_later(seconds, _wake, future)
            try:
                await future
            finally:
                timer.cancel()
                self._waiting.discard(future)
        return self.count != count


class Wakeups:
    """The bells of a connection, by subject. Belongs to the thread of its loop."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._loop = asyncio.get_running_loop()
        self._bells: dict[str, Bell] = {}

    async def bell(self, subject: str) -> Bell:
        """The bell that rings for messages on ``subject``, until nobody has asked for it for 30
        seconds."""
        bell = self._bells.get(subject)
        if bell is None:
            bell = self._bells[subject] = Bell()

            def receive(message: Msg) -> None:
                if self._loop.time() - bell.used < _UNUSED_SECONDS:
                    bell.ring()
                else:
                    self._forget(subject, bell)

            bell.used = self._loop.time()
            bell.subscription = await self._nc.subscribe(subject, future=Sink(receive))
        bell.used = self._loop.time()
        return bell

    def _forget(self, subject: str, bell: Bell) -> None:
        subscription = bell.subscription
        if subscription is not None and self._bells.pop(subject, None) is not None:
            bell.subscription = None
            task = self._loop.create_task(subscription.unsubscribe())
            task.add_done_callback(_ignore_errors)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _ignore_errors(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()
