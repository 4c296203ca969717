"""Ingestion as a bare ASGI application, for ``ingest.server = "hypercorn"``.

It uses no framework, because at these rates even Hypercorn alone dominates the cost. Hypercorn
sends ``100 Continue`` before the application runs; a refusal follows as the final response.
"""

from __future__ import annotations

import trio

from betrace.service.api.asgi import App, Receive, Scope, Send, lifespan
from betrace.service.config.base import MIB
from betrace.service.config.settings import Ingest
from betrace.service.receiver.admission import Edge
from betrace.service.receiver.responses import HttpResponse

# After a refusal the rest of the body is read and dropped, within these limits, because closing a
# connection with unread data resets it, and the client may lose the response (RFC 9112, 9.6).
_LINGER_BYTES = 32 * MIB
_LINGER_SECONDS = 2.0


def ingest_app(edge: Edge, settings: Ingest) -> App:
    """The ASGI application that passes requests to ``edge``."""
    timeout = settings.body_timeout_seconds

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await lifespan(receive, send)
            return
        if kind != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        head = await edge.admit(scope["method"], scope["path"], scope["headers"])
        if isinstance(head, HttpResponse):
            await _refuse(head, receive, send)
            return
        with edge.body(head) as body:
            refusal: HttpResponse | None = None
            complete = False
            with trio.move_on_after(timeout):
                while not complete and refusal is None:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    refusal = body.feed(message["body"])
                    complete = not message["more_body"]
            if refusal is None and not complete:
                await _send(edge.slow_body(head), send)
            elif refusal is None:
                await _send(await edge.handle(head, body.take()), send)
        if refusal is not None:
            await _refuse(refusal, receive, send, complete)

    return app


async def _send(response: HttpResponse, send: Send, more: bool = False) -> None:
    start = {"type": "http.response.start", "status": response.status, "headers": response.headers}
    await send(start)
    await send({"type": "http.response.body", "body": response.body, "more_body": more})


async def _refuse(
    response: HttpResponse, receive: Receive, send: Send, complete: bool = False
) -> None:
    await _send(response, send, more=True)
    dropped = 0
    with trio.move_on_after(_LINGER_SECONDS):
        while not complete and dropped <= _LINGER_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            dropped += len(message["body"])
            complete = not message["more_body"]
    await send({"type": "http.response.body", "body": b"", "more_body": False})
