"""The ingestion listener: HTTP/1.1 for
:class:`~betrace.service.receiver.admission.Admission`, without a framework
(docs/decisions/0008-ingestion-listener.md).

Connections are accepted, counted, timed and closed here; :mod:`betrace.service.receiver.connection`
serves one connection.
"""

from __future__ import annotations

import logging
import math
import socket
import ssl
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from betrace.service.config.edge import Ingest, Tls
from betrace.service.receiver.admission import Admission
from betrace.service.receiver.client_errors import ClientErrors
from betrace.service.receiver.connection import Connection
from betrace.service.receiver.cors import Cors
from betrace.service.receiver.known_heads import KnownHeads
from betrace.service.receiver.limits import Limits
from betrace.service.receiver.sockets import (
    EXHAUSTED,
    bad_certificate,
    listen,
    most_connections,
    url_of,
)
from betrace.service.receiver.transport import SocketTransport, TlsTransport, Transport

_EXHAUSTED_PAUSE: Final = 0.5
_SWEEP_SECONDS: Final = 1.0
_ROOM_SECONDS: Final = 0.1  # between two attempts to make room
_ACCEPTED_AT_ONCE: Final = 32  # connections accepted before other tasks run
_ROOM_SHARE: Final = 16  # at most one in so many connections is ended at once to make room
_DESCRIPTOR_SHARE: Final = 3  # one in so many files that the process may open
# A request that has not arrived after this long is slow, and makes room for others.
_SLOW_SECONDS: Final = 1.0
# Fraction of the grace period in which requests may arrive; the rest is for processing the last.
ARRIVAL_SHARE: Final = 0.75

_log = logging.getLogger("service.http")


class AnyConnection(typing.Protocol):
    """One connection of a listener: it ends by itself, or on request."""

    peer: str
    """The address of the client."""

    @property
    def proven(self) -> bool:
        """Whether the client has sent a request."""
        ...

    @property
    def slow_since(self) -> float:
        """When what is arriving now began to arrive, on Trio's clock; infinity if nothing is."""
        ...

    @property
    def deadline(self) -> float:
        """When :meth:`expire` is due, on Trio's clock."""
        ...

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        ...

    def expire(self) -> None:
        """The deadline has passed, or room is needed for another connection."""
        ...

    def abandon(self) -> None:
        """End at once, without an answer, because other connections need its place."""
        ...

    def retire(self) -> None:
        """The service stops: end when requests in progress are answered."""
        ...

    def give_up(self) -> None:
        """Refuse what is still arriving."""
        ...

    async def run(self) -> None:
        """Serve it until its end."""
        ...


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is spoken: its name in ALPN, and what serves a connection."""

    alpn: str
    connection: Callable[[Transport, Admission, Limits, ClientErrors], AnyConnection]


def http(settings: Ingest) -> Protocol:
    """HTTP/1.1. Preflights of browsers are answered whatever ``ingest.cors_origins`` is."""
    cors = Cors(settings.cors_origins)
    return Protocol("http/1.1", partial(Connection, cors=cors, heads=KnownHeads()))


async def serve_ingest(
    admission: Admission,
    settings: Ingest,
    address: str,
    shutdown: trio.Event,
    *,
    tls: Tls | None = None,
    grace_seconds: float = 30,
    protocol: Protocol | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Pass requests that arrive at ``address`` to ``admission`` until ``shutdown``. Then requests
    in progress may finish for ``grace_seconds``; requests still arriving after ``ARRIVAL_SHARE``
    of that are refused. ``protocol`` is HTTP/1.1 by default. Starts with the URL listened on.

    Raises :exc:`~betrace.service.receiver.sockets.ListenError` if the address or the certificate
    cannot be used.
    """
    protocol = protocol or http(settings)
    context = None
    if tls is not None and tls.certificate:
        context = _tls_context(tls, protocol.alpn)
    listener = listen(address)
    server = _Server(admission, settings, context, protocol.connection)
    async with trio.open_nursery() as around:
        around.start_soon(server.sweep)
        async with trio.open_nursery() as nursery:
            accepting = trio.CancelScope()
            nursery.start_soon(server.accept, listener, nursery, accepting)
            task_status.started(url_of(listener, tls=context is not None))
            await shutdown.wait()
            accepting.cancel()
            server.retire()
            around.start_soon(server.give_up_after, ARRIVAL_SHARE * grace_seconds)
            nursery.cancel_scope.deadline = trio.current_time() + grace_seconds
        around.cancel_scope.cancel()


def _tls_context(tls: Tls, alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.certificate, tls.key)
    except OSError as error:
        raise bad_certificate(tls.certificate, tls.key, error) from error
    context.set_alpn_protocols([alpn])
    return context


class _Server:
    """The open connections of one listener."""

    def __init__(
        self,
        admission: Admission,
        settings: Ingest,
        context: ssl.SSLContext | None,
        connection: Callable[[Transport, Admission, Limits, ClientErrors], AnyConnection],
    ) -> None:
        self._admission = admission
        self._connection = connection
        self._errors = ClientErrors()
        self._context = context
        self._most = most_connections(settings.max_connections, _DESCRIPTOR_SHARE)
        self._limits = Limits(
            settings.keep_alive_seconds,
            settings.head_timeout_seconds,
            settings.body_timeout_seconds,
            settings.max_body_bytes,
        )
        self._connections: set[AnyConnection] = set()
        self._leaving: set[AnyConnection] = set()  # were ended to make room
        self._ended = trio.Event()

    async def accept(
        self, listener: socket.socket, nursery: trio.Nursery, scope: trio.CancelScope
    ) -> None:
        """Accept connections until ``scope`` is cancelled, then close ``listener``. At the limit,
        a connection is closed for the next one (:meth:`_make_room`). While all are busy, or the
        process has run out of descriptors, new connections wait in the kernel. Several are accepted
        at once, because a client waits there behind all that came before it."""
        accepted = 0
        with listener, scope:
            while True:
                if len(self._connections) >= self._most:
                    await trio.lowlevel.wait_readable(listener)
                    if not self._leaving:
                        self._make_room()
                    self._ended = trio.Event()
                    with trio.move_on_after(_ROOM_SECONDS):
                        await self._ended.wait()
                    continue
                try:
                    connected, _ = listener.accept()
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(listener)
                except OSError as error:
                    if error.errno in EXHAUSTED:
                        _log.warning(
                            "no connection can be accepted now (%s); raise the limit of open "
                            "files, or lower ingest.max_connections",
                            error.strerror,
                        )
                        await trio.sleep(_EXHAUSTED_PAUSE)
                    else:  # the client has given up
                        await trio.lowlevel.checkpoint()
                else:
                    connection = self._connection(
                        self._transport(connected), self._admission, self._limits, self._errors
                    )
                    self._connections.add(connection)
                    nursery.start_soon(self._run, connection)
                    accepted += 1
                    if accepted % _ACCEPTED_AT_ONCE == 0:
                        await trio.lowlevel.checkpoint()

    def _make_room(self) -> None:
        """End the connections whose loss costs least, so that a client with many open connections
        does not keep others out: those whose requests arrive slowly, or else an idle one, first
        those without any request so far. The client with most of them goes first, and of its
        connections those that have been slow or idle longest. Slow ones are ended together, because
        finding them takes longer than accepting a connection."""
        now = trio.current_time()
        arriving = [each for each in self._connections if each.slow_since < math.inf]
        slow = [each for each in arriving if each.slow_since <= now - _SLOW_SECONDS]
        if not slow and len(arriving) > self._most // 2:
            slow = [each for each in arriving if each.slow_since <= now - _SLOW_SECONDS / 5]
        if slow:
            ((peer, _),) = Counter(each.peer for each in slow).most_common(1)
            of_peer = sorted(
                (each for each in slow if each.peer == peer), key=lambda each: each.slow_since
            )
            for each in of_peer[: max(1, self._most // _ROOM_SHARE)]:
                self._leaving.add(each)
                each.abandon()
            return
        idle = [each for each in self._connections if each.idle]
        newest = now + self._limits.idle - _SLOW_SECONDS / 5
        new = [each for each in idle if not each.proven and each.deadline >= newest]
        if len(new) + len(arriving) > self._most // 2:
            return  # soon they are idle or slow, unless their requests are on their way
        found = set(idle).difference(new)
        if found:
            held = Counter(each.peer for each in self._connections)
            min(found, key=lambda each: (each.proven, -held[each.peer], each.deadline)).expire()

    def _transport(self, connected: socket.socket) -> Transport:
        connected.setblocking(False)
        if self._context is None:
            return SocketTransport(connected)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(connected))
        return TlsTransport(trio.SSLStream(stream, self._context, server_side=True))

    async def _run(self, connection: AnyConnection) -> None:
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._leaving.discard(connection)
            self._ended.set()

    async def sweep(self) -> None:
        """End connections whose deadline has passed, forever."""
        limits = self._limits
        shortest = min(limits.idle, limits.head, limits.body, self._admission.answer_timeout)
        pause = min(_SWEEP_SECONDS, shortest / 4)
        while True:
            await trio.sleep(pause)
            now = trio.current_time()
            for connection in self._connections:
                if connection.deadline <= now:
                    connection.expire()

    def retire(self) -> None:
        """End every connection once its request in progress is answered."""
        for connection in self._connections:
            connection.retire()

    async def give_up_after(self, seconds: float) -> None:
        """Refuse requests that are still arriving after ``seconds``."""
        await trio.sleep(seconds)
        for connection in self._connections:
            connection.give_up()
