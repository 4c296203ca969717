"""Memory for the bodies of requests to the API, shared between tenants.

A body is counted while it arrives and until its request is answered. One tenant may have half of
the memory, all tenants together seven eighths; the rest is for operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import Any

from betrace.service.api.asgi import App, Receive, Scope, Send
from betrace.service.api.errors import ApiError
from betrace.service.config.base import MIB
from betrace.service.tenancy.authentication import Authenticator, claimed_tenant

MOST_BUFFERED = 64 * MIB
"""Bytes of the bodies of all requests in progress."""
OPERATOR = ""
UNKNOWN = "?"
"""Stands for all callers that are not known yet, or that must not send anything."""
_OPERATORS_PATHS = "/api/admin/"


class BodyShares:
    """How many bytes each caller has in memory. Call the methods on the Trio thread."""

    def __init__(self, capacity: int = MOST_BUFFERED) -> None:
        self._capacity = capacity
        self.used: Counter[str] = Counter()

    def admits(self, caller: str) -> bool:
        """Whether what ``caller`` has is within its share."""
        total = self.used.total()
        if caller == OPERATOR:
            return total <= self._capacity
        return (
            total - self.used[OPERATOR] <= self._capacity - self._capacity // 8
            and total <= self._capacity
            and self.used[caller] <= self._capacity // 2
        )

    def take(self, caller: str, size: int) -> None:
        """Count bytes that have arrived."""
        self.used[caller] += size

    def release(self, caller: str, size: int) -> None:
        """Count bytes that are no longer needed."""
        self.used[caller] -= size
        if not self.used[caller]:
            del self.used[caller]


def bounded(
    app: App, shares: BodyShares, authenticator: Authenticator | None, closed: Container[str]
) -> App:
    """The application; a request beyond its caller's share gets 503 while its body arrives."""

    async def shared(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        caller: str | None = None
        own = 0
        refused = False

        async def counted() -> dict[str, Any]:
            nonlocal caller, own, refused
            message = await receive()
            size = len(message.get("body", b""))
            if size:
                if caller is None:
                    caller = await caller_of(scope, authenticator, closed)
                own += size
                shares.take(caller, size)
                if not refused and not shares.admits(caller):
                    refused = True
                    await _send_busy(send)
            return {"type": "http.disconnect"} if refused else message

        async def answer(message: dict[str, Any]) -> None:
            if not refused:
                await send(message)

        try:
            await app(scope, counted, answer)
        finally:
            if caller is not None:
                shares.release(caller, own)

    return shared


async def caller_of(
    scope: Scope, authenticator: Authenticator | None, closed: Container[str]
) -> str:
    """Whose share a request uses. Tokens that were not verified yet share one: the request itself
    gets them verified, so that the next one has a share of its own."""
    authorization = _header(scope, b"authorization")
    named = _header(scope, b"x-scope-orgid")
    if authenticator is not None:
        if authorization is None:
            return UNKNOWN
        if await authenticator.operator(authorization) is None:
            return OPERATOR
        return authenticator.remembered(authorization) or UNKNOWN
    if scope["path"].startswith(_OPERATORS_PATHS):
        return OPERATOR
    tenant = claimed_tenant(named)
    return tenant if isinstance(tenant, str) and tenant not in closed else UNKNOWN


def _header(scope: Scope, name: bytes) -> str | None:
    values = [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]
    return ", ".join(values) if values else None


async def _send_busy(send: Send) -> None:
    error = ApiError(
        503,
        "too many request bodies are arriving",
        "send the request again later",
        {"retry-after": "5", "connection": "close", "content-type": "application/json"},
    )
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.body()})
