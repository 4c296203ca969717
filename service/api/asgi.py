"""The ingestion edge as a bare ASGI application, and how both listeners are served.

No framework: at these rates Hypercorn alone is the cost that counts. Hypercorn sends ``100
Continue`` by itself before the application runs; the refusal follows as the final response.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app

from betrace.service.config.base import KIB, MIB
from betrace.service.config.edge import Ingest, Tls
from betrace.service.receiver.admission import Edge
from betrace.service.receiver.responses import HttpResponse
from betrace.service.receiver.sockets import ListenError, bad_certificate, listen, url_of

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# After a refusal the rest of the body is read and dropped, within these limits: closing a
# connection with unread data resets it, and the client may lose the response (RFC 9112, 9.6).
_LINGER_BYTES = 32 * MIB
_LINGER_SECONDS = 2.0

_server_log = logging.getLogger("service.http.hypercorn")

__all__ = ["App", "ListenError", "Receive", "Scope", "Send", "ingest_app", "lifespan", "serve"]


def ingest_app(edge: Edge, settings: Ingest) -> App:
    """The ASGI application that hands requests to ``edge``."""
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


async def lifespan(receive: Receive, send: Send) -> None:
    """The ASGI lifespan protocol of an application that has nothing to set up."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


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


async def serve(
    app: Any,
    address: str,
    shutdown: trio.Event,
    *,
    tls: Tls | None = None,
    keep_alive_seconds: float = 75,
    grace_seconds: float = 30,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application at ``address`` until ``shutdown``, then let requests in progress
    finish for ``grace_seconds``. Starts with the URL listened on.

    Raises :exc:`ListenError` when the address or the certificate cannot be used.
    """
    config = Config()
    config.errorlog = _server_log
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_timeout = keep_alive_seconds
    config.keep_alive_max_requests = 1 << 40
    config.graceful_timeout = grace_seconds
    config.ssl_handshake_timeout = 10
    config.h11_max_incomplete_size = 32 * KIB
    config.h2_max_header_list_size = 32 * KIB
    if tls is not None and tls.certificate:
        config.certfile, config.keyfile = tls.certificate, tls.key
        try:
            config.create_ssl_context()
        except OSError as error:
            raise bad_certificate(tls.certificate, tls.key, error) from error
    listener = listen(address)
    url = url_of(listener, tls=config.ssl_enabled)
    sockets = Sockets([listener], [], []) if config.ssl_enabled else Sockets([], [listener], [])
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                worker_serve,
                wrap_app(_closing(app, shutdown), 0, "asgi"),
                config,
                sockets=sockets,
                shutdown_trigger=shutdown.wait,
            )
        )
        task_status.started(url)


def _closing(app: Any, stopping: trio.Event) -> Any:
    """Have responses over HTTP/1 that begin while ``stopping`` say that their connection ends."""

    async def closing(scope: Scope, receive: Receive, send: Send) -> None:
        async def say(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and stopping.is_set():
                kept = [
                    (name, value) for name, value in message["headers"] if name != b"connection"
                ]
                message = {**message, "headers": [*kept, (b"connection", b"close")]}
            await send(message)

        http1 = scope["type"] == "http" and scope["http_version"] in ("1.0", "1.1")
        await app(scope, receive, say if http1 else send)

    return closing
