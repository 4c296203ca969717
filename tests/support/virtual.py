"""Virtual time that stands still while worker threads work.

Trio's own clock for tests jumps as soon as all tasks wait, also for a thread. Here it jumps only
when no :class:`channels.ThreadRunner` has a call running, except those that said that they hang.
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
    """The clock of the present run, and how many calls it waits for."""

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
    """In a worker thread: time goes on although the call does not return."""
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
