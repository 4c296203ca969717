"""A server that reads requests and does nothing with them. An attack on it shows what the generator
of the attack costs the machine by itself.

It answers each request at once, and closes the oldest connection when there are too many.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import OrderedDict
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

HEAD_END = b"\r\n\r\n"


class _Reader(asyncio.Protocol):
    """One connection."""

    def __init__(self, opened: OrderedDict[_Reader, None], most: int, answer: bytes) -> None:
        self._opened, self._most, self._answer = opened, most, answer
        self._head = bytearray()
        self._left = 0  # of a body
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._opened[self] = None
        while len(self._opened) > self._most:
            oldest, _ = self._opened.popitem(last=False)
            assert oldest._transport is not None
            oldest._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._opened.pop(self, None)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        while data:
            if self._left:
                taken = min(self._left, len(data))
                self._left -= taken
                data = data[taken:]
            else:
                self._head += data
                end = self._head.find(HEAD_END)
                if end < 0:
                    return
                data = bytes(self._head[end + len(HEAD_END) :])
                self._left = _length(bytes(self._head[:end]))
                self._head.clear()
            if not self._left:
                self._transport.write(self._answer)


def _length(head: bytes) -> int:
    """The length of a body; endless if it is chunked."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
        if line.startswith(b"transfer-encoding:"):
            return 1 << 60
    return 0


def _run(most: int, answer_bytes: int, pipe: Connection) -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {answer_bytes}\r\n\r\n".encode()
    answer = head + bytes(answer_bytes)

    async def main() -> None:
        opened: OrderedDict[_Reader, None] = OrderedDict()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: _Reader(opened, most, answer), "127.0.0.1", 0, backlog=1024
        )
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@dataclass(slots=True)
class Sink:
    """The server, in a process of its own; use it as a context manager. ``most`` is how many
    connections may be open, ``answer_bytes`` the length of the answers' bodies."""

    most: int = 1024
    answer_bytes: int = 2
    ingest: str = ""
    api: str = ""
    _process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        self._process = context.Process(
            target=_run, args=(self.most, self.answer_bytes, other), daemon=True
        )
        self._process.start()
        self.ingest = self.api = f"http://127.0.0.1:{pipe.recv()}"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.join()
