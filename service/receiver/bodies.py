"""The memory of bodies that arrive or wait, shared between tenants."""

from __future__ import annotations

from typing import Self

import trio

from betrace.service.config.edge import Ingest
from betrace.service.receiver.heads import Head
from betrace.service.receiver.refusals import Refusals
from betrace.service.receiver.responses import HttpResponse
from betrace.service.receiver.shares import Shares


class Bodies:
    """What all bodies together take, and how many requests have one."""

    __slots__ = ("_settled", "max_bytes", "refusals", "requests", "shares")

    def __init__(self, settings: Ingest, refusals: Refusals) -> None:
        self.refusals = refusals
        self.max_bytes = settings.max_body_bytes
        """Of one body."""
        self.shares = Shares(settings.max_buffered_bytes, settings.refuse_above)
        self.requests = 0
        """Requests that are admitted and not answered."""
        self._settled: trio.Event | None = None

    async def settled(self) -> None:
        """Return when every admitted request is answered, or its client is gone."""
        if self.requests:
            self._settled = trio.Event()
            await self._settled.wait()

    def leave(self) -> None:
        """Note that a request is answered."""
        self.requests -= 1
        if self._settled is not None and not self.requests:
            self._settled.set()


class Body:
    """Collects the body of one request, within the limits for one body and for all together."""

    __slots__ = ("_bodies", "_chunks", "_head", "_reserved", "_size")

    def __init__(self, bodies: Bodies, head: Head) -> None:
        self._bodies = bodies
        self._head = head
        self._chunks: list[bytes] = []
        self._size = 0
        self._reserved = 0

    def __enter__(self) -> Self:
        self._bodies.requests += 1
        return self

    def __exit__(self, *_: object) -> None:
        if self._reserved:
            self._bodies.shares.release(self._head.tenant, self._reserved)
            self._reserved = 0
        self._chunks.clear()
        self._bodies.leave()

    def feed(self, chunk: bytes) -> HttpResponse | None:
        """Add the next part; returns the response that refuses the request, or None."""
        self._size += len(chunk)
        refusal = self.reserve(self._size)
        if refusal is None:
            self._chunks.append(chunk)
        return refusal

    def reserve(self, size: int) -> HttpResponse | None:
        """Claim memory for ``size`` bytes in total; returns the response that refuses the request,
        or None. For a listener that keeps the parts itself. Memory is claimed for bytes that have
        arrived, not for announced ones, so that a client that announces much and sends little does
        not keep others out."""
        bodies = self._bodies
        if size > bodies.max_bytes:
            return bodies.refusals.too_large(self._head)
        claim = size - self._reserved
        if claim > 0:
            if not bodies.shares.admits(self._head.tenant, claim):
                return bodies.refusals.overloaded(self._head, "memory")
            bodies.shares.take(self._head.tenant, claim)
            self._reserved += claim
        return None

    def take(self) -> bytes:
        """The whole body. Its memory stays reserved until the context ends."""
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
