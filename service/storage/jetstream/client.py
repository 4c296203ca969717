"""A connection to NATS for Trio: ``nats-py`` in one thread with its own asyncio loop.

``nats-py`` is imported when a client connects, so that a service without a cluster does not need
it.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import outcome
import trio

from betrace.channels.threads import set_system_name
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.nats import Nats

_log = logging.getLogger("service.nats")

T = TypeVar("T")

CALL_SECONDS = 30.0

_PING_SECONDS = 2  # a server that misses two pings is replaced by another
_MISSED_PINGS = 2
_STUCK_SECONDS = 8.0  # without an answer: the server may be cut off from the others
_ATTEMPT_SECONDS = 2


class NatsClient:
    """A connection to the servers, which moves to another server when one fails.

    A call whose connection is lost fails at once with :exc:`NatsUnavailable`; the caller repeats
    it. :attr:`connected` and :attr:`reconnects` are for metrics.
    """

    def __init__(self, settings: ClusterSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._ready: Future[Nats] = Future()
        self._nats: Nats | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._accepting = True
        self._due: list[Callable[[], object]] = []  # to be called in the client's thread
        # To be called in Trio's thread; several threads may run Trio.
        self._results: dict[trio.lowlevel.TrioToken, list[Callable[[], None]]] = {}
        # The loop refers to its tasks weakly, so without this one that waits may be collected.
        self._calls: set[_Call] = set()
        self.reconnects = 0
        self._thread = threading.Thread(target=self._run, name=f"nats {name}", daemon=True)

    @classmethod
    async def connect(cls, settings: ClusterSettings, name: str) -> NatsClient:
        """Connect as ``name``, which servers show in their reports. Tries for
        ``settings.connect_seconds``, then raises :exc:`NatsUnavailable`."""
        client = cls(settings, name)
        try:
            await trio.to_thread.run_sync(client.start, abandon_on_cancel=True)
        except BaseException:
            client.stop()
            raise
        return client

    def start(self) -> None:
        """Connect; for a caller without Trio."""
        self._thread.start()
        self._nats = self._ready.result()

    @property
    def connected(self) -> bool:
        return self._nats is not None and bool(self._nats.nc.is_connected)

    @property
    def max_payload(self) -> int:
        """The largest message that the servers accept, in bytes."""
        assert self._nats is not None
        return int(self._nats.nc.max_payload)

    # Calls

    async def call(
        self, make: Callable[[Nats], Coroutine[Any, Any, T]], seconds: float | None = CALL_SECONDS
    ) -> T:
        """Run ``make(nats)`` in the client's thread and return its result. When the caller is
        cancelled, the coroutine is cancelled too, and what it sent may have arrived. Raises
        :exc:`NatsUnavailable` after ``seconds``, if given."""
        task = trio.lowlevel.current_task()
        token = trio.lowlevel.current_trio_token()
        waiting = True

        def finish(result: outcome.Outcome[T]) -> None:
            if waiting:
                trio.lowlevel.reschedule(task, result)

        def finished(result: outcome.Outcome[T]) -> None:
            self.deliver(token, partial(finish, result))

        call = _Call(self, make, seconds, finished)

        def abort(raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
            nonlocal waiting
            waiting = False
            self._soon(call.cancel)
            return trio.lowlevel.Abort.SUCCEEDED

        if not self._soon(call.start):
            raise NatsUnavailable("the NATS client is closed")
        return await trio.lowlevel.wait_task_rescheduled(abort)  # type: ignore[no-any-return]

    def call_blocking(
        self, make: Callable[[Nats], Coroutine[Any, Any, T]], seconds: float | None = CALL_SECONDS
    ) -> T:
        """Like :meth:`call`, from a worker thread."""
        result: Future[T] = Future()

        def finished(found: outcome.Outcome[T]) -> None:
            if isinstance(found, outcome.Error):
                result.set_exception(found.error)
            else:
                result.set_result(found.unwrap())

        if not self._soon(_Call(self, make, seconds, finished).start):
            raise NatsUnavailable("the NATS client is closed")
        return result.result()

    def ask_blocking(self, subject: str, data: bytes, seconds: float) -> bytes:
        """The answer of whoever listens on ``subject``; call it in a worker thread. Raises
        :exc:`NatsUnavailable` without one within ``seconds``."""

        async def request(nats: Nats) -> bytes:
            return bytes((await nats.request(subject, data, seconds=seconds)).data)

        return self.call_blocking(request, 2 * seconds)

    def _soon(self, function: Callable[[], object]) -> bool:
        """Call a function in the client's thread. Its loop is woken once for all that wait, because
        a wakeup is a system call."""
        with self._lock:
            if self._accepting:
                self._due.append(function)
                if len(self._due) == 1:
                    self._loop.call_soon_threadsafe(self._call_due)
            return self._accepting

    def _call_due(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for function in due:
            self._loop.call_soon(function)

    def deliver(self, token: trio.lowlevel.TrioToken, function: Callable[[], None]) -> None:
        """Call a function in the thread of a run of Trio; for the coroutine of a :meth:`call`. Trio
        is woken once for all that wait. What the function raises is only logged. Functions for a
        run that has ended are dropped."""
        with self._lock:
            results = self._results.setdefault(token, [])
            results.append(function)
            first = len(results) == 1
        if first:
            try:
                token.run_sync_soon(self._deliver_all, token)
            except trio.RunFinishedError:
                self._take_results(token)

    def _take_results(self, token: trio.lowlevel.TrioToken) -> list[Callable[[], None]]:
        with self._lock:
            return self._results.pop(token, [])

    def _deliver_all(self, token: trio.lowlevel.TrioToken) -> None:
        for function in self._take_results(token):
            try:
                function()
            except Exception:  # it would end the run of Trio
                _log.exception("a result cannot be taken")

    # Lifetime

    async def close(self) -> None:
        """Close the connection and end the thread. Calls that wait raise
        :exc:`NatsUnavailable`. Idempotent."""
        self._closed = True
        self._soon(self._loop.stop)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._join)

    def stop(self) -> None:
        """Close without waiting; for a caller without Trio or one that is cancelled."""
        self._closed = True
        self._soon(self._loop.stop)

    def _join(self) -> None:
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        set_system_name("nats")
        asyncio.set_event_loop(self._loop)
        try:
            try:
                nats = self._loop.run_until_complete(self._open())
            except BaseException as error:
                if isinstance(error, RuntimeError):  # stopped meanwhile
                    error = NatsUnavailable("the NATS client was closed while it connected")
                self._ready.set_exception(error)
                return
            self._nats = nats
            self._watching = self._loop.create_task(self._watch(nats))
            self._ready.set_result(nats)
            if not self._closed:
                self._loop.run_forever()
            nats.connection_lost()
            # A server that closes the connection meanwhile cancels what close() waits for.
            with suppress(Exception, asyncio.CancelledError):
                self._loop.run_until_complete(asyncio.wait_for(nats.nc.close(), _ATTEMPT_SECONDS))
            nats.nc.abort()
        finally:
            with self._lock:
                self._accepting = False
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            for _ in range(2):  # aborted connections are closed in the next round of the loop
                self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    async def _open(self) -> Nats:
        from nats import errors

        from betrace.service.storage.jetstream.connection import NatsConnection

        settings = self._settings
        nats_: Nats | None = None

        async def lost() -> None:
            if nats_ is None:
                return
            nats_.connection_lost()
            if not self._closed:
                _log.warning("the connection to the NATS server was lost; trying the others")

        async def reconnected() -> None:
            self.reconnects += 1
            url = client.connected_url
            _log.info("connected to the NATS server %s", url.netloc if url else "")

        async def failed(error: Exception) -> None:
            _log.debug("NATS: %s", error)
            if nats_ is None and "authorization" in str(error).lower():
                connecting.cancel()  # trying again would not help

        options: dict[str, Any] = {
            "servers": settings.servers.split(","),
            "name": self._name,
            "user": settings.user or None,
            "password": settings.password.get_secret_value() or None,
            "token": settings.token.get_secret_value() or None,
            "tls": _tls(settings),
            "connect_timeout": _ATTEMPT_SECONDS,
            "reconnect_time_wait": 0.25,
            "max_reconnect_attempts": -1,
            "ping_interval": _PING_SECONDS,
            "max_outstanding_pings": _MISSED_PINGS,
            "pending_size": 0,  # nothing is kept for a later connection: callers repeat
            "flush_timeout": _ATTEMPT_SECONDS,
            "disconnected_cb": lost,
            "reconnected_cb": reconnected,
            "error_cb": failed,
        }
        client = NatsConnection()
        connecting = self._loop.create_task(client.connect(**options))
        try:
            await asyncio.wait_for(connecting, settings.connect_seconds)
        except (TimeoutError, errors.Error, OSError, asyncio.CancelledError) as error:
            with suppress(Exception):
                await client.close()
            client.abort()
            cause = client.last_error or error
            raise NatsUnavailable(
                f"no NATS server answers at {settings.servers} ({cause or type(cause).__name__})"
            ) from error
        nats_ = Nats(client)
        await nats_.start()
        return nats_

    async def _watch(self, nats: Nats) -> None:
        """Leave a server that answers pings but has no contact with the others, so that no call
        succeeds there."""
        while True:
            await asyncio.sleep(1)
            if nats.failing_seconds() >= _STUCK_SECONDS and nats.nc.is_connected:
                _log.warning(
                    "NATS has been unavailable for %g s; trying another server", _STUCK_SECONDS
                )
                nats.failing_since = None
                await nats.nc.force_reconnect()


class _Call:
    """One coroutine in the client's loop. Its methods run in the client's thread."""

    def __init__(
        self,
        client: NatsClient,
        make: Callable[[Nats], Coroutine[Any, Any, T]],
        seconds: float | None,
        finished: Callable[[outcome.Outcome[T]], None],
    ) -> None:
        self._client = client
        self._make = make
        self._seconds = seconds
        self._finished = finished
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why = "the NATS client is closed"

    def start(self) -> None:
        nats = self._client._nats
        if nats is None or self._client._closed:
            self._finished(outcome.Error(NatsUnavailable(self._why)))
            return
        loop = self._client._loop
        self._task = loop.create_task(self._make(nats))
        self._client._calls.add(self)
        if self._seconds is not None:
            self._timer = loop.call_later(self._seconds, self._expire)
        self._task.add_done_callback(self._done)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _expire(self) -> None:
        self._why = f"NATS did not answer within {self._seconds:g} s"
        self.cancel()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._client._calls.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if task.cancelled():
            self._finished(outcome.Error(NatsUnavailable(self._why)))
        elif (error := task.exception()) is not None:
            self._finished(outcome.Error(error))
        else:
            self._finished(outcome.Value(task.result()))


def _tls(settings: ClusterSettings) -> ssl.SSLContext | None:
    if not settings.tls_ca and "tls://" not in settings.servers:
        return None
    context = ssl.create_default_context(cafile=settings.tls_ca or None)
    if settings.tls_certificate:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    return context
