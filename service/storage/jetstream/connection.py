"""The client of ``nats-py``, which leaves dead servers. Imported only when a client connects."""

from __future__ import annotations

from nats.aio.client import Client, Srv


class NatsConnection(Client):
    """Aborts a connection before the next one is made.

    ``nats-py`` closes it and waits until what was written has been sent, which a frozen server
    never accepts. And if a server accepts a connection but then does not answer, it only forgets
    that connection.
    """

    def abort(self) -> None:
        """Drop the connection with what was not sent yet."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _attempt_reconnect(self) -> None:
        self.abort()
        self._pending = []  # callers repeat what was not sent, and subscriptions are renewed
        self._pending_data_size = 0
        await super()._attempt_reconnect()

    async def _connect_to_server(self, s: Srv) -> None:
        self.abort()
        await super()._connect_to_server(s)
