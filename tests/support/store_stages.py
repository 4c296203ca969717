"""A stage over a faulty store, as the tests of storage-write and projection use it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import trio

from betrace.channels import Breaker, BreakerOptions, ThreadRunner
from betrace.service.pipeline.breakers import PoisonError
from betrace.service.pipeline.fallback import GuardedStore
from betrace.service.storage.fallback_files import FallbackFiles
from tests.support.failing_stores import signal

LIMITS = BreakerOptions(window=4, minimum_calls=4, open_for=15.0, timeout=5.0, trial_calls=2)


class StageOverStore:
    """Subclasses make ``stage`` and ``fallback`` over ``guarded``, and define ``_bury``."""

    def __init__(self, name, store, files: FallbackFiles, limits=LIMITS) -> None:
        self.files = files
        self.threads = ThreadRunner(name, 2)
        self.breaker = Breaker(
            name, limits, is_failure=lambda error: not isinstance(error, PoisonError)
        )
        self.buried = []
        self.guarded = GuardedStore(store, self.threads, self.breaker, files, self._bury)

    @asynccontextmanager
    async def running(self):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.fallback.write_back)
            yield
            nursery.cancel_scope.cancel()
        self.fallback.close()
        self.threads.close()

    async def settled(self):
        """Return when nothing is pending in the files."""
        while self.fallback.pending:
            await trio.sleep(1)


def ids(*numbers):
    return [signal(number).id for number in numbers]
