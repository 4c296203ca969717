"""Recovery after a restart, clean or not: the last checkpoint, then the tail of the log.

Everything answered with 200 is in the log. The checkpoint contains the traces and names the frames
that they do not contain yet; those are read again and go through the same stages. Ids of signals
are deterministic, so a signal that was stored before the crash and is found again changes nothing.
A signal that was stored but is not found again, because more spans arrived, is retracted
(:mod:`betrace.service.traces.signal_history`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from betrace.channels import SendChannel, ThreadRunner
from betrace.service.config.settings import Settings
from betrace.service.otlp.columns import ERROR, SpanBatch
from betrace.service.pipeline.open_traces import NotNow
from betrace.service.rules.compile import CompiledRules
from betrace.service.signals import Signal
from betrace.service.storage.dead_letters import DeadLetterError
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.record import Record
from betrace.service.storage.spanlog.damage import Skipped
from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing
from betrace.service.storage.spanlog.frames import Frame, pack_position, unpack_position
from betrace.service.telemetry import events
from betrace.service.times import write_time
from betrace.service.traces.checkpoint import (
    Snapshot,
    checkpoint_files,
    read_latest,
    write_checkpoint,
)
from betrace.service.traces.filter_file import SavedFilter, read_filter, write_filter
from betrace.service.traces.layout import CLOSED_COUNT, OPEN_COUNT

if TYPE_CHECKING:
    from betrace.service.pipeline.build import Stores
    from betrace.service.pipeline.pipeline import Pipeline

_log = logging.getLogger("service.recovery")

_BATCH_SPANS = 4000
_REPORT_SECONDS = 5.0
_HOUR_NS = 3600 * 1_000_000_000
# Closed traces that a restart remembers: as many as can be read in two seconds, but at least those
# of the last hour.
_REMEMBERED = 2_000_000
_HOURS = (None, 720, 168, 72, 24, 12, 6, 3, 1)
FILTER = "late-filter"
"""In the directory of the checkpoints: the filter of closed traces."""
FILTER_SECONDS = 600.0
"""How often it is saved at most; and at every stop."""


@dataclass(slots=True)
class Replayed:
    """What was read back from the log at the start."""

    frames: int = 0
    spans: int = 0
    damaged: int = 0
    """Frames, and places of the log, that could not be read."""


class Recovery:
    """Restores the traces at the start and saves checkpoints while the service runs.

    ``record`` are the stored signals; ``threads`` run what blocks; ``deleted`` are the tenants that
    are skipped.
    """

    def __init__(
        self,
        settings: Settings,
        stores: Stores,
        pipeline: Pipeline,
        record: Record,
        threads: ThreadRunner,
        deleted: Container[str] = frozenset(),
    ) -> None:
        self._directory = settings.storage.path / "checkpoints"
        self._schedule = settings.checkpoint
        self._max_body = settings.ingest.max_body_bytes
        self._log, self._store = stores.log, stores.duckdb
        self._traces = pipeline.open_traces
        self._correlate = pipeline.correlate
        self._progress = pipeline.progress
        self._in_flight = pipeline.in_flight
        self._closed = pipeline.closed
        self._letters = pipeline.letters
        self._rules = pipeline.rules
        self._record = record
        self._threads = threads
        self._deleted = deleted
        self._waited = 0.0
        self._saving = trio.Lock()
        self.replayed = Replayed()
        self.saved_at: float | None = None
        """When the last checkpoint was written, seconds since 1970."""
        self.saved_bytes = 0
        self.failures = 0
        self._failing = 0  # since the last success
        self._covers: Snapshot | None = None
        self._filter: dict[str, Any] | None = None  # what the file says
        self._filter_at = -math.inf

    async def recover(self, onward: SendChannel[SpanBatch]) -> None:
        """Load the last checkpoint and send the part of the log after it to ``onward``."""
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
        """Restore the last checkpoint; returns the dead letters whose spans it contains."""
        snapshot = read_latest(self._directory)
        if snapshot is not None:
            snapshot = self._without_deleted(snapshot)
            try:
                self._traces.restore(snapshot)
            except ValueError as error:
                _log.warning(
                    "the checkpoint cannot be used, so the whole log is replayed: %s", error
                )
                snapshot = None
        if snapshot is None:
            snapshot = Snapshot(0, {}, [])
        else:
            self.saved_at = snapshot.taken_ns / 1e9
            self._covers = _outline(snapshot)
        self._remember_closed(snapshot)
        try:
            for signals in self._record.since(snapshot.recorded, snapshot.taken_ns):
                self._traces.note_raised(signals)
                self._project(signals)
        except (LedgerError, OSError) as error:
            _log.error(
                "signals stored just before the last stop cannot be read, so they will not be "
                "retracted if later spans change the verdict: %s",
                error,
            )
        return snapshot.letters

    def _without_deleted(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot without deleted tenants."""
        gone = self._deleted
        return replace(
            snapshot,
            progress={t: known for t, known in snapshot.progress.items() if t not in gone},
            tenants=[saved for saved in snapshot.tenants if saved.tenant not in gone],
            ledger_history={t: h for t, h in snapshot.ledger_history.items() if t not in gone},
            partial_folds={t: rest for t, rest in snapshot.partial_folds.items() if t not in gone},
        )

    def _project(self, signals: list[Signal]) -> None:
        """Write signals to DuckDB too: the service may have stopped between the two writes, and a
        retraction is not found a second time."""
        by_tenant: dict[str, list[Signal]] = {}
        for signal in signals:
            by_tenant.setdefault(signal.tenant, []).append(signal)
        for tenant, some in by_tenant.items():
            try:
                self._store.add_missing(tenant, some)
            except (StoreError, PoolTimeout) as error:
                _log.warning("signals of %s may be missing in queries: %s", tenant, error)

    def _remember_closed(self, snapshot: Snapshot) -> None:
        """Load the filter that recognizes late spans, and add the traces that were closed since it
        was saved, except traces that are read from the log completely."""
        tenants = [each for each in self._store.tenants() if each not in self._deleted]
        since = self._remember_since(tenants)
        saved = read_filter(self._directory / FILTER, self._closed.filters.shape[1])
        if saved is not None:
            self._closed.restore(saved.about, saved.bits)
            since = max(since, saved.taken_ns - _HOUR_NS)
        for tenant in tenants:
            upto, _ = snapshot.progress.get(tenant, (0, []))
            segments = self._log.segments(tenant)
            if not upto and segments:
                upto = pack_position(segments[0].number, 0)
            try:
                ids = self._store.trace_ids(tenant, since, upto)
            except (StoreError, PoolTimeout) as error:
                _log.warning("late spans of %s may start new traces: %s", tenant, error)
            else:
                self._closed.add(tenant, ids)

    def _remember_since(self, tenants: list[str]) -> int:
        """The time from which on closed traces are remembered."""
        now = time.time_ns()
        since = 0
        for hours in _HOURS:
            since = 0 if hours is None else now - hours * _HOUR_NS
            if self._fits(tenants, since):
                break
        return since

    def _fits(self, tenants: list[str], since: int) -> bool:
        """Whether the traces since then are few enough to remember all."""
        count = 0
        for tenant in tenants:
            with suppress(StoreError, PoolTimeout):
                count += self._store.count_traces(tenant, since)
            if count > min(_REMEMBERED, self._closed.capacity):
                return False
        return True

    def shown(self) -> dict[str, Any]:
        """The last checkpoint, and how much of the log a restart would read; call in a worker
        thread."""
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
        """Bytes of the log after the last frames of a checkpoint."""
        found = 0
        for tenant in self._log.tenants():
            number, offset = unpack_position(progress.get(tenant, (0, []))[0])
            for segment in self._log.segments(tenant):
                if segment.number >= number:
                    before = offset if segment.number == number else 0
                    found += max(0, segment.bytes - before)
        return found

    async def caught_up(self) -> None:
        """Note that everything replayed is folded."""
        await self._threads.run(self._correlate.replayed)
        self._correlate.caught_up.set()

    def _batches(self) -> Iterator[SpanBatch]:
        """The frames that the traces do not contain, in batches of one tenant and one version of
        its rules. Each frame becomes pending before it is returned."""
        progress = self._progress.snapshot()
        for tenant in sorted({*self._log.tenants(), *progress}):
            if tenant in self._deleted:
                continue
            last, pending = progress.get(tenant, (0, []))
            positions: list[int] = []
            frames: list[Frame] = []
            spans = 0
            rules: CompiledRules | None = None
            for position, frame in self._frames(tenant, last, pending):
                its_rules = self._rules.at(tenant, position)
                if frames and (spans >= _BATCH_SPANS or its_rules is not rules):
                    yield self._batch(tenant, positions, frames, rules)
                    positions, frames, spans = [], [], 0
                rules = its_rules
                positions.append(position)
                frames.append(frame)
                spans += frame.spans
            if frames:
                yield self._batch(tenant, positions, frames, rules)

    def _frames(self, tenant: str, last: int, pending: list[int]) -> Iterator[tuple[int, Frame]]:
        found = self._log.read_many(tenant, pending)
        for position, frame in zip(pending, found, strict=True):
            if isinstance(frame, FrameMissing | FrameCorrupt):
                self.replayed.damaged += 1
                self._progress.folded(tenant, [position])
            else:
                yield position, frame
        if last:
            self._log.continue_after(tenant, last)

        def skipped(found: Skipped) -> None:
            self.replayed.damaged += not found.torn

        for position, frame in self._log.frames(tenant, start=last or None, skipped=skipped):
            if position > last:
                self._progress.register(tenant, [position])
                yield position, frame

    def _batch(
        self,
        tenant: str,
        positions: list[int],
        frames: list[Frame],
        rules: CompiledRules | None,
    ) -> SpanBatch:
        batch = read_frames(tenant, positions, frames, self._max_body)
        batch.replayed = True
        batch.rules = rules
        self.replayed.frames += len(frames)
        self.replayed.spans += len(batch)
        self.replayed.damaged += int(np.count_nonzero(batch.bodies[:, ERROR]))
        return batch

    async def every_interval(self) -> None:
        """Save a checkpoint every ``checkpoint.interval_seconds``, less often if saving takes long
        (without the wait for the stores) or if a restart would read little of the log."""
        settings, latest = self._schedule, trio.current_time()
        while True:
            pause = settings.interval_seconds
            now = trio.current_time()
            if now >= latest or not await self._threads.run(self._little_to_replay):
                saved = await self.save()
                took = trio.current_time() - now - self._waited
                latest = now + settings.max_interval_seconds if saved else now
                pause = max(pause - took, 9 * took, 0.1)
            await trio.sleep(pause)

    def _little_to_replay(self) -> bool:
        """Whether the next checkpoint can wait: it would save little reading, and no dead letter
        waits for it."""
        book, covers = self._letters.book, self._covers
        if covers is None or book.total or book.retries():
            return False
        return self._beyond(covers.progress) < self._schedule.log_bytes

    async def save(self, last: bool = False) -> bool:
        """Save a checkpoint; returns whether that worked. Waits first until everything that left
        the traces is stored. ``last`` is set when the service stops."""
        async with self._saving:
            # Before the traces, so that those in the filter need not be read from the log.
            closed = await self._threads.run(self._copy_filter, last)
            retried = self._letters.book.retries()
            recorded = await self._threads.run(self._record.last_entries)
            try:
                snapshot = await self._threads.run(self._traces.snapshot)
            except NotNow as error:
                self.failures += 1
                _log.warning("this checkpoint is skipped: %s", error)
                return False
            letters = self._letters.book.saved_in(retried, snapshot.progress)
            if not self._letters.book.spans:
                await self._threads.run(self._correlate.settled)
            snapshot = replace(snapshot, letters=letters, recorded=recorded)
            began = trio.current_time()
            await self._in_flight.wait(snapshot.mark)
            self._waited = trio.current_time() - began
            try:
                self.saved_bytes = await self._threads.run(
                    write_checkpoint, self._directory, snapshot
                )
                if closed is not None:
                    await self._threads.run(write_filter, self._directory / FILTER, closed)
                    self._filter = closed.about
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
                _log.warning("processed dead letters cannot be deleted yet: %s", error)
            return True

    def _copy_filter(self, last: bool) -> SavedFilter | None:
        """A copy of the filter if it is to be saved."""
        now = time.monotonic()
        if now - self._filter_at < FILTER_SECONDS and not last:
            return None
        with self._traces.lock:
            if self._closed.saved() == self._filter or not self._closed.added:
                return None
            self._filter_at = now
            return SavedFilter.of(self._closed, time.time_ns())


def _outline(snapshot: Snapshot) -> Snapshot:
    """A snapshot without its large parts."""
    tenants = [
        replace(
            saved,
            tables=[
                replace(
                    table, arrays={"fill": table.arrays["fill"]}, signal_history=[], definitions=b""
                )
                for table in saved.tables
            ],
        )
        for saved in snapshot.tenants
    ]
    return replace(snapshot, tenants=tenants, ledger_history={}, partial_folds={})


def _count(snapshot: Snapshot, which: int) -> int:
    return sum(int(t.arrays["fill"][which]) for saved in snapshot.tenants for t in saved.tables)
