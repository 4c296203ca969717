"""Dead letters: items that a stage failed on for good are kept, retried and finally deleted.

An item is durable in :class:`~betrace.service.storage.dead_letters.DeadLetterStore` before its
stage drops it. Letters of transient errors are retried automatically after a while, the others when
an operator asks for it. A letter is deleted only when its item is safe elsewhere:

- due traces and decided traces, when their ticket (:class:`InFlight`) is returned: then their
  signals and rows are in a store, in a fallback file, or in the letter of a later stage;
- spans, when the checkpoints contain the traces that they were folded into, see
  :meth:`LetterBook.saved_in`.

After a crash an item may be processed twice, which changes nothing; it is never lost.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import trio

from betrace.channels import ThreadRunner, TransientError, is_expected
from betrace.service.pipeline import letter_codec
from betrace.service.pipeline.letter_book import SPANS_STAGE, LetterBook, any_unfolded
from betrace.service.pipeline.letter_codec import Item, RulesAt
from betrace.service.pipeline.letter_retries import LetterRetries, leave
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.storage.dead_letters import MAX_LIMIT, DeadLetterStore, Letter, NewLetter
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.telemetry import events

LOG_SECONDS = 5.0  # between two log lines about the same stage
_SECOND = 1_000_000_000

Bury = Callable[[str, list[Any], Exception, int], Awaitable[None]]
"""Keeps items that a stage failed on together: (stage, items, error, attempts)."""


class DeadLetters:
    """Keeps items that failed. Methods are called on the Trio thread; async ones raise
    :exc:`DeadLetterError` if the disk fails.

    Args:
      store: where letters are kept.
      log: the span log, from which batches of spans are read again.
      progress, in_flight: how far spans and due traces have come.
      max_body_bytes: limit of a decoded frame.
      retry_seconds: letters of transient errors are retried after this.
      clock_ns: the wall clock.
      rules_at: the rules of a frame of the log.
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
        rules_at: RulesAt = lambda tenant, position: None,
    ) -> None:
        self._store = store
        self._progress = progress
        self._in_flight = in_flight
        self._retry_ns = int(retry_seconds * _SECOND)
        self._clock_ns = clock_ns
        self._threads = ThreadRunner("dead-letters", 2)
        self.book = LetterBook(store.counts())
        decode = partial(
            letter_codec.decode, log=log, max_body_bytes=max_body_bytes, rules_at=rules_at
        )
        self.retries = LetterRetries(
            store, self.book, self._threads, decode, progress, in_flight, clock_ns
        )
        # By stage: letters not logged yet, and the time of the last log line.
        self._unlogged: dict[str, tuple[int, float]] = {}

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
        retried = [r for item in items if (r := self.book.retry_of(stage, item)) is not None]
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
        self.book.exported(self._store.take_exported())  # while the retried ones are in progress
        self.book.kept(stage, fresh, new, retried)
        for item in items:
            leave(item, self._progress, self._in_flight)
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

    # For the checkpoint

    async def saved(self, ids: Iterable[int]) -> None:
        """Note that a checkpoint with the spans of these letters is durable. They are deleted when
        every checkpoint that may be loaded contains them."""
        complete = self.book.saved(ids)
        if complete:
            await self._threads.run(self._store.delete, complete)
            self.book.saved_deleted(complete)

    async def reconcile(self, saved: Iterable[int]) -> None:
        """Delete letters whose spans are in the checkpoint (``saved`` is its
        :meth:`LetterBook.saved_in`) or will be read from the log. Call it at the start, after the
        checkpoint was loaded and before the log is read."""
        progress = self._progress.snapshot()

        def delete_stale() -> dict[str, tuple[int, int]]:
            ids = set(saved)
            after = 0
            while page := self._store.page(stage=SPANS_STAGE, after=after, limit=1000):
                after = page[-1].id
                for letter in page:
                    found = self._store.get(letter.id)
                    if found is not None and any_unfolded(
                        progress, letter.tenant, letter_codec.positions_in(found[1])
                    ):
                        ids.add(letter.id)
            return self._store.delete(ids)

        self.book.stale(await self._threads.run(delete_stale))

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
        self.book.wake.unpark_all()
        return found

    async def discard(self, letter_ids: list[int]) -> int:
        """Delete letters for good; returns how many. A letter that is being retried is not deleted,
        because its item is in progress."""
        busy = self.book.all_busy()
        ids = [each for each in letter_ids if each not in busy]
        return self.book.discarded(await self._threads.run(self._store.delete, ids))

    # Deletion of tenants

    def close_tenant(self, tenant: str) -> None:
        """Stop retrying letters of a tenant."""
        self.retries.closed.add(tenant)

    def reopen_tenant(self, tenant: str) -> None:
        """Retry letters of a tenant again."""
        self.retries.closed.discard(tenant)

    async def forget_tenant(self, tenant: str) -> None:
        """Delete all letters of a tenant, including those moved to files. Nothing of the tenant may
        be in progress."""
        while page := await self.page(None, tenant, MAX_LIMIT, 0):
            await self._threads.run(self._store.delete, {letter.id for letter in page})
            self.book.forgotten(page)
        await self._threads.run(self._store.drop_exported, tenant)

    def close(self) -> None:
        """End the worker threads."""
        self._threads.close()
