"""Stands between the shop and the edges, like an OpenTelemetry Collector: takes each request and
sends it to one edge after the other until one acknowledges it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import httpx
import trio

from betrace.service.api.asgi import Receive, Scope, Send, lifespan, serve

_TIMEOUT_SECONDS = 30.0
_PAUSE_SECONDS = 0.2  # after all edges have refused
_REJECTED = (400, 413)


class Collector:
    """``edges`` returns the URLs of the edges, also of those that do not run now."""

    def __init__(self, edges: Callable[[], list[str]]) -> None:
        self._edges = edges
        self._taken = 0
        self._nursery: trio.Nursery
        self._client: httpx.AsyncClient
        self.acknowledged = 0
        self.rejected = 0
        """Requests that an edge rejected for good, which does not happen with valid spans."""
        self.repeated = 0
        """Attempts that failed, so that the request was sent again."""

    @property
    def waiting(self) -> int:
        """Requests that no edge has acknowledged yet."""
        return self._taken - self.acknowledged - self.rejected

    async def run(self, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Take requests until cancelled; starts with the URL."""
        async with (
            httpx.AsyncClient(trust_env=False, timeout=_TIMEOUT_SECONDS) as self._client,
            trio.open_nursery() as self._nursery,
        ):
            await serve(self, "127.0.0.1:0", trio.Event(), task_status=task_status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        kept = ("content-type", "content-encoding")
        headers = {n.decode(): v.decode() for n, v in scope["headers"] if n.decode() in kept}
        self._taken += 1
        self._nursery.start_soon(self._deliver, body, headers, self._taken)
        start: dict[str, Any] = {"type": "http.response.start", "status": 200}
        await send(start | {"headers": [(b"content-type", b"application/x-protobuf")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _deliver(self, body: bytes, headers: dict[str, str], number: int) -> None:
        for attempt in count(number):
            edges = self._edges()
            if edges:
                url = f"{edges[attempt % len(edges)]}/v1/traces"
                try:
                    response = await self._client.post(url, content=body, headers=headers)
                except httpx.HTTPError:
                    pass
                else:
                    if response.status_code == 200:
                        self.acknowledged += 1
                        return
                    if response.status_code in _REJECTED:
                        self.rejected += 1
                        return
                self.repeated += 1
            if not edges or (attempt - number) % len(edges) == len(edges) - 1:
                await trio.sleep(_PAUSE_SECONDS)
