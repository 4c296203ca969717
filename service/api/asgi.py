"""Serves ASGI applications, the API and the metrics, with Hypercorn on Trio."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import wrap_app

from betrace.service.config.base import KIB
from betrace.service.config.edge import Tls
from betrace.service.receiver.sockets import (
    EXHAUSTED,
    bad_certificate,
    listen,
    most_connections,
    url_of,
)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_DESCRIPTOR_SHARE = 8  # one in so many files that the process may open
_EXHAUSTED_PAUSE = 0.5

_log = logging.getLogger("service.http")
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
    max_connections: int = 512,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application at ``address`` until ``shutdown``, then give requests in progress
    ``grace_seconds`` to finish. Starts with the URL of the listener. Above ``max_connections``, the
    connection idle longest is closed for the next one.

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
    wrapped = wrap_app(_closing(app, shutdown), 0, "asgi")
    server = _ApiServer(wrapped, config, most_connections(max_connections, _DESCRIPTOR_SHARE))
    async with trio.open_nursery() as around:
        # Connections are accepted here, because Hypercorn's worker does not limit them.
        lifespan = Lifespan(wrapped, config, {})
        await around.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        async with trio.open_nursery() as connections:
            accepting = trio.CancelScope()
            connections.start_soon(server.accept, listener, connections, accepting)
            task_status.started(url)
            await shutdown.wait()
            accepting.cancel()
            await server.context.terminated.set()
            server.end_unused()
            connections.cancel_scope.deadline = trio.current_time() + grace_seconds
        await lifespan.wait_for_shutdown()
        around.cancel_scope.cancel()


class _Connection(TCPServer):
    """Hypercorn's connection. It ends when the client closes it, not when the idle time is over,
    and knows since when it is idle (None while a request is processed)."""

    def __init__(self, server: _ApiServer, stream: Any) -> None:
        super().__init__(
            server.app,
            server.config,
            server.context,
            ConnectionState({}),
            stream,  # type: ignore[arg-type]
        )
        self.idle_since: float | None = trio.current_time()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self.idle_since = trio.current_time() if event.idle else None
        await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()


class _Place:
    """A place among the connections of a listener. Hypercorn's connection takes a millisecond to
    set up, so it begins when the client sends something."""

    def __init__(self, connected: trio.socket.SocketType) -> None:
        self.connected = connected
        self.scope = trio.CancelScope()
        self.connection: _Connection | None = None
        self._since = trio.current_time()

    @property
    def idle_since(self) -> float | None:
        """Since when the connection is idle; None while a request is processed."""
        return self._since if self.connection is None else self.connection.idle_since

    async def has_begun(self, seconds: float) -> bool:
        """Wait until the client sends something; returns False if it closes the connection, or
        sends nothing for ``seconds``."""
        with trio.move_on_after(seconds), suppress(OSError):
            return bool(await self.connected.recv(1, socket.MSG_PEEK))
        return False


class _ApiServer:
    """The open connections of one listener."""

    def __init__(self, app: AppWrapper, config: Config, most: int) -> None:
        self.app = app
        self.config = config
        self.context = WorkerContext(None)
        self._ssl = config.create_ssl_context()
        self._most = most
        self._connections: set[_Place] = set()
        self._ended = trio.Event()

    async def accept(
        self, listener: socket.socket, nursery: trio.Nursery, scope: trio.CancelScope
    ) -> None:
        """Accept connections until ``scope`` is cancelled, then close ``listener``."""
        accepting = trio.socket.from_stdlib_socket(listener)
        with accepting, scope:
            while True:
                if len(self._connections) >= self._most:
                    await trio.lowlevel.wait_readable(accepting)
                    self._close_idle()
                    self._ended = trio.Event()
                    with trio.move_on_after(_EXHAUSTED_PAUSE):
                        await self._ended.wait()
                    continue
                try:
                    connected, _ = await accepting.accept()
                except OSError as error:
                    if error.errno in EXHAUSTED:
                        _log.warning(
                            "no connection can be accepted now (%s); raise the limit of open "
                            "files, or lower api.max_connections",
                            error.strerror,
                        )
                        self._close_idle()
                        await trio.sleep(_EXHAUSTED_PAUSE)
                    continue
                place = _Place(connected)
                self._connections.add(place)
                nursery.start_soon(self._run, place)

    def _close_idle(self) -> None:
        idle = [each for each in self._connections if each.idle_since is not None]
        if idle:
            min(idle, key=lambda each: each.idle_since or 0.0).scope.cancel()

    def end_unused(self) -> None:
        """End the connections whose clients have sent nothing, because the service stops."""
        for place in self._connections:
            if place.connection is None:
                place.scope.cancel()

    async def _run(self, place: _Place) -> None:
        try:
            with place.scope:
                if await place.has_begun(self.config.keep_alive_timeout):
                    place.connection = _Connection(self, self._stream(place.connected))
                    await place.connection.run()
        except Exception:
            _log.exception("a connection of the API failed and is closed")
        finally:
            self._connections.discard(place)
            self._ended.set()
            if place.connection is None:
                place.connected.close()
            else:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(place.connection.stream)

    def _stream(self, connected: trio.socket.SocketType) -> Any:
        stream = trio.SocketStream(connected)
        if self._ssl is None:
            return stream
        return trio.SSLStream(stream, self._ssl, server_side=True, https_compatible=True)


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
