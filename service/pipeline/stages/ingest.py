"""span-ingestion: decode, validate, append to the span log, answer the client.

All waiting requests are handled in one worker-thread call, because a call costs about as much as
scanning several hundred spans. A few small requests cost less than the call; they are handled on
Trio's thread, unless the disk is busy. Requests that take long are handled one by one in another
thread (:mod:`betrace.service.pipeline.stages.heavy`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import cast

import numpy as np
import trio

from betrace.channels import SendChannel, ThreadRunner
from betrace.service.otlp.columns import SPAN_COUNT, SpanBatch
from betrace.service.pipeline.batch_audit import BatchAudit
from betrace.service.pipeline.log_sync import GroupSync
from betrace.service.pipeline.progress import TenantClosed
from betrace.service.pipeline.request import Done, Refused, Request
from betrace.service.pipeline.rules_in_force import LogWriter
from betrace.service.pipeline.scanning import (
    QUICK_BYTES,
    QUICK_SPANS,
    SMALL_BYTES,
    IngestCounts,
    Outcome,
    are_small,
    scan_requests,
    scanned_outcome,
)
from betrace.service.pipeline.stages.heavy import HeavyRequests
from betrace.service.storage.spanlog.errors import LogWriteError
from betrace.service.storage.spanlog.frames import ContentType, Encoding, Frame
from betrace.service.storage.spanlog.log import LogSyncError

FULL = 0.75  # fill of the next channel above which requests wait in this one
SLOW_SECONDS = 0.02  # a write of a small request that takes longer means that the disk is busy
# For so long after a slow write everything goes to the thread; twice as long if the next one comes
# within RELAPSE_SECONDS after that.
THREAD_SECONDS = 0.5
MOST_THREAD_SECONDS = 16.0
RELAPSE_SECONDS = 5.0
PORTION_BYTES = QUICK_BYTES  # of several tenants' requests that are handled together
POLITE_SECONDS = 0.5  # before a batch of many spans waits in turn for the next channel
_INFLATED = 8  # times the size of a compressed body, in such a portion


class IngestStage:
    """The handler of the span-ingestion stage.

    With ``durable``, a request is answered only when ``sync`` has made its frame survive a machine
    crash. ``audit`` records each accepted request. Requests that take long are handled in
    ``heavy_threads``.
    """

    def __init__(
        self,
        writer: LogWriter,
        threads: ThreadRunner,
        onward: SendChannel[SpanBatch],
        max_body_bytes: int,
        sync: GroupSync,
        durable: bool = False,
        audit: BatchAudit | None = None,
        heavy_threads: ThreadRunner | None = None,
    ) -> None:
        self._writer = writer
        self._threads = threads
        self._onward = onward
        self._max_body = max_body_bytes
        self._sync = sync
        self._durable = durable
        self._inline_from = -math.inf
        self._thread_seconds = THREAD_SECONDS
        self._audit = audit
        self._heavy_threads = heavy_threads or threads
        self.heavy = HeavyRequests(self._handle_heavy)
        """Requests that take long."""
        self.pass_on_many: Callable[[SpanBatch], Awaitable[object]] = onward.send
        """Takes a batch of very many spans, which would keep others out of the next channel."""
        self.counts = IngestCounts()

    async def handle(self, requests: list[Request]) -> None:
        """Write requests to the log, answer them, and pass on their spans. After a failure, those
        that were answered come again and are skipped."""
        for portion in _portions([each for each in requests if not each.finished]):
            await self._handle(portion)

    async def _handle(self, requests: list[Request]) -> None:
        not_quick: list[int] = []
        if self._fits_inline(requests):
            batches, outcomes = self._ingest_inline(requests)
        else:
            batches, outcomes = await self._threads.run(self._ingest, requests, not_quick)
        for number in not_quick:
            self.set_aside(requests[number])
        if not_quick:
            left = [i for i in range(len(requests)) if i not in not_quick]
            requests, outcomes = [requests[i] for i in left], [outcomes[i] for i in left]
        await self._make_durable(requests, batches, outcomes)
        self._answer(requests, outcomes)
        await self._onward.send_each(batches)
        for request in requests:
            request.release()

    def set_aside(self, request: Request) -> None:
        """Let a request wait among those that take long, without capacity of the channel."""
        request.release()
        request.aside = True
        self.heavy.add(request)

    async def _handle_heavy(self, request: Request) -> float:
        """Handle a request that takes long; returns the CPU seconds."""
        requests = [request]

        def ingest() -> tuple[list[SpanBatch], list[Outcome]]:
            started = time.thread_time()
            try:
                return self._ingest(requests)
            finally:
                request.seconds = time.thread_time() - started

        try:
            batches, outcomes = await self._heavy_threads.run(ingest)
            await self._make_durable(requests, batches, outcomes)
        except Exception as error:
            self.counts.failed(request, error)
            raise
        self._answer(requests, outcomes)
        request.release()
        for batch in batches:
            await self._pass_on(batch)
        return request.seconds

    async def _pass_on(self, batch: SpanBatch) -> None:
        """Pass on a batch of many spans. It does not block smaller batches that would fit into the
        channel."""
        if len(batch) > QUICK_SPANS:
            await self.pass_on_many(batch)
            return
        with trio.move_on_after(POLITE_SECONDS):
            while True:
                try:
                    self._onward.send_nowait(batch)
                except trio.WouldBlock:
                    await trio.sleep(0.001)
                else:
                    return
        await self._onward.send(batch)

    async def _make_durable(
        self, requests: list[Request], batches: list[SpanBatch], outcomes: list[Outcome]
    ) -> None:
        """If answers wait for the disk, wait for it; what it did not take is refused."""
        if not self._durable or not batches:
            return
        try:
            await self._sync.sync({batch.tenant for batch in batches})
        except LogSyncError as error:
            for i, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
                concerned = request.tenant in error.tenants
                if concerned and isinstance(outcome, Done) and outcome.spans:
                    outcomes[i] = Refused(503, str(error))
                    self.counts.unacknowledged += outcome.spans

    def handle_now(self, request: Request) -> bool:
        """Handle a small request on this thread, at once. Returns whether it was handled."""
        if self._durable or self._onward.fill > FULL or not self._fits_inline([request]):
            return False
        try:
            batches, outcomes = self._ingest_inline([request])
        except Exception:  # the stage tries it again, and reports it
            return False
        self._answer([request], outcomes)
        with suppress(trio.BrokenResourceError):  # stopped without draining: the log has them
            for batch in batches:
                self._onward.send_over(batch)
        request.release()
        return True

    def _answer(self, requests: list[Request], outcomes: list[Outcome]) -> None:
        for request, outcome in zip(requests, outcomes, strict=True):
            self.counts.answer(request, outcome)
            if self._audit is not None and isinstance(outcome, Done):
                self._audit.accepted(request, outcome)

    async def refuse(self, request: Request, error: Exception, attempts: int) -> None:
        """Refuse a request that the stage failed on; the client still has it and may retry."""
        self.counts.failed(request, error)
        await trio.lowlevel.checkpoint()

    def _fits_inline(self, requests: list[Request]) -> bool:
        """Whether handling the requests takes less time than a call in a thread and does not wait
        for the disk."""
        if self._sync.running or trio.current_time() < self._inline_from:
            return False
        return are_small(requests) and all(
            self._writer.is_ready(request.tenant, 2 * SMALL_BYTES) for request in requests
        )

    def _ingest_inline(self, requests: list[Request]) -> tuple[list[SpanBatch], list[Outcome]]:
        started = time.perf_counter()
        try:
            return self._ingest(requests)
        finally:
            if time.perf_counter() - started > SLOW_SECONDS:
                self._use_thread()

    def _use_thread(self) -> None:
        """Handle nothing on Trio's thread for a while, because the disk is busy."""
        now = trio.current_time()
        relapse = now - self._inline_from < RELAPSE_SECONDS
        longer = min(2 * self._thread_seconds, MOST_THREAD_SECONDS)
        self._thread_seconds = longer if relapse else THREAD_SECONDS
        self._inline_from = now + self._thread_seconds

    def _ingest(
        self, requests: list[Request], not_quick: list[int] | None = None
    ) -> tuple[list[SpanBatch], list[Outcome]]:
        """One batch per tenant, and one for each of its requests that may have very many spans, and
        each request's outcome; blocks on the disk. ``not_quick``: see :func:`scan_requests`."""
        # All are scanned before the first is appended, so that if one raises, none is in the log
        # and all can be handled again.
        scanned, outcomes = scan_requests(requests, self._max_body, not_quick)
        batches = []
        for each in scanned:
            self._writer.choose_rules(each.batch)
        for each in scanned:
            batch, numbers = each.batch, each.numbers
            rows = batch.bodies.tolist()
            try:
                positions = self._append(batch, [requests[i] for i in numbers], rows)
            except TenantClosed:
                for i in numbers:
                    outcomes[i] = Refused(403, f"the tenant {batch.tenant} is deleted")
                continue
            for i, row, position in zip(numbers, rows, positions, strict=True):
                outcomes[i] = _outcome(row, position)
            if len(batch) and batch.received_ns:
                batches.append(batch)
        return batches, outcomes

    def _append(
        self, batch: SpanBatch, requests: Sequence[Request], rows: Sequence[Sequence[int]]
    ) -> list[int]:
        """Append the bodies that have spans to the log; returns the position of each, 0 if it is
        not in the log. ``rows`` are those of ``batch.bodies``. Sets the batch's positions and time;
        the time stays 0 if the log could not be written."""
        frames = [
            Frame(
                cast(ContentType, request.content_type),
                cast(Encoding, request.encoding),
                request.received_ns,
                request.body,
                row[SPAN_COUNT],
            )
            for request, row in zip(requests, rows, strict=True)
            if row[SPAN_COUNT]
        ]
        positions = [0] * len(rows)
        if frames:
            try:
                written = iter(self._writer.append(batch, frames))
                positions = [next(written) if row[SPAN_COUNT] else 0 for row in rows]
                batch.received_ns = max(frame.received_ns for frame in frames)
            except LogWriteError:
                pass
        batch.positions = np.array(positions, np.int64)
        return positions


def _portions(requests: list[Request]) -> list[list[Request]]:
    """The requests in the order in which they are handled. Those of several tenants are handled in
    portions, small tenants first, so that these do not wait for the others."""
    if len(requests) <= 1 or all(each.tenant == requests[0].tenant for each in requests):
        return [requests] if requests else []
    by_tenant: dict[str, list[Request]] = {}
    sizes: dict[str, int] = {}
    for request in requests:
        by_tenant.setdefault(request.tenant, []).append(request)
        size = len(request.body) * (_INFLATED if request.encoding else 1)
        sizes[request.tenant] = sizes.get(request.tenant, 0) + size
    if sum(sizes.values()) <= PORTION_BYTES:
        return [requests]
    portions: list[list[Request]] = [[]]
    left = PORTION_BYTES
    for tenant in sorted(sizes, key=sizes.__getitem__):
        if portions[-1] and sizes[tenant] > left:
            portions.append([])
            left = PORTION_BYTES
        portions[-1] += by_tenant[tenant]
        left -= sizes[tenant]
    return portions


def _outcome(row: Sequence[int], position: int) -> Outcome:
    if row[SPAN_COUNT] and not position:
        return Refused(503, "the span log cannot be written; send the spans again later")
    return scanned_outcome(row, position)
