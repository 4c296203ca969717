"""Fallback files: items that a store does not accept go to local files, and are written back when
the store works again.

While files are pending, new items go behind them, so that the store receives items in order. A task
of its own writes them back through the store's circuit breaker; its calls are the trial calls that
close the breaker.

If the files cannot be written either, the stage waits, and the channels before it fill up until the
receiver refuses requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson
import trio

from betrace.channels import (
    Breaker,
    BreakerOpen,
    BreakerTimeout,
    ExpectedError,
    ThreadRunner,
    ThreadTimeout,
)
from betrace.service.pipeline.dead_letters import Bury
from betrace.service.storage.fallback_files import FallbackFiles, FallbackFull, FallbackStatistics
from betrace.service.telemetry import events

T = TypeVar("T")
S = TypeVar("S")

_log = logging.getLogger("service.fallback")

CHUNK_LINES = 1000
CHUNK_BYTES = 4 << 20
RETRY_SECONDS = 1.0
LONGEST_PAUSE = 5.0  # seconds between tries, so that a breaker reset is noticed soon


@dataclass(frozen=True, slots=True)
class GuardedStore(Generic[S]):
    """A store and what protects the pipeline from its failures: threads of its own, a circuit
    breaker, files for what it does not accept now, and dead letters for what it never accepts."""

    store: S
    threads: ThreadRunner
    breaker: Breaker
    files: FallbackFiles
    bury: Bury


class Fallback(Generic[T]):
    """The fallback files of one store. Methods are called on the Trio thread.

    Args:
      name: the store's name.
      files: the pending items.
      encode, decode: an item as a line of JSON and back; ``decode`` raises LookupError, TypeError
        or ValueError for an invalid line.
      write: writes items to the store; raises :exc:`ExpectedError` while it does not work.
      observe: called with the seconds that each write to the files took.
    """

    def __init__(
        self,
        name: str,
        files: FallbackFiles,
        encode: Callable[[T], bytes],
        decode: Callable[[bytes], T],
        write: Callable[[list[T]], Awaitable[object]],
        observe: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self.name = name
        self._files = files
        self._encode = encode
        self._decode = decode
        self._write = write
        self._observe = observe
        self._threads = ThreadRunner(f"fallback-{name}", 2)
        self._writing = 0
        self._failing = False
        self._writing_back = trio.Lock()
        self._arrived = trio.lowlevel.ParkingLot()
        self._now = trio.lowlevel.ParkingLot()
        self._space = trio.lowlevel.ParkingLot()
        self.refusals = 0
        """Failed writes to the files: they were full, or the disk failed."""
        self.last_error: str | None = None
        """The last reason why the store did not accept the pending items."""

    @property
    def pending(self) -> bool:
        """Whether new items must go behind the items in the files."""
        return self._writing > 0 or self._files.pending > 0

    async def store_or_put(
        self,
        items: Sequence[T],
        write: Callable[[Sequence[T]], Awaitable[object]],
        unavailable: tuple[type[Exception], ...],
    ) -> None:
        """Return when the store or the files have the items.

        ``write`` calls the store; an error in ``unavailable``, an open breaker or a timeout sends
        the items to the files. Other errors of ``write`` are raised. Waits while the files are
        full or the disk fails.
        """
        away: tuple[type[Exception], ...] = (
            *unavailable,
            BreakerOpen,
            BreakerTimeout,
            ThreadTimeout,
        )
        while True:
            if not self.pending:
                try:
                    await write(items)
                except away:
                    pass
                else:
                    return
            try:
                await self.put(items)
            except (FallbackFull, OSError):
                await self._wait_for_space(RETRY_SECONDS)
            else:
                return

    async def put(self, items: Sequence[T]) -> None:
        """Write items to the files; they are durable when this returns. Raises
        :exc:`FallbackFull` or :exc:`OSError`; then none of them is in the files."""

        def append() -> None:
            started = time.perf_counter()
            self._files.append([self._encode(item) for item in items])
            self._observe(time.perf_counter() - started)

        first = not self.pending
        self._writing += 1
        try:
            await self._threads.run(append)
        except (FallbackFull, OSError) as error:
            if not self._failing:
                events.FALLBACK_FAILED(store=self.name, error=error)
            self._failing = True
            self.refusals += 1
            raise
        finally:
            self._writing -= 1
        self._failing = False
        if first:
            events.FALLBACK_USED(store=self.name)
        self._arrived.unpark_all()

    async def _wait_for_space(self, seconds: float) -> None:
        """Wait until some of the files were written back, at most ``seconds``."""
        with trio.move_on_after(seconds):
            await self._space.park()

    async def write_back(self) -> None:
        """Write the files back to the store, oldest first, forever."""
        while True:
            if not self.pending:
                await self._arrived.park()
            async with self._writing_back:
                pause = await self._write_some()
            if pause is None:  # items are being written to the files
                with trio.move_on_after(RETRY_SECONDS):
                    await self._arrived.park()
            elif pause:
                with trio.move_on_after(pause):
                    await self._now.park()

    async def _write_some(self) -> float | None:
        """Write some of the files back. Returns how long to wait before the next try, None if
        nothing is pending."""
        chunk = await self._threads.run(self._files.read, CHUNK_LINES, CHUNK_BYTES)
        if chunk is None:
            return None
        pause = 0.0
        try:
            items = await self._threads.run(self._decode_all, chunk.lines)
            if items:
                await self._write(items)
            await self._threads.run(self._files.consume, chunk)
        except BreakerOpen as refused:
            pause = min(max(refused.retry_in, 0.01), LONGEST_PAUSE)
            self.last_error = str(refused)
        except (ExpectedError, OSError) as error:
            pause = RETRY_SECONDS
            self.last_error = str(error)
        except Exception as error:  # a bug must not end this task
            _log.exception("%s: pending items cannot be written back; trying again", self.name)
            pause = LONGEST_PAUSE
            self.last_error = repr(error)
        else:
            self._space.unpark_all()
            if not self.pending:
                self.last_error = None
                events.FALLBACK_EMPTY(store=self.name)
        return pause

    async def drop(self, tenant: str) -> int:
        """Delete a tenant's lines from the files and return how many there were. Waits for a write
        that is in progress."""
        async with self._writing_back:
            return await self._threads.run(self._files.drop, lambda line: _is_of(line, tenant))

    def write_back_now(self) -> None:
        """Try now instead of waiting."""
        self._now.unpark_all()

    def statistics(self) -> FallbackStatistics:
        """The state of the files."""
        return self._files.statistics()

    def shown(self) -> dict[str, Any]:
        """The pending files, as JSON."""
        stats = self._files.statistics()
        return {
            "name": self.name,
            "pendingFiles": [{"name": name, "bytes": size} for name, size in self._files.names()],
            "pendingRecords": stats.lines,
            "pendingBytes": self._files.pending,
            "maxBytes": stats.max_bytes,
            "written": stats.appended,
            "writtenBack": stats.consumed,
            "damaged": stats.damaged,
            "refusals": self.refusals,
            "lastError": self.last_error,
        }

    def close(self) -> None:
        """End the worker threads and close the files."""
        self._threads.close()
        self._files.close()

    def _decode_all(self, lines: list[bytes]) -> list[T]:
        items = []
        for line in lines:
            try:
                items.append(self._decode(line))
            except (LookupError, TypeError, ValueError) as error:
                _log.error("%s: a damaged line was set aside: %s", self.name, error)
                self._files.set_aside(line)
        return items


def _is_of(line: bytes, tenant: str) -> bool:
    try:
        return bool(orjson.loads(line)["tenant"] == tenant)
    except (LookupError, TypeError, ValueError):
        return f'"tenant":"{tenant}"'.encode() in line
