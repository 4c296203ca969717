"""Tells readers that there may be something new, by core NATS messages that are not stored.

A wakeup may be lost or come too early (a replica may be behind), so readers also look from time to
time. Nothing depends on wakeups but latency.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

_UNUSED_SECONDS = 30.0
ANY = -1


class Sink(asyncio.Future[Any]):
    """Receives all messages of a subscription, by a call from the parser of ``nats-py``, which
    takes it for a future."""

    def __init__(self, receive: Callable[[Msg], None]) -> None:
        super().__init__()
        self._receive = receive

    def set_result(self, result: Msg) -> None:
        self._receive(result)


class Wakeup(NamedTuple):
    """What readers wait for: any message on a subject, or one that names this number."""

    subject: str
    number: int = ANY


def naming(numbers: Iterable[int]) -> bytes:
    """The message on a subject that names these numbers."""
    return ",".join(map(str, numbers)).encode()


class Bell:
    """Counts the messages that a :class:`Wakeup` waits for."""

    def __init__(self) -> None:
        self.count = 0
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


class _Subject:
    """The bells of a subject, by number."""

    def __init__(self) -> None:
        self.bells: dict[int, Bell] = {}
        self.used = 0.0
        self.subscription: Subscription | None = None

    def ring(self, data: bytes) -> None:
        if ANY in self.bells:
            self.bells[ANY].ring()
            return
        for number in data.split(b","):
            bell = self.bells.get(int(number)) if number.isdigit() else None
            if bell is not None:
                bell.ring()


class Wakeups:
    """The bells of a connection. Belongs to the thread of its loop."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._loop = asyncio.get_running_loop()
        self._subjects: dict[str, _Subject] = {}

    async def bell(self, wakeup: Wakeup) -> Bell:
        """The bell that rings for a wakeup. The bells of a subject stop ringing once nobody has
        asked for one for 30 seconds."""
        subject = self._subjects.get(wakeup.subject)
        if subject is not None:
            subject.used = self._loop.time()
            return subject.bells.setdefault(wakeup.number, Bell())
        subject = self._subjects[wakeup.subject] = _Subject()
        subject.used = self._loop.time()
        bell = subject.bells[wakeup.number] = Bell()
        name, found = wakeup.subject, subject

        def receive(message: Msg) -> None:
            if self._loop.time() - found.used < _UNUSED_SECONDS:
                found.ring(message.data)
            else:
                self._forget(name, found)

        subject.subscription = await self._nc.subscribe(name, future=Sink(receive))
        return bell

    def _forget(self, name: str, subject: _Subject) -> None:
        subscription = subject.subscription
        if subscription is not None and self._subjects.pop(name, None) is not None:
            subject.subscription = None
            task = self._loop.create_task(subscription.unsubscribe())
            task.add_done_callback(_ignore_errors)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _ignore_errors(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()
