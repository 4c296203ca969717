"""What a connection of the ingestion listener reads from and writes to: a socket, or TLS over one.

The socket is used directly and not through ``trio.socket``, where each operation is a checkpoint
and costs a turn of the scheduler even if the kernel has the result at once. Here a task waits only
for data that is not there yet, so callers must make sure that each of their loops waits for
something.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import trio

from betrace.service.config.base import KIB, MIB

READ_BYTES: Final = 64 * KIB
_LOW_WATER_BYTES: Final = MIB
_CLOSE_SECONDS: Final = 1.0


Claim = Callable[[int], bool]
"""Called after each part with the total bytes of the body that have arrived; returns whether to
continue."""


class Transport(Protocol):
    """The bytes of one connection. All methods raise :exc:`OSError` or
    :exc:`trio.BrokenResourceError` if the connection fails."""

    @property
    def peer(self) -> str:
        """The client's address, without its port."""
        ...

    async def receive(self) -> bytes:
        """Wait for data and return at most ``READ_BYTES``; empty at the end."""
        ...

    async def receive_body(
        self, start: bytes, length: int, claim: Claim
    ) -> bytes | memoryview | None:
        """The ``length`` bytes that begin with ``start``; None if the connection ends first or
        ``claim`` returns False."""
        ...

    async def send(self, data: bytes) -> None:
        """Send all of ``data``."""
        ...

    async def end(self) -> None:
        """Signal to the peer that nothing more will be sent."""
        ...

    async def close(self) -> None:
        """Close, within a second."""
        ...


class SocketTransport:
    """A connected non-blocking TCP socket."""

    __slots__ = ("_descriptor", "_low_water", "_socket")

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._descriptor = connected.fileno()
        self._low_water = 1

    @property
    def peer(self) -> str:
        """See :class:`Transport`."""
        return peer_of(self._socket)

    async def receive(self) -> bytes:
        """See :class:`Transport`."""
        if self._low_water != 1:
            self._wake_at(1)
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            try:
                return self._socket.recv(READ_BYTES)
            except BlockingIOError:
                continue

    async def receive_body(
        self, start: bytes, length: int, claim: Claim
    ) -> bytes | memoryview | None:
        """See :class:`Transport`.

        The rest is read straight into a buffer of the whole length, whose memory is not touched
        before bytes arrive. SO_RCVLOWAT lets the task sleep until all of it (at most
        ``_LOW_WATER_BYTES``) has arrived; the kernel grows its buffer to that size.
        """
        buffer = np.empty(length, np.uint8).data
        position = len(start)
        buffer[:position] = start
        while True:
            try:
                received = self._socket.recv_into(buffer[position:])
            except BlockingIOError:
                self._wake_at(min(length - position, _LOW_WATER_BYTES))
                await trio.lowlevel.wait_readable(self._descriptor)
                continue
            if not received:
                return None
            position += received
            if not claim(position):
                return None
            if position == length:
                return buffer

    def _wake_at(self, bytes_waiting: int) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, bytes_waiting)
        self._low_water = bytes_waiting

    async def send(self, data: bytes) -> None:
        """See :class:`Transport`."""
        sent = 0
        while True:
            try:
                sent += self._socket.send(data[sent:] if sent else data)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._descriptor)
                continue
            if sent == len(data):
                return

    async def end(self) -> None:
        """See :class:`Transport`."""
        self._socket.shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        """See :class:`Transport`."""
        trio.lowlevel.notify_closing(self._descriptor)
        self._socket.close()


class TlsTransport:
    """TLS over a connected socket."""

    __slots__ = ("_stream",)

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream

    @property
    def peer(self) -> str:
        """See :class:`Transport`."""
        return peer_of(self._stream.transport_stream.socket)

    async def handshake(self) -> None:
        """See :class:`Transport`."""
        await self._stream.do_handshake()

    async def receive(self) -> bytes:
        """See :class:`Transport`."""
        return bytes(await self._stream.receive_some(READ_BYTES))

    async def receive_body(
        self, start: bytes, length: int, claim: Claim
    ) -> bytes | memoryview | None:
        """See :class:`Transport`."""
        parts = [start]
        missing = length - len(start)
        while missing:
            part = await self._stream.receive_some(min(missing, READ_BYTES))
            if not part:
                return None
            parts.append(bytes(part))
            missing -= len(part)
            if not claim(length - missing):
                return None
        return b"".join(parts)

    async def send(self, data: bytes) -> None:
        """See :class:`Transport`."""
        await self._stream.send_all(data)

    async def end(self) -> None:
        """Does nothing, because little could be received after a TLS close."""

    async def close(self) -> None:
        """See :class:`Transport`."""
        with trio.move_on_after(_CLOSE_SECONDS):
            await self._stream.aclose()


def peer_of(connected: socket.socket | trio.socket.SocketType) -> str:
    """The address at the other end of a socket, without its port."""
    try:
        return str(connected.getpeername()[0])
    except OSError:
        return "a client that is gone"
