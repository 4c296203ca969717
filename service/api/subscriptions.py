"""Signals as they are stored, for those who listen. A slow listener misses signals, never delays
the pipeline."""

from __future__ import annotations

from typing import Any

import trio

from betrace.service.signals import Signal

BUFFER = 1000  # signals that a listener may be behind


class Subscription:
    """One listener's signals."""

    def __init__(
        self,
        owner: Subscriptions,
        tenant: str,
        send: trio.MemorySendChannel[dict[str, Any]],
        receive: trio.MemoryReceiveChannel[dict[str, Any]],
    ) -> None:
        self._owner = owner
        self._receive = receive
        self.tenant = tenant
        self.send = send
        self.missed = 0

    async def receive(self) -> dict[str, Any]:
        """The next signal. Raises :exc:`trio.EndOfChannel` when the service stops."""
        return await self._receive.receive()

    def close(self) -> None:
        """Listen no more."""
        self._owner.remove(self)
        self._receive.close()


class TooManyStreams(Exception):  # noqa: N818
    """As many listeners as are allowed are there already."""


class Subscriptions:
    """All listeners, at most ``limit``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[Subscription] = set()
        self._ended = False

    def open(self, tenant: str) -> Subscription:
        """Listen to a tenant's signals from now on; after :meth:`close` the stream ends at once.
        Raises :exc:`TooManyStreams`."""
        if len(self._open) >= self._limit:
            raise TooManyStreams(f"{self._limit} streams are open already; close one first")
        send, receive = trio.open_memory_channel[dict[str, Any]](BUFFER)
        subscription = Subscription(self, tenant, send, receive)
        if self._ended:
            send.close()
        else:
            self._open.add(subscription)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """Forget a listener."""
        self._open.discard(subscription)

    def publish(self, signals: list[Signal]) -> None:
        """Tell the listeners; those too far behind miss it."""
        for subscription in self._open:
            for signal in signals:
                if signal.tenant == subscription.tenant:
                    try:
                        subscription.send.send_nowait(signal.to_json())
                    except trio.WouldBlock:
                        subscription.missed += 1

    def end(self, tenant: str) -> None:
        """End the streams of a tenant; who may still listen opens them again."""
        for subscription in [each for each in self._open if each.tenant == tenant]:
            self._open.discard(subscription)
            subscription.send.close()

    def close(self) -> None:
        """End all streams."""
        self._ended = True
        while self._open:
            self._open.pop().send.close()
