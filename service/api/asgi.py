"""Serves ASGI applications, the API and the metrics, with Hypercorn on Trio."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app

from betrace.service.config.base import KIB
from betrace.service.config.edge import Tls
from betrace.service.receiver.sockets import bad_certificate, listen, url_of

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_server_log = logging.getLogger("service.http.hypercorn")


async def lifespan(receive: Receive, send: Send) -> None:
    """The ASGI lifespan protocol for an application without setup."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


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
    """Serve an ASGI application at ``address`` until ``shutdown``, then give requests in progress
    ``grace_seconds`` to finish. Starts with the URL of the listener.

    Raises :exc:`~betrace.service.receiver.sockets.ListenError` if the address or the certificate
    cannot be used.
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
    """Send ``connection: close`` with HTTP/1 responses that start while ``stopping``."""

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
