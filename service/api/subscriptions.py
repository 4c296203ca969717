"""Live signals for event streams. A slow listener misses signals and never delays the pipeline."""

from __future__ import annotations

import trio

from betrace.service.signals import Signal

BUFFER = 1000
"""Signals that a listener may lag behind before it misses some."""


class Subscription:
    """One listener's signals."""

    def __init__(self, owner: Subscriptions, tenant: str) -> None:
        self._owner = owner
        self.tenant = tenant
        self.send, self._receive = trio.open_memory_channel[Signal](BUFFER)
        self.missed = 0

    async def receive(self) -> Signal:
        """The next signal. Raises :exc:`trio.EndOfChannel` when the stream is ended."""
        return await self._receive.receive()

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._owner.remove(self)
        self._receive.close()


class Subscriptions:
    """All listeners. Methods are called on the Trio thread."""

    def __init__(self) -> None:
        self._open: set[Subscription] = set()
        self._ended = False

    def open(self, tenant: str) -> Subscription:
        """Listen to a tenant's signals from now on. After :meth:`close` the stream ends at once."""
        subscription = Subscription(self, tenant)
        if self._ended:
            subscription.send.close()
        else:
            self._open.add(subscription)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """Forget a listener."""
        self._open.discard(subscription)

    def publish(self, signals: list[Signal]) -> None:
        """Pass signals to their tenants' listeners, except those whose buffer is full."""
        for subscription in self._open:
            for signal in signals:
                if signal.tenant == subscription.tenant:
                    try:
                        subscription.send.send_nowait(signal)
                    except trio.WouldBlock:
                        subscription.missed += 1

    def end(self, tenant: str) -> None:
        """End a tenant's streams. Listeners that are still allowed to will reconnect."""
        for subscription in [each for each in self._open if each.tenant == tenant]:
            self._open.discard(subscription)
            subscription.send.close()

    def close(self) -> None:
        """End all streams, and all that are opened later."""
        self._ended = True
        while self._open:
            self._open.pop().send.close()
