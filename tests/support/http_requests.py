"""Shared by the HTTP tests: a scripted channel and a client on a raw socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from betrace.service.api.asgi import serve
from betrace.service.pipeline.request import Done, Refused, Request


@dataclass
class ScriptedQueue:
    """Accepts requests and answers each with ``outcome`` at once (None: never)."""

    fill: float = 0.0
    room: bool = True
    outcome: Done | Refused | None = field(default_factory=lambda: Done(1))
    taken: list[Request] = field(default_factory=list)
    error: type[Exception] | None = None

    def send_nowait(self, item: Request) -> None:
        if self.error:
            raise self.error
        if not self.room:
            raise trio.WouldBlock
        self.taken.append(item)
        if self.outcome is not None:
            item.release()  # as the stage does
            item.reply.set(self.outcome)

    async def offer(self, item: Request, timeout: float) -> bool:
        await trio.sleep(timeout)
        try:
            self.send_nowait(item)
        except trio.WouldBlock:
            return False
        return True


class RawClient:
    """One connection: sends raw bytes, reads whole responses."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        with trio.fail_after(60):
            while b"\r\n\r\n" not in self.buffer:
                await self._more()
            head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = {}
            for line in lines:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            length = int(headers.get("content-length", 0))
            while len(self.buffer) < length:
                await self._more()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return int(first.split()[1]), headers, body

    async def closed(self) -> bool:
        """Whether the server closes the connection, within a minute."""
        with trio.move_on_after(60):
            try:
                while await self.stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            return True
        return False

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        if not data:
            raise ConnectionError("the server closed the connection")
        self.buffer += data


@dataclass
class Served:
    """A server on a free port of loopback."""

    url: str
    shutdown: trio.Event
    clients: list[RawClient] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def connect(self) -> RawClient:
        client = RawClient(await trio.open_tcp_stream("127.0.0.1", self.port))
        self.clients.append(client)
        return client


@asynccontextmanager
async def serving(app, **options) -> AsyncIterator[Served]:
    """Serve an application while the context is open; it must end within a minute."""
    shutdown = trio.Event()

    async def run(task_status):
        options.setdefault("grace_seconds", 2)
        await serve(app, "127.0.0.1:0", shutdown, task_status=task_status, **options)

    async with trio.open_nursery() as nursery:
        served = Served(await nursery.start(run), shutdown)
        try:
            yield served
        finally:
            for client in served.clients:
                await trio.aclose_forcefully(client.stream)
            shutdown.set()
            nursery.cancel_scope.deadline = trio.current_time() + 60
