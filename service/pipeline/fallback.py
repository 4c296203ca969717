"""What a store would not take goes to local files, and from there to the store when it is back.

While files are pending, everything new goes behind them, so that the store gets things in order.
They are written back by a task of their own, through the store's circuit breaker: its calls are the
trials by which the breaker closes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import orjson
import trio

from betrace.channels import BreakerOpen, ExpectedError, ThreadRunner
from betrace.service.storage.fallback_files import FallbackFiles, FallbackFull, FallbackStatistics
from betrace.service.telemetry import events

T = TypeVar("T")

_log = logging.getLogger("service.fallback")

CHUNK_LINES = 1000
CHUNK_BYTES = 4 << 20
RETRY_SECONDS = 1.0
LONGEST_PAUSE = 5.0  # seconds between tries, so that a breaker that was reset is soon noticed


class Fallback(Generic[T]):
    """The files of one store and the way back. Methods are called on the Trio thread.

    Args:
      name: of the store.
      files: what is pending.
      encode, decode: an item as a line of JSON and back; ``decode`` raises LookupError, TypeError
        or ValueError for a line that is none.
      write: gives items to the store; raises :exc:`ExpectedError` while it does not work.
      observe: told how many seconds each write to the files took.
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
        self._returning = trio.Lock()
        self._arrived = trio.lowlevel.ParkingLot()
        self._now = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self.refusals = 0
        """Writes to the files that did not succeed: they were full, or the disk failed."""
        self.last_error: str | None = None
        """Why the store did not take what is pending, last."""

    @property
    def pending(self) -> bool:
        """Whether what is new must go behind what is in the files."""
        return self._writing > 0 or self._files.pending > 0

    async def put(self, items: Sequence[T]) -> None:
        """Write items to the files; they are durable when this returns. Raises
        :exc:`FallbackFull` or :exc:`OSError`, and then none of them is in the files."""

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

    async def room(self, seconds: float) -> None:
        """Wait until some of the files were written back, or for so long."""
        with trio.move_on_after(seconds):
            await self._room.park()

    async def write_back(self) -> None:
        """Give what is in the files to the store, oldest first, for ever."""
        while True:
            async with self._returning:
                pause = await self._write_some()
            if pause is None:
                with trio.move_on_after(RETRY_SECONDS):
                    await self._arrived.park()
            elif pause:
                with trio.move_on_after(pause):
                    await self._now.park()

    async def _write_some(self) -> float | None:
        """Give some of what is in the files to the store; how long to wait before the next try,
        None where there is nothing."""
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
        except Exception as error:  # a bug must not end the way back
            _log.exception("%s: what is pending cannot be written back", self.name)
            pause = LONGEST_PAUSE
            self.last_error = repr(error)
        else:
            self._room.unpark_all()
            if not self.pending:
                self.last_error = None
                events.FALLBACK_EMPTY(store=self.name)
        return pause

    async def drop(self, tenant: str) -> int:
        """Delete what is in the files of a tenant that is being deleted; how many lines. What of it
        is being written back is waited for."""
        async with self._returning:
            return await self._threads.run(self._files.drop, lambda line: _is_of(line, tenant))

    def write_back_now(self) -> None:
        """Do not wait for the next try."""
        self._now.unpark_all()

    def statistics(self) -> FallbackStatistics:
        """What is in the files."""
        return self._files.statistics()

    def shown(self) -> dict[str, Any]:
        """What is pending, as JSON."""
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
                _log.error("%s: a damaged line is set aside: %s", self.name, error)
                self._files.set_aside(line)
        return items


def _is_of(line: bytes, tenant: str) -> bool:
    try:
        return bool(orjson.loads(line)["tenant"] == tenant)
    except (LookupError, TypeError, ValueError):
        return f'"tenant":"{tenant}"'.encode() in line
