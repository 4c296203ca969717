"""Coming back after a restart, clean or not: the last checkpoint, then the log's tail.

What was answered with 200 is in the log. The checkpoint holds the traces as they were and names the
frames that they do not contain; those are read again and go through the same stages. Signals have
deterministic ids, so what was stored before the crash and is found again changes nothing; what
was stored and is not found again, since more spans came meanwhile, is retracted
(:mod:`betrace.service.traces.signal_history`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from betrace.channels import SendChannel, ThreadRunner
from betrace.service.api.params import write_time
from betrace.service.otlp.body import BadBody, protobuf_body
from betrace.service.otlp.columns import ERROR, SpanBatch
from betrace.service.otlp.encoding import BodyTooLarge
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.stages.correlate import CorrelateStage, NotNow
from betrace.service.signals import Signal
from betrace.service.storage.dead_letters import DeadLetterError
from betrace.service.storage.duck.store import DuckStore, PoolTimeout, StoreError
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.record import Record
from betrace.service.storage.spanlog.frames import unpack_position
from betrace.service.storage.spanlog.log import (
    Frame,
    FrameCorrupt,
    FrameMissing,
    SpanLog,
    pack_position,
)
from betrace.service.telemetry import events
from betrace.service.traces.checkpoint import (
    Snapshot,
    checkpoint_files,
    read_latest,
    write_checkpoint,
)
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import CLOSED_COUNT, OPEN_COUNT

if TYPE_CHECKING:
    from betrace.service.pipeline.dead_letters import DeadLetters

_log = logging.getLogger("service.recovery")

_BATCH_SPANS = 4000
_REPORT_SECONDS = 5.0
_LARGEST_BODY = 1 << 30
_UNREADABLE = b"\xff"  # no protobuf: the scanner finds an error in it
_LATE_NS = 3600 * 1_000_000_000  # traces closed before are not known as late after a restart


@dataclass(slots=True)
class Replayed:
    """What was read from the log at the start."""

    frames: int = 0
    spans: int = 0
    damaged: int = 0
    """Frames that could not be read."""


class Recovery:
    """Restores the traces at the start and saves them while the service runs."""

    def __init__(
        self,
        directory: Path,
        log: SpanLog,
        correlate: CorrelateStage,
        progress: LogProgress,
        in_flight: InFlight,
        threads: ThreadRunner,
        store: DuckStore,
        closed: ClosedTraces,
        record: Record,
        max_body_bytes: int,
        letters: DeadLetters,
        closed_tenants: Container[str] = frozenset(),
    ) -> None:
        self._closed_tenants = closed_tenants
        self._directory = directory
        self._log = log
        self._correlate = correlate
        self._progress = progress
        self._in_flight = in_flight
        self._waited = 0.0
        self._threads = threads
        self._store = store
        self._closed = closed
        self._record = record
        self._max_body = max_body_bytes
        self._letters = letters
        self._saving = trio.Lock()
        self.replayed = Replayed()
        self.saved_at: float | None = None
        """When the last checkpoint was complete, seconds since 1970."""
        self.saved_bytes = 0
        self.failures = 0
        self._failing = 0  # since the last success
        self._covers: Snapshot | None = None

    async def recover(self, onward: SendChannel[SpanBatch]) -> None:
        """Load the last checkpoint and send what the log has beyond it to ``onward``."""
        await self._letters.reconcile(await self._threads.run(self._load))
        batches = self._batches()
        reported = trio.current_time()
        while (batch := await self._threads.run(next, batches, None)) is not None:
            await onward.send(batch)
            if trio.current_time() - reported > _REPORT_SECONDS:
                reported = trio.current_time()
                _log.info("replaying the log: %d spans so far", self.replayed.spans)
        if self.replayed.frames or self.replayed.damaged:
            events.REPLAYED(
                requests=self.replayed.frames,
                spans=self.replayed.spans,
                damaged=self.replayed.damaged,
            )

    def _load(self) -> list[int]:
        """Restore the last checkpoint; the dead letters whose spans it has."""
        snapshot = read_latest(self._directory)
        if snapshot is not None:
            snapshot = self._without_deleted(snapshot)
            try:
                self._correlate.restore(snapshot)
            except ValueError as error:
                _log.warning("the checkpoint cannot be used, the whole log is replayed: %s", error)
                snapshot = None
        if snapshot is None:
            snapshot = Snapshot(0, {}, [])
        else:
            self.saved_at = snapshot.taken_ns / 1e9
            self._covers = _outline(snapshot)
        self._remember_closed(snapshot)
        try:
            for signals in self._record.since(snapshot.recorded, snapshot.taken_ns):
                self._correlate.note_raised(signals)
                self._project(signals)
        except (LedgerError, OSError) as error:
            _log.error(
                "signals of just before the last stop will not be retracted, should spans that "
                "came since call for it: %s",
                error,
            )
        return snapshot.letters

    def _without_deleted(self, snapshot: Snapshot) -> Snapshot:
        """What a snapshot has of tenants that are not deleted."""
        gone = self._closed_tenants
        return replace(
            snapshot,
            progress={t: known for t, known in snapshot.progress.items() if t not in gone},
            tenants=[saved for saved in snapshot.tenants if saved.tenant not in gone],
            raised={t: traces for t, traces in snapshot.raised.items() if t not in gone},
            unfinished={t: rest for t, rest in snapshot.unfinished.items() if t not in gone},
        )

    def _project(self, signals: list[Signal]) -> None:
        """Have signals in DuckDB too: the last stop may have come between the two, and a retraction
        is not found a second time."""
        by_tenant: dict[str, list[Signal]] = {}
        for signal in signals:
            by_tenant.setdefault(signal.tenant, []).append(signal)
        for tenant, some in by_tenant.items():
            try:
                self._store.add_missing(tenant, some)
            except (StoreError, PoolTimeout) as error:
                _log.warning("signals of %s may be missing in queries: %s", tenant, error)

    def _remember_closed(self, snapshot: Snapshot) -> None:
        """Put the traces that closed lately into the filter that tells late spans; but not those
        that are read from the log altogether."""
        since = time.time_ns() - _LATE_NS
        for tenant in self._store.tenants():
            if tenant in self._closed_tenants:
                continue
            upto, _ = snapshot.progress.get(tenant, (0, []))
            segments = self._log.segments(tenant)
            if not upto and segments:
                upto = pack_position(segments[0].number, 0)
            try:
                ids = self._store.trace_ids(tenant, since, upto)
            except (StoreError, PoolTimeout) as error:
                _log.warning("late spans of %s may begin new traces: %s", tenant, error)
            else:
                self._closed.add(tenant, ids)

    def shown(self) -> dict[str, Any]:
        """The last checkpoint, and what a restart would read of the log; in a worker thread."""
        covers, files = self._covers, checkpoint_files(self._directory)
        return {
            "savedAt": None if self.saved_at is None else write_time(int(self.saved_at * 1e9)),
            "ageSeconds": None if self.saved_at is None else round(time.time() - self.saved_at, 3),
            "bytes": files[0].stat().st_size if files else 0,
            "files": len(files),
            "failures": self.failures,
            "saving": self._saving.locked(),
            "toReplayBytes": self._beyond({} if covers is None else covers.progress),
            "covers": None
            if covers is None
            else {
                "takenAt": write_time(covers.taken_ns),
                "tenants": len(covers.progress),
                "openTraces": _count(covers, OPEN_COUNT),
                "closedTraces": _count(covers, CLOSED_COUNT),
                "requestsNotFolded": sum(len(pending) for _, pending in covers.progress.values()),
                "deadLetters": len(covers.letters),
            },
        }

    def _beyond(self, progress: dict[str, tuple[int, list[int]]]) -> int:
        """Bytes of the log beyond the last frames of a checkpoint."""
        found = 0
        for tenant in self._log.tenants():
            number, offset = unpack_position(progress.get(tenant, (0, []))[0])
            for segment in self._log.segments(tenant):
                if segment.number >= number:
                    before = offset if segment.number == number else 0
                    found += max(0, segment.bytes - before)
        return found

    async def caught_up(self) -> None:
        """All that was replayed is folded."""
        await self._threads.run(self._correlate.replayed)
        self._correlate.caught_up.set()

    def _batches(self) -> Iterator[SpanBatch]:
        """What the traces do not contain, in batches of one tenant; each frame becomes pending
        before it is given out."""
        for tenant in self._log.tenants():
            if tenant in self._closed_tenants:
                continue
            last, pending = self._progress.snapshot().get(tenant, (0, []))
            positions: list[int] = []
            frames: list[Frame] = []
            spans = 0
            for position, frame in self._frames(tenant, last, pending):
                positions.append(position)
                frames.append(frame)
                spans += frame.spans
                if spans >= _BATCH_SPANS:
                    yield self._batch(tenant, positions, frames)
                    positions, frames, spans = [], [], 0
            if frames:
                yield self._batch(tenant, positions, frames)

    def _frames(self, tenant: str, last: int, pending: list[int]) -> Iterator[tuple[int, Frame]]:
        found = self._log.read_many(tenant, pending)
        for position, frame in zip(pending, found, strict=True):
            if isinstance(frame, FrameMissing | FrameCorrupt):
                self.replayed.damaged += 1
                self._progress.folded(tenant, [position])
            else:
                yield position, frame
        for position, frame in self._log.frames(tenant, start=last or None):
            if position > last:
                self._progress.register(tenant, [position])
                yield position, frame

    def _batch(self, tenant: str, positions: list[int], frames: list[Frame]) -> SpanBatch:
        batch = read_frames(tenant, positions, frames, self._max_body)
        batch.replayed = True
        self.replayed.frames += len(frames)
        self.replayed.spans += len(batch)
        self.replayed.damaged += int(np.count_nonzero(batch.bodies[:, ERROR]))
        return batch

    async def every(self, seconds: float) -> None:
        """Save a checkpoint every so many seconds, less often where saving takes long, apart from
        waiting for the stores; and soon after rules changed, since what is read of the log after
        a crash opens its traces under the new ones."""
        while True:
            started = trio.current_time()
            self._correlate.rules_changed = trio.Event()
            await self.save()
            took = trio.current_time() - started - self._waited
            least = max(took, 0.1)
            await trio.sleep(least)
            with trio.move_on_after(max(seconds - took - least, 9 * took - least, 0)):
                await self._correlate.rules_changed.wait()

    async def save(self) -> bool:
        """Save a checkpoint; whether that worked. What left the traces is waited for first."""
        async with self._saving:
            retried = self._letters.retries()
            recorded = await self._threads.run(self._record.last_entries)
            try:
                snapshot = await self._threads.run(self._correlate.snapshot)
            except NotNow as error:
                self.failures += 1
                _log.warning("no checkpoint is written this time: %s", error)
                return False
            letters = self._letters.saved_in(retried, snapshot.progress)
            if not self._letters.spans:
                await self._threads.run(self._correlate.settled)
            snapshot = replace(snapshot, letters=letters, recorded=recorded)
            began = trio.current_time()
            await self._in_flight.wait(snapshot.mark)
            self._waited = trio.current_time() - began
            try:
                self.saved_bytes = await self._threads.run(
                    write_checkpoint, self._directory, snapshot
                )
            except OSError as error:
                self.failures += 1
                if not self._failing:
                    events.CHECKPOINT_FAILED(error=error)
                self._failing += 1
                return False
            self.saved_at = time.time()
            self._covers = _outline(snapshot)
            if self._failing:
                events.CHECKPOINT_WORKS(failures=self._failing)
                self._failing = 0
            try:
                await self._letters.saved(letters)
            except DeadLetterError as error:
                _log.warning("dead letters that are done cannot be deleted yet: %s", error)
            return True


def _outline(snapshot: Snapshot) -> Snapshot:
    """A snapshot without what takes memory."""
    tenants = [
        replace(
            saved,
            tables=[
                replace(table, arrays={"fill": table.arrays["fill"]}, told=[], definitions=b"")
                for table in saved.tables
            ],
        )
        for saved in snapshot.tenants
    ]
    return replace(snapshot, tenants=tenants, raised={}, unfinished={})


def _count(snapshot: Snapshot, which: int) -> int:
    return sum(int(t.arrays["fill"][which]) for saved in snapshot.tenants for t in saved.tables)


def read_frames(
    tenant: str, positions: list[int], frames: list[Frame], max_body_bytes: int
) -> SpanBatch:
    """The spans of frames read back from the log.

    They were accepted, perhaps under a larger limit than ``max_body_bytes``, which is therefore no
    limit here. A frame that cannot be decoded all the same is a body with an error.
    """
    bodies = []
    limit = max(max_body_bytes, _LARGEST_BODY)
    for frame in frames:
        try:
            payload = bytes(frame.payload)
            bodies.append(protobuf_body(payload, frame.content_type, frame.encoding, limit))
        except (BadBody, BodyTooLarge) as error:
            _log.error("a frame of the log of %s cannot be decoded: %s", tenant, error)
            bodies.append(_UNREADABLE)
    batch = scan_bodies(tenant, bodies)
    batch.positions = np.array(positions, np.int64)
    batch.received_ns = max(frame.received_ns for frame in frames)
    return batch
