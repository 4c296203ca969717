"""What happens to items that a stage failed on for good: kept, tried again, let go.

An item is kept in :class:`~betrace.service.storage.dead_letters.DeadLetterStore` before its stage
lets go of
it. Letters of transient errors are given to their stage again by themselves after a while, the
others when an operator says so. A letter is deleted only when the item is safe elsewhere:

- due traces, and what was decided of them, when their ticket (:class:`InFlight`) is given back:
  then their signals and rows are stored, in a fallback file, or in the letter of a later stage;
- spans when the checkpoints have the traces that they were folded into, see
  :meth:`DeadLetters.saved_in`.

So an item may be worked on twice after a crash, which changes nothing, and is never lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import trio

from betrace.channels import SendChannel, ThreadRunner, TransientError, is_expected
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline import letter_codec as letters
from betrace.service.pipeline.letter_codec import DeadLetterCounts, Held, Item, LetterError, Retry
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
TELL_SECONDS = 5.0  # of a stage, between two lines of the log
MOST_RETRIED_AT_ONCE = 64  # letters of a stage
_MOST_BUSY = 10_000  # of a stage, those that are done and not deleted yet included
_SECOND = 1_000_000_000

Progress = Mapping[str, tuple[int, list[int]]]


class DeadLetters:
    """Keeps items that failed and gives them to their stages again. Methods are called on the Trio
    thread; those that are async raise :exc:`DeadLetterError` where the disk fails.

    Args:
      store: where they are kept.
      log: the span log, from which batches of spans are read again.
      progress, in_flight: how far spans and due traces have come.
      max_body_bytes: of a frame, decoded.
      retry_seconds: after which letters of transient errors are tried again.
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
        self._busy: dict[str, set[int]] = {}  # ids being retried, or done and not deleted yet
        self._folded: dict[int, Retry] = {}  # done, by id; a checkpoint must have them yet
        self._done: list[int] = []
        self._closed: set[str] = set()  # tenants
        self._wake = trio.lowlevel.ParkingLot()
        self.counts = DeadLetterCounts()
        self._told: dict[str, tuple[int, float]] = {}  # by stage: letters not logged, and when last
        self.held: dict[str, Held] = {}
        for stage, count in store.counts().items():
            self.held[stage] = Held(count.letters, count.weight)
        self.carried_spans = self.spans
        """Spans in letters that were there at the start."""

    # What the accounts and metrics want

    @property
    def spans(self) -> int:
        """Spans that were never folded, in letters."""
        return self._held(SPANS_STAGE).weight

    @property
    def retrying_spans(self) -> int:
        """Of those, the spans that were given to their stage again and are not done."""
        return sum(
            retry.letter.weight
            for retry in self._retrying.values()
            if retry.letter.stage == SPANS_STAGE
        )

    @property
    def total(self) -> int:
        """Letters."""
        return sum(held.letters for held in self.held.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of all payloads."""
        return self._store.payload_bytes

    @property
    def exported(self) -> int:
        """Letters that no longer fitted and were moved to files, since the start."""
        return self._store.exported

    # What stages tell

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
            kind, payload = letters.encode(item)
            weight = letters.weigh(item)
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
        # From here to the return nothing waits: the stage lets go of the items at the same time.
        held = self._held(stage)
        for item, is_new in zip(fresh, new, strict=False):
            held.letters += is_new
            held.weight += letters.weigh(item) * is_new
            self.counts.kept += is_new
        self._note_exports()
        for retry in retried:
            self._retrying.pop(_key(retry.item), None)
            self._busy[stage].discard(retry.letter.id)
        for item in items:
            if isinstance(item, SpanBatch):
                self._progress.folded(item.tenant, letters.frame_positions(item))
            else:
                self._in_flight.leave(item.ticket)
        self._tell(stage, len(items), attempts, text, transient)

    def _tell(self, stage: str, items: int, attempts: int, error: str, transient: bool) -> None:
        """Log it; of a stage that fails again and again, once in :data:`TELL_SECONDS`."""
        untold, last = self._told.get(stage, (0, -TELL_SECONDS))
        now = trio.current_time()
        if now - last < TELL_SECONDS:
            self._told[stage] = untold + items, last
            return
        self._told[stage] = 0, now
        events.DEAD_LETTERS(
            items=untold + items,
            stage=stage,
            attempts=attempts,
            again=", to be tried again" if transient else "",
            error=error,
        )

    def finished(self, items: Iterable[Any]) -> None:
        """The stage of spans is done with items; to be told in the step that lets go of them."""
        if self._retrying:
            for item in items:
                retry = self._retrying.pop(_key(item), None)
                if retry is not None:
                    self._folded[retry.letter.id] = retry
                    self._recovered(retry)

    def left(self, ticket: int) -> None:
        """A ticket was given back: what it was for is safe."""
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

    # What the checkpoint does

    def retries(self) -> list[Retry]:
        """Letters of spans that were given to their stage again; to be asked before the traces are
        copied for a checkpoint, for :meth:`saved_in`."""
        waiting = [r for r in self._retrying.values() if isinstance(r.item, SpanBatch)]
        return waiting + list(self._folded.values())

    def saved_in(self, before: list[Retry], progress: Progress) -> list[int]:
        """The ids of the letters whose spans the copy has. ``before`` is what :meth:`retries` said
        before it was made, ``progress`` what the copy says of the log."""
        ids = []
        for retry in before:
            known = retry in (
                self._folded.get(retry.letter.id),
                self._retrying.get(_key(retry.item)),
            )
            assert isinstance(retry.item, SpanBatch)
            positions = letters.frame_positions(retry.item)
            if known and not _unfolded(progress, retry.item.tenant, positions):
                ids.append(retry.letter.id)
        return ids

    async def saved(self, ids: Iterable[int]) -> None:
        """A checkpoint that has the spans of these letters is durable. They are deleted when every
        checkpoint that may be loaded has them."""
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
        """At the start, after a checkpoint was loaded and before the log is read: delete letters
        whose spans it has (``saved`` is what :meth:`saved_in` said of it), and those whose spans
        will be read from the log."""
        progress = self._progress.snapshot()

        def stale() -> dict[str, tuple[int, int]]:
            ids = set(saved)
            after = 0
            while page := self._store.page(stage=SPANS_STAGE, after=after, limit=1000):
                after = page[-1].id
                for letter in page:
                    found = self._store.get(letter.id)
                    if found is not None and _unfolded(
                        progress, letter.tenant, letters.positions_in(found[1])
                    ):
                        ids.add(letter.id)
            return self._store.delete(ids)

        for stage, (number, weight) in (await self._threads.run(stale)).items():
            self._held(stage).letters -= number
            self._held(stage).weight -= weight
        self.carried_spans = self.spans

    # Trying again

    async def run(self, channels: Mapping[str, SendChannel[Any]]) -> None:
        """Give letters to their stages again when their time has come, for ever; ``channels`` lead
        to the stages."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            for stage, channel in channels.items():
                nursery.start_soon(self._retry_stage, stage, channel)

    async def _sweep(self) -> None:
        """Delete the letters that are done."""
        while True:
            await self._nap()
            done, self._done = self._done, []
            if not done:
                continue
            try:
                await self._threads.run(self._store.delete, done)
            except DeadLetterError as error:
                _log.warning("dead letters that are done cannot be deleted yet: %s", error)
                self._done += done
                await trio.sleep(POLL_SECONDS)
            else:
                for busy in self._busy.values():
                    busy.difference_update(done)

    async def _nap(self) -> None:
        with trio.move_on_after(POLL_SECONDS):
            await self._wake.park()

    async def _retry_stage(self, stage: str, channel: SendChannel[Any]) -> None:
        busy = self._busy.setdefault(stage, set())
        while True:
            under_way = sum(r.letter.stage == stage for r in self._retrying.values())
            room = min(MOST_RETRIED_AT_ONCE - under_way, _MOST_BUSY - len(busy))
            try:
                ids = (
                    await self._threads.run(
                        self._store.due, stage, self._clock_ns(), room, tuple(busy)
                    )
                    if room > 0
                    else []
                )
                for letter_id in ids:
                    await self._retry(letter_id, channel)
            except DeadLetterError as error:
                _log.warning("dead letters of %s cannot be tried again now: %s", stage, error)
                ids = []
            if not ids:
                await self._nap()

    async def _retry(self, letter_id: int, channel: SendChannel[Any]) -> None:
        found = await self._threads.run(self._store.get, letter_id)
        if found is None:
            return
        letter, payload = found
        try:
            item = await self._threads.run(
                letters.decode, letter.tenant, letter.kind, payload, self._log, self._max_body
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
            self._progress.register(item.tenant, letters.frame_positions(item))
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
        except BaseException:  # the service stops: the letter is tried again by the next one
            del self._retrying[_key(item)]
            if isinstance(item, SpanBatch):
                self._progress.folded(item.tenant, letters.frame_positions(item))
            else:
                self._in_flight.leave(item.ticket)
            raise

    def _retry_of(self, stage: str, item: Item) -> Retry | None:
        """The letter that an item comes from, if ``stage`` is the one it failed in before."""
        retry = self._retrying.get(_key(item))
        return retry if retry is not None and retry.letter.stage == stage else None

    # What operators do

    async def page(
        self, stage: str | None, tenant: str | None, limit: int, after: int
    ) -> list[Letter]:
        """Letters, oldest first, with an id above ``after``."""
        ask = partial(self._store.page, stage=stage, tenant=tenant, limit=limit, after=after)
        return await self._threads.run(ask)

    async def get(self, letter_id: int) -> tuple[Letter, dict[str, Any]] | None:
        """A letter and what its payload holds."""

        def read() -> tuple[Letter, dict[str, Any]] | None:
            found = self._store.get(letter_id)
            return None if found is None else (found[0], letters.describe(found[0].kind, found[1]))

        return await self._threads.run(read)

    async def retry(
        self,
        letter_ids: list[int] | None = None,
        stage: str | None = None,
        tenant: str | None = None,
    ) -> int:
        """Have letters tried again now, by id, or all that the filters let through; how many."""
        ask = partial(self._store.retry, letter_ids, stage=stage, tenant=tenant)
        found = await self._threads.run(ask)
        self._wake.unpark_all()
        return found

    async def discard(self, letter_ids: list[int]) -> int:
        """Delete letters for good; how many. One that is being tried again is not deleted: its item
        is under way."""
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

    # What becomes of tenants

    def close_tenant(self, tenant: str) -> None:
        """Try no more letters of a tenant."""
        self._closed.add(tenant)

    def reopen_tenant(self, tenant: str) -> None:
        """Try letters of a tenant again."""
        self._closed.discard(tenant)

    async def forget_tenant(self, tenant: str) -> None:
        """Delete all letters of a tenant of whom nothing is under way, those moved to files too."""
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

    def _held(self, stage: str) -> Held:
        return self.held.setdefault(stage, Held())

    def _note_exports(self) -> None:
        """Take what the store moved to files out of the counts, but for what is under way: that is
        counted until its stage is done with it."""
        under_way = {retry.letter.id for retry in self._retrying.values()}
        for letter in self._store.take_exported():
            if letter.id in under_way or letter.id in self._folded or letter.id in self._done:
                continue
            self._lose(letter)


def _key(item: Item) -> tuple[Any, ...]:
    if isinstance(item, SpanBatch):
        return (item.tenant, *letters.frame_positions(item)[:1])
    return (item.ticket,)


def _unfolded(progress: Progress, tenant: str, positions: list[int]) -> bool:
    """Whether frames are yet to be folded: pending, or beyond the last."""
    last, pending = progress.get(tenant, (0, []))
    return any(position > last or position in pending for position in positions)
