"""Virtual time that stops while worker threads work.

Trio's test clock jumps when all tasks wait, even for a thread. This one jumps only when no
:class:`betrace.channels.ThreadRunner` has a running call, except those that wait for a
:class:`Hang`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import TypeVar
from unittest import mock

import trio
from trio.testing import MockClock

from betrace.channels import ThreadRunner

T = TypeVar("T")


class _Time:
    """The clock of the current run, and the number of calls it waits for."""

    def __init__(self) -> None:
        self.clock = MockClock(autojump_threshold=0)
        self.busy = 0
        self.token: trio.lowlevel.TrioToken | None = None

    def add(self, number: int) -> None:
        self.busy += number
        self.clock.autojump_threshold = math.inf if self.busy else 0

    def add_soon(self, number: int) -> None:
        assert self.token is not None
        with suppress(trio.RunFinishedError):
            self.token.run_sync_soon(self.add, number)


_present: _Time | None = None


class Hang:
    """What worker threads wait for while time continues. Time stops again as soon as it is
    released, because a busy machine may take long to wake a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._waiting = 0

    def wait(self) -> None:
        """Wait in a worker thread."""
        with self._lock:
            if _present is not None and not self._released.is_set():
                self._waiting += 1
                _present.add_soon(-1)
        self._released.wait(600)

    def release(self) -> None:
        """Let all threads continue. Called by the test."""
        with self._lock:
            waiting, self._waiting = self._waiting, 0
            if _present is not None:
                _present.add(waiting)
            self._released.set()


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run ``main`` in virtual time."""
    global _present
    time = _present = _Time()
    start, finished = ThreadRunner._start, ThreadRunner._finished

    def starting(self, job):
        time.add(1)
        start(self, job)

    def finishing(self, job):
        time.add(-1)
        finished(self, job)

    async def with_token():
        time.token = trio.lowlevel.current_trio_token()
        await main()

    try:
        with (
            mock.patch.object(ThreadRunner, "_start", starting),
            mock.patch.object(ThreadRunner, "_finished", finishing),
        ):
            trio.run(with_token, clock=time.clock)
    finally:
        _present = None


def with_world(
    make: Callable[[], AbstractAsyncContextManager[T]],
) -> Callable[[Callable[[T], Awaitable[None]]], Callable[[], None]]:
    """A decorator that runs an async test in virtual time, with what ``make`` opens."""

    def decorate(test: Callable[[T], Awaitable[None]]) -> Callable[[], None]:
        async def main() -> None:
            async with make() as world:
                await test(world)

        def decorated() -> None:
            run(main)

        decorated.__name__, decorated.__doc__ = test.__name__, test.__doc__
        return decorated

    return decorate


async def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Look again and again until the condition is true."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.02)
