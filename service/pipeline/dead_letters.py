"""Dead letters: items that a stage failed on for good are kept, retried and finally deleted.

An item is durable in :class:`~betrace.service.storage.dead_letters.DeadLetterStore` before its
stage drops it. Letters of transient errors are retried automatically after a while, the others when
an operator asks for it. A letter is deleted only when its item is safe elsewhere:

- due traces and decided traces, when their ticket (:class:`InFlight`) is returned: then their
  signals and rows are in a store, in a fallback file, or in the letter of a later stage;
- spans, when the checkpoints contain the traces that they were folded into, see
  :meth:`DeadLetters.saved_in`.

After a crash an item may be processed twice, which changes nothing; it is never lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

import trio

from betrace.channels import SendChannel, ThreadRunner, TransientError, is_expected
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline import letter_codec
from betrace.service.pipeline.letter_codec import (
    DeadLetterCounts,
    Item,
    LetterError,
    LetterTotals,
    Retry,
)
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.storage.dead_letters import (
    MAX_LIMIT,
    DeadLetterError,
    DeadLetterStore,
    Letter,
    NewLetter,
)
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.telemetry import events
from betrace.service.traces.checkpoint import KEPT

_log = logging.getLogger("service.deadletters")

SPANS_STAGE = "trace-correlation"
POLL_SECONDS = 1.0
LOG_SECONDS = 5.0  # between two log lines about the same stage
MOST_RETRIED_AT_ONCE = 64  # letters of a stage
_MOST_BUSY = 10_000  # letters of a stage, including those that are done and not deleted yet
_SECOND = 1_000_000_000

Bury = Callable[[str, list[Any], Exception, int], Awaitable[None]]
"""Keeps items that a stage failed on together: (stage, items, error, attempts)."""

Progress = Mapping[str, tuple[int, list[int]]]


class DeadLetters:
    """Keeps items that failed and sends them to their stages again. Methods are called on the Trio
    thread; async ones raise :exc:`DeadLetterError` if the disk fails.

    Args:
      store: where letters are kept.
      log: the span log, from which batches of spans are read again.
      progress, in_flight: how far spans and due traces have come.
      max_body_bytes: limit of a decoded frame.
      retry_seconds: letters of transient errors are retried after this.
      clock_ns: the wall clock.
    """

    def __init__(
        self,
        store: DeadLetterStore,
        log: SpanLog,
        progress: LogProgress,
        in_flight: InFlight,
        max_body_bytes: int,
        retry_seconds: float,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._store = store
        self._log = log
        self._progress = progress
        self._in_flight = in_flight
        self._max_body = max_body_bytes
        self._retry_ns = int(retry_seconds * _SECOND)
        self._clock_ns = clock_ns
        self._threads = ThreadRunner("dead-letters", 2)
        self._retrying: dict[tuple[Any, ...], Retry] = {}
        self._busy: dict[str, set[int]] = {}  # ids being retried, or done but not deleted yet
        self._folded: dict[int, Retry] = {}  # done, by id; not yet in all checkpoints
        self._done: list[int] = []
        self._closed: set[str] = set()  # tenants
        self._wake = trio.lowlevel.ParkingLot()
        self.counts = DeadLetterCounts()
        # By stage: letters not logged yet, and the time of the last log line.
        self._unlogged: dict[str, tuple[int, float]] = {}
        self.held: dict[str, LetterTotals] = {}
        for stage, count in store.counts().items():
            self.held[stage] = LetterTotals(count.letters, count.weight)
        self.carried_spans = self.spans
        """Spans in letters that existed at the start."""

    # For the accounts and metrics

    @property
    def spans(self) -> int:
        """Spans in letters, which were never folded."""
        return self._held(SPANS_STAGE).weight

    @property
    def retrying_spans(self) -> int:
        """The part of :attr:`spans` that was sent to its stage again and is not done."""
        return sum(
            retry.letter.weight
            for retry in self._retrying.values()
            if retry.letter.stage == SPANS_STAGE
        )

    @property
    def total(self) -> int:
        """The number of letters."""
        return sum(held.letters for held in self.held.values())

    @property
    def payload_bytes(self) -> int:
        """Size of all payloads in bytes."""
        return self._store.payload_bytes

    @property
    def exported(self) -> int:
        """Letters moved to files since the start because the limit was reached."""
        return self._store.exported

    # For the stages

    async def bury(self, stage: str, item: Any, error: Exception, attempts: int) -> None:
        """Keep an item that ``stage`` failed on; it is durable when this returns."""
        await self.bury_all(stage, [item], error, attempts)

    async def bury_all(self, stage: str, items: list[Any], error: Exception, attempts: int) -> None:
        """Keep several items that failed together, in one transaction."""
        transient = is_expected(error, (TransientError,))
        next_retry = self._clock_ns() + self._retry_ns if transient else None
        text = f"{type(error).__name__}: {error}"
        retried = [r for item in items if (r := self._retry_of(stage, item)) is not None]
        again = {id(retry.item) for retry in retried}
        fresh = [item for item in items if id(item) not in again]

        def letter_of(item: Item) -> NewLetter:
            kind, payload = letter_codec.encode(item)
            weight = letter_codec.weigh(item)
            return NewLetter(
                item.tenant, stage, kind, payload, weight, text, transient, attempts, next_retry
            )

        def keep() -> list[bool]:
            exported = [
                retry.item
                for retry in retried
                if not self._store.failed_again(
                    retry.letter.id,
                    text,
                    transient=transient,
                    attempts=attempts,
                    next_retry_ns=next_retry,
                )
            ]
            return self._store.add([letter_of(item) for item in [*fresh, *exported]])

        new = await self._threads.run(keep)
        # No checkpoint from here to the return: the stage drops the items in the same step.
        held = self._held(stage)
        for item, is_new in zip(fresh, new, strict=False):
            held.letters += is_new
            held.weight += letter_codec.weigh(item) * is_new
            self.counts.kept += is_new
        self._note_exports()
        for retry in retried:
            self._retrying.pop(_key(retry.item), None)
            self._busy[stage].discard(retry.letter.id)
        for item in items:
            if isinstance(item, SpanBatch):
                self._progress.folded(item.tenant, letter_codec.frame_positions(item))
            else:
                self._in_flight.leave(item.ticket)
        self._wake.unpark_all()
        self._report(stage, len(items), attempts, text, transient)

    def _report(self, stage: str, items: int, attempts: int, error: str, transient: bool) -> None:
        """Log new letters, at most once in :data:`LOG_SECONDS` for each stage."""
        unlogged, last = self._unlogged.get(stage, (0, -LOG_SECONDS))
        now = trio.current_time()
        if now - last < LOG_SECONDS:
            self._unlogged[stage] = unlogged + items, last
            return
        self._unlogged[stage] = 0, now
        events.DEAD_LETTERS(
            items=unlogged + items,
            stage=stage,
            attempts=attempts,
            again=", to be tried again" if transient else "",
            error=error,
        )

    def finished(self, items: Iterable[Any]) -> None:
        """Note items as folded; call it in the same step that drops them."""
        if self._retrying:
            for item in items:
                retry = self._retrying.pop(_key(item), None)
                if retry is not None:
                    self._folded[retry.letter.id] = retry
                    self._recovered(retry)

    def left(self, ticket: int) -> None:
        """Note a returned ticket: its work is safe."""
        retry = self._retrying.pop((ticket,), None)
        if retry is not None:
            self._done.append(retry.letter.id)
            self._recovered(retry)
            self._wake.unpark_all()

    def _recovered(self, retry: Retry) -> None:
        held = self._held(retry.letter.stage)
        held.letters -= 1
        held.weight -= retry.letter.weight
        self.counts.recovered += 1

    # For the checkpoint

    def retries(self) -> list[Retry]:
        """Letters of spans that were sent to their stage again. Call it before the traces are
        copied for a checkpoint, and pass the result to :meth:`saved_in`."""
        waiting = [r for r in self._retrying.values() if isinstance(r.item, SpanBatch)]
        return waiting + list(self._folded.values())

    def saved_in(self, before: list[Retry], progress: Progress) -> list[int]:
        """The ids of the letters whose spans are in the copy. ``before`` is the result of
        :meth:`retries` before the copy was made, ``progress`` the copy's log positions."""
        ids = []
        for retry in before:
            known = retry in (
                self._folded.get(retry.letter.id),
                self._retrying.get(_key(retry.item)),
            )
            assert isinstance(retry.item, SpanBatch)
            positions = letter_codec.frame_positions(retry.item)
            if known and not _unfolded(progress, retry.item.tenant, positions):
                ids.append(retry.letter.id)
        return ids

    async def saved(self, ids: Iterable[int]) -> None:
        """Note that a checkpoint with the spans of these letters is durable. They are deleted when
        every checkpoint that may be loaded contains them."""
        gone = []
        for letter_id in ids:
            retry = self._folded.get(letter_id)
            if retry is not None:
                retry.saved += 1
                if retry.saved >= KEPT:
                    gone.append(letter_id)
        if not gone:
            return
        await self._threads.run(self._store.delete, gone)
        for letter_id in gone:
            del self._folded[letter_id]
            self._busy[SPANS_STAGE].discard(letter_id)

    async def reconcile(self, saved: Iterable[int]) -> None:
        """Delete letters whose spans are in the checkpoint (``saved`` is its :meth:`saved_in`) or
        will be read from the log. Call it at the start, after the checkpoint was loaded and before
        the log is read."""
        progress = self._progress.snapshot()

        def stale() -> dict[str, tuple[int, int]]:
            ids = set(saved)
            after = 0
            while page := self._store.page(stage=SPANS_STAGE, after=after, limit=1000):
                after = page[-1].id
                for letter in page:
                    found = self._store.get(letter.id)
                    if found is not None and _unfolded(
                        progress, letter.tenant, letter_codec.positions_in(found[1])
                    ):
                        ids.add(letter.id)
            return self._store.delete(ids)

        for stage, (number, weight) in (await self._threads.run(stale)).items():
            self._held(stage).letters -= number
            self._held(stage).weight -= weight
        self.carried_spans = self.spans

    # Retries

    async def run(self, channels: Mapping[str, SendChannel[Any]]) -> None:
        """Send due letters to their stages again, forever; ``channels`` lead to the stages."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            for stage, channel in channels.items():
                nursery.start_soon(self._retry_stage, stage, channel)

    async def _sweep(self) -> None:
        """Delete letters that are done, forever."""
        while True:
            if not self._done:
                await self._wake.park()
            done, self._done = self._done, []
            if not done:
                continue
            try:
                await self._threads.run(self._store.delete, done)
            except DeadLetterError as error:
                _log.warning("processed dead letters cannot be deleted yet: %s", error)
                self._done += done
                await trio.sleep(POLL_SECONDS)
            else:
                for busy in self._busy.values():
                    busy.difference_update(done)

    async def _wait(self) -> None:
        with trio.move_on_after(POLL_SECONDS):
            await self._wake.park()

    async def _retry_stage(self, stage: str, channel: SendChannel[Any]) -> None:
        busy = self._busy.setdefault(stage, set())
        while True:
            retrying = sum(r.letter.stage == stage for r in self._retrying.values())
            most = min(MOST_RETRIED_AT_ONCE - retrying, _MOST_BUSY - len(busy))
            try:
                ids = []
                if most > 0 and self._held(stage).letters:
                    ids = await self._threads.run(
                        self._store.due, stage, self._clock_ns(), most, tuple(busy)
                    )
                for letter_id in ids:
                    await self._retry(letter_id, channel)
            except DeadLetterError as error:
                _log.warning("dead letters of %s cannot be retried now: %s", stage, error)
                ids = []
            if not ids and self._held(stage).letters:
                await self._wait()
            elif not ids:
                await self._wake.park()

    async def _retry(self, letter_id: int, channel: SendChannel[Any]) -> None:
        found = await self._threads.run(self._store.get, letter_id)
        if found is None:
            return
        letter, payload = found
        try:
            item = await self._threads.run(
                letter_codec.decode, letter.tenant, letter.kind, payload, self._log, self._max_body
            )
        except LetterError as error:
            fail = partial(
                self._store.failed_again, transient=False, attempts=0, next_retry_ns=None
            )
            await self._threads.run(fail, letter_id, str(error))
            return
        if letter.tenant in self._closed:
            return
        if isinstance(item, SpanBatch):
            self._progress.register(item.tenant, letter_codec.frame_positions(item))
        else:
            item.ticket = self._in_flight.enter()
        stage = letter.stage
        self._retrying[_key(item)] = Retry(letter, item)
        self._busy[stage].add(letter_id)
        self.counts.retried += 1
        sent = self.counts.retried_weight
        sent[stage] = sent.get(stage, 0) + letter.weight
        try:
            await channel.send(item)
        except BaseException:  # the service stops: the next one retries the letter
            del self._retrying[_key(item)]
            if isinstance(item, SpanBatch):
                self._progress.folded(item.tenant, letter_codec.frame_positions(item))
            else:
                self._in_flight.leave(item.ticket)
            raise

    def _retry_of(self, stage: str, item: Item) -> Retry | None:
        """The letter that an item comes from, if it failed in ``stage`` before."""
        retry = self._retrying.get(_key(item))
        return retry if retry is not None and retry.letter.stage == stage else None

    # For operators

    async def page(
        self, stage: str | None, tenant: str | None, limit: int, after: int
    ) -> list[Letter]:
        """Letters with an id above ``after``, oldest first."""
        ask = partial(self._store.page, stage=stage, tenant=tenant, limit=limit, after=after)
        return await self._threads.run(ask)

    async def get(self, letter_id: int) -> tuple[Letter, dict[str, Any]] | None:
        """A letter and a description of its payload."""

        def read() -> tuple[Letter, dict[str, Any]] | None:
            found = self._store.get(letter_id)
            return (
                None
                if found is None
                else (found[0], letter_codec.describe(found[0].kind, found[1]))
            )

        return await self._threads.run(read)

    async def retry(
        self,
        letter_ids: list[int] | None = None,
        stage: str | None = None,
        tenant: str | None = None,
    ) -> int:
        """Retry letters now, by id or all that match the filters; returns how many."""
        ask = partial(self._store.retry, letter_ids, stage=stage, tenant=tenant)
        found = await self._threads.run(ask)
        self._wake.unpark_all()
        return found

    async def discard(self, letter_ids: list[int]) -> int:
        """Delete letters for good; returns how many. A letter that is being retried is not deleted,
        because its item is in progress."""
        busy = {each for ids in self._busy.values() for each in ids}
        ids = [each for each in letter_ids if each not in busy]
        deleted = await self._threads.run(self._store.delete, ids)
        found = 0
        for stage, (number, weight) in deleted.items():
            held = self._held(stage)
            held.letters -= number
            held.weight -= weight
            lost = self.counts.lost_weight
            lost[stage] = lost.get(stage, 0) + weight
            found += number
        self.counts.discarded += found
        return found

    # Deletion of tenants

    def close_tenant(self, tenant: str) -> None:
        """Stop retrying letters of a tenant."""
        self._closed.add(tenant)

    def reopen_tenant(self, tenant: str) -> None:
        """Retry letters of a tenant again."""
        self._closed.discard(tenant)

    async def forget_tenant(self, tenant: str) -> None:
        """Delete all letters of a tenant, including those moved to files. Nothing of the tenant may
        be in progress."""
        while page := await self.page(None, tenant, MAX_LIMIT, 0):
            ids = {letter.id for letter in page}
            await self._threads.run(self._store.delete, ids)
            for letter in page:
                finished = letter.id in self._folded or letter.id in self._done
                self._folded.pop(letter.id, None)
                if not finished:
                    self._lose(letter)
                    self.counts.discarded += 1
            self._done = [each for each in self._done if each not in ids]
            for busy in self._busy.values():
                busy -= ids
        await self._threads.run(self._store.drop_exported, tenant)

    def _lose(self, letter: Letter) -> None:
        held = self._held(letter.stage)
        held.letters -= 1
        held.weight -= letter.weight
        lost = self.counts.lost_weight
        lost[letter.stage] = lost.get(letter.stage, 0) + letter.weight

    def close(self) -> None:
        """End the worker threads."""
        self._threads.close()

    def _held(self, stage: str) -> LetterTotals:
        return self.held.setdefault(stage, LetterTotals())

    def _note_exports(self) -> None:
        """Subtract letters that the store moved to files from the totals, except those in progress,
        which count until their stage is done with them."""
        in_progress = {retry.letter.id for retry in self._retrying.values()}
        for letter in self._store.take_exported():
            if letter.id in in_progress or letter.id in self._folded or letter.id in self._done:
                continue
            self._lose(letter)


def _key(item: Item) -> tuple[Any, ...]:
    if isinstance(item, SpanBatch):
        return (item.tenant, *letter_codec.frame_positions(item)[:1])
    return (item.ticket,)


def _unfolded(progress: Progress, tenant: str, positions: list[int]) -> bool:
    """Whether some frames are not folded yet: pending, or beyond the last."""
    last, pending = progress.get(tenant, (0, []))
    return any(position > last or position in pending for position in positions)
