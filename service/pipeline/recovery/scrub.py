"""Reads the stored data slowly from end to end, because damage is otherwise found only in what
somebody reads.

A pass reads each tenant's span log and DuckDB file at a few MiB a second, from the disk and not
from the system's memory, and begins a day after the last one began. What it finds is reported like
damage that a request meets: a place of the log by the log itself, a DuckDB file by having it read
as a whole and, if DuckDB agrees, rebuilt. A restart continues after the last segment that was read.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import trio

from betrace.channels import ThreadRunner
from betrace.service.durable import write_atomically
from betrace.service.storage.duck.blocks import checked_blocks
from betrace.service.storage.duck.schema import FILE, StoreCorrupt
from betrace.service.storage.paths import tenant_directory, tenants_with
from betrace.service.storage.spanlog.frames import pack_position
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.segments import Segment
from betrace.service.telemetry import events

_log = logging.getLogger("service.scrub")

STATE = "scrub.json"
"""In the data directory: when the pass began, and what it has read."""
PASS_SECONDS = 86_400.0
PIECE_BYTES = 1 << 20
"""Bytes that are read between two pauses."""
_WAIT_SECONDS = 60.0  # after the start, and between two looks whether a pass is due
_AGAIN_SECONDS = 1.0  # before a block that looks wrong is read again
_LAST = 1 << 62  # in place of a segment number: the tenant's log and file were read


@dataclass(slots=True)
class _State:
    """Where the pass is. Times are seconds since 1970."""

    began: float = 0.0
    completed: float = 0.0
    tenant: str = ""
    segment: int = 0
    done: bool = True


class Scrub:
    """Reads at most ``bytes_per_second`` (0: nothing). ``suspect`` is called with a file of DuckDB
    that looks damaged, in a worker thread; tenants in ``closed`` are passed over."""

    def __init__(
        self,
        data: Path,
        log: SpanLog,
        bytes_per_second: int,
        suspect: Callable[[StoreCorrupt], object],
        closed: Container[str] = frozenset(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._data = data
        self._log = log
        self._rate = bytes_per_second
        self._suspect = suspect
        self._closed = closed
        self._clock = clock
        self._thread = ThreadRunner("scrub", 1)
        self.bytes = 0
        """Read since the start."""
        self.passes = 0
        """Completed since the start."""
        self.completed_at = 0.0
        """When the last pass was completed, in seconds since 1970; 0 if that is not known."""

    async def run(self) -> None:
        """Read everything again and again, forever."""
        if not self._rate:
            return
        state = await self._thread.run(self._read_state)
        self.completed_at = state.completed
        await trio.sleep(_WAIT_SECONDS)  # others have to read at the start
        while True:
            if state.done and self._clock() - state.began < PASS_SECONDS:
                await trio.sleep(_WAIT_SECONDS)
                continue
            if state.done:
                state = _State(self._clock(), state.completed, done=False)
            pieces, before = self._pieces(state), self.bytes
            while (size := await self._thread.run(next, pieces, 0)) > 0:
                self.bytes += size
                await trio.sleep(size / self._rate)
            self.completed_at = state.completed = self._clock()
            state.done = True
            self.passes += 1
            await self._thread.run(self._save, state)
            if self.bytes > before:
                events.SCRUBBED(places=self._log.damage.places)

    def close(self) -> None:
        """End the worker thread when its call returns."""
        self._thread.close()

    def _read_state(self) -> _State:
        try:
            return _State(**orjson.loads((self._data / STATE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return _State()

    def _save(self, state: _State) -> None:
        with suppress(OSError):  # the next start then begins earlier
            write_atomically(self._data / STATE, orjson.dumps(asdict(state)))

    def _pieces(self, state: _State) -> Iterator[int]:
        """The sizes of the pieces that are read, each after it was read; notes in ``state`` what is
        behind it."""
        tenants = sorted({*self._log.tenants(), *tenants_with(self._data, FILE)})
        for tenant in tenants:
            if tenant < state.tenant or tenant in self._closed:
                continue
            read = state.segment if tenant == state.tenant else 0
            for segment in self._log.segments(tenant):
                if segment.number <= read:
                    continue
                yield from self._read_segment(tenant, segment)
                state.tenant, state.segment = tenant, segment.number
                self._save(state)
            if read < _LAST:
                yield from self._read_file(tenant)
                state.tenant, state.segment = tenant, _LAST
                self._save(state)

    def _read_segment(self, tenant: str, segment: Segment) -> Iterator[int]:
        """Read the frames of a segment as it is now; the log reports what it cannot read."""
        start, stop = (pack_position(segment.number, at) for at in (0, segment.bytes))
        read = 0
        try:
            _drop_from_memory(segment.path)
            for _, frame in self._log.frames(tenant, start, stop):
                read += frame.stored_bytes
                if read >= PIECE_BYTES:
                    yield read
                    read = 0
            _drop_from_memory(segment.path)
        except FileNotFoundError:  # past retention, or the tenant was deleted
            pass
        except OSError as error:
            _log.warning("segment %d of %s cannot be read: %s", segment.number, tenant, error)
        yield max(read, 1)  # 0 would end the pass

    def _read_file(self, tenant: str) -> Iterator[int]:
        """Check the blocks of a tenant's DuckDB file. One that is wrong twice is reported."""
        path = tenant_directory(self._data, tenant) / FILE
        wrong: list[int] = []
        read = 0
        try:
            for offset, size, right in checked_blocks(path):
                read += size
                if not right:
                    wrong.append(offset)
                if read >= PIECE_BYTES:
                    yield read
                    read = 0
            if wrong:
                time.sleep(_AGAIN_SECONDS)
                still = [at for at, _, right in checked_blocks(path) if not right and at in wrong]
                if still:
                    text = f"{path} is damaged (block at offset {still[0]}, checksum mismatch)"
                    self._suspect(StoreCorrupt(tenant, text))
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("%s cannot be read: %s", path, error)
        yield max(read, 1)  # 0 would end the pass


def _drop_from_memory(path: Path) -> None:
    """Have the system forget what it has of a file in memory, so that it is read from the disk, and
    what was read takes no memory from others. What is not written yet stays."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
