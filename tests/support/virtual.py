"""Virtual time that stops while worker threads work.

Trio's test clock jumps when all tasks wait, even for a thread. This one jumps only when no
:class:`betrace.channels.ThreadRunner` has a running call, except calls in :func:`hanging`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from unittest import mock

import trio
from trio.testing import MockClock

from betrace.channels import ThreadRunner


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


@contextmanager
def hanging() -> Iterator[None]:
    """In a worker thread: time continues although the call does not return."""
    time = _present
    if time is not None:
        time.add_soon(-1)
    yield
    if time is not None:
        time.add_soon(1)


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
