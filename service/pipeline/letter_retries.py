"""Retries of dead letters: due letters are sent to their stages again, and letters whose items are
safe are deleted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import trio

from betrace.channels import SendChannel, ThreadRunner
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.letter_book import LetterBook
from betrace.service.pipeline.letter_codec import Item, LetterError, frame_positions
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.storage.dead_letters import DeadLetterError, DeadLetterStore

_log = logging.getLogger("service.deadletters")

POLL_SECONDS = 1.0
MOST_RETRIED_AT_ONCE = 64  # letters of a stage
_MOST_BUSY = 10_000  # letters of a stage, including those that are done and not deleted yet


class LetterRetries:
    """Sends letters to their stages again.

    Args:
      store: where letters are kept.
      book: which of them are retried or done.
      threads: run what blocks.
      decode: restores an item from a letter's tenant, kind and payload; blocks.
      progress, in_flight: what is sent is registered there.
      clock_ns: the wall clock.
    """

    def __init__(
        self,
        store: DeadLetterStore,
        book: LetterBook,
        threads: ThreadRunner,
        decode: Callable[[str, str, bytes], Item],
        progress: LogProgress,
        in_flight: InFlight,
        clock_ns: Callable[[], int],
    ) -> None:
        self._store = store
        self._book = book
        self._threads = threads
        self._decode = decode
        self._progress = progress
        self._in_flight = in_flight
        self._clock_ns = clock_ns
        self.closed: set[str] = set()
        """Tenants whose letters are not retried, because they are being deleted."""

    async def run(self, channels: Mapping[str, SendChannel[Any]]) -> None:
        """Send due letters to their stages again, forever; ``channels`` lead to the stages."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._delete_done)
            for stage, channel in channels.items():
                nursery.start_soon(self._retry_stage, stage, channel)

    async def _delete_done(self) -> None:
        """Delete letters that are done, forever."""
        book = self._book
        while True:
            done = book.take_done()
            if not done:
                await book.wake.park()
                continue
            try:
                await self._threads.run(self._store.delete, done)
            except DeadLetterError as error:
                _log.warning("processed dead letters cannot be deleted yet: %s", error)
                book.put_back(done)
                await trio.sleep(POLL_SECONDS)
            else:
                book.deleted(done)

    async def _retry_stage(self, stage: str, channel: SendChannel[Any]) -> None:
        book = self._book
        busy = book.busy(stage)
        while True:
            most = min(MOST_RETRIED_AT_ONCE - book.retrying(stage), _MOST_BUSY - len(busy))
            try:
                ids = []
                if most > 0 and book.totals(stage).letters:
                    ids = await self._threads.run(
                        self._store.due, stage, self._clock_ns(), most, tuple(busy)
                    )
                for letter_id in ids:
                    await self._retry(letter_id, channel)
            except DeadLetterError as error:
                _log.warning("dead letters of %s cannot be retried now: %s", stage, error)
                ids = []
            if not ids and book.totals(stage).letters:
                with trio.move_on_after(POLL_SECONDS):
                    await book.wake.park()
            elif not ids:
                await book.wake.park()

    async def _retry(self, letter_id: int, channel: SendChannel[Any]) -> None:
        found = await self._threads.run(self._store.get, letter_id)
        if found is None:
            return
        letter, payload = found
        try:
            item = await self._threads.run(self._decode, letter.tenant, letter.kind, payload)
        except LetterError as error:
            fail = partial(
                self._store.failed_again, transient=False, attempts=0, next_retry_ns=None
            )
            await self._threads.run(fail, letter_id, str(error))
            return
        if letter.tenant in self.closed:
            return
        if isinstance(item, SpanBatch):
            self._progress.register(item.tenant, frame_positions(item))
        else:
            item.ticket = self._in_flight.enter()
        self._book.sent(letter, item)
        try:
            await channel.send(item)
        except BaseException:  # the service stops: the next one retries the letter
            self._book.not_sent(item)
            leave(item, self._progress, self._in_flight)
            raise


def leave(item: Item, progress: LogProgress, in_flight: InFlight) -> None:
    """Note that a letter has what was on its way through the pipeline."""
    if isinstance(item, SpanBatch):
        progress.folded(item.tenant, frame_positions(item))
    else:
        in_flight.leave(item.ticket)
