"""The book of dead letters: how many each stage has, which are being retried, and which are done.

Pure bookkeeping in memory, on the Trio thread; :mod:`betrace.service.pipeline.dead_letters` writes
the letters. A letter is *retried* while its item is in its stage again, and *done* when the item is
safe elsewhere. Until the letter of a done item is deleted it is *busy*, so that it is not retried
again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.letter_codec import Item, frame_positions, weigh
from betrace.service.storage.dead_letters import Count, Letter
from betrace.service.traces.checkpoint import KEPT

SPANS_STAGE = "trace-correlation"

Progress = Mapping[str, tuple[int, list[int]]]
"""By tenant, the last frame of the log, and the frames up to it that are not folded."""


@dataclass(slots=True)
class LetterTotals:
    """The letters of a stage. Letters whose retry succeeded do not count, even if they are not
    deleted yet."""

    letters: int = 0
    weight: int = 0


@dataclass(slots=True)
class Retry:
    """A letter whose item was sent to its stage again."""

    letter: Letter
    item: Item
    saved: int = 0
    """Checkpoints that contain its spans."""


@dataclass(slots=True)
class DeadLetterCounts:
    """What was done since the start, in letters unless stated otherwise."""

    kept: int = 0
    retried: int = 0
    recovered: int = 0
    discarded: int = 0
    lost_weight: dict[str, int] = field(default_factory=dict)
    """By stage, the weight of letters that were discarded or exported."""
    retried_weight: dict[str, int] = field(default_factory=dict)
    """By stage, the weight that was sent to it again."""


class LetterBook:
    """``existing`` are the letters of each stage at the start."""

    def __init__(self, existing: Mapping[str, Count]) -> None:
        self.held = {
            stage: LetterTotals(count.letters, count.weight) for stage, count in existing.items()
        }
        self.counts = DeadLetterCounts()
        self.wake = trio.lowlevel.ParkingLot()
        """Unparked when there may be something to retry or to delete."""
        self.carried_spans = self.spans
        """Spans in letters that existed at the start."""
        self._retrying: dict[tuple[Any, ...], Retry] = {}
        self._busy: dict[str, set[int]] = {}  # ids being retried, or done but not deleted yet
        self._folded: dict[int, Retry] = {}  # done, by id; not yet in all checkpoints
        self._done: list[int] = []

    # Totals.

    @property
    def spans(self) -> int:
        """Spans in letters, which were never folded."""
        return self.totals(SPANS_STAGE).weight

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

    def totals(self, stage: str) -> LetterTotals:
        """The letters of a stage."""
        return self.held.setdefault(stage, LetterTotals())

    def busy(self, stage: str) -> set[int]:
        """The ids of a stage's letters that are being retried, or done and not deleted yet."""
        return self._busy.setdefault(stage, set())

    def all_busy(self) -> set[int]:
        """The same of all stages."""
        return {each for ids in self._busy.values() for each in ids}

    def retrying(self, stage: str) -> int:
        """How many letters of a stage are being retried."""
        return sum(retry.letter.stage == stage for retry in self._retrying.values())

    # The way of a letter.

    def retry_of(self, stage: str, item: Item) -> Retry | None:
        """The letter that an item comes from, if it failed in ``stage`` before."""
        retry = self._retrying.get(_key(item))
        return retry if retry is not None and retry.letter.stage == stage else None

    def kept(
        self, stage: str, items: Sequence[Item], new: Sequence[bool], retried: Sequence[Retry]
    ) -> None:
        """Note items that failed: those that are ``new`` letters, and those that failed again."""
        held = self.totals(stage)
        for item, is_new in zip(items, new, strict=False):
            held.letters += is_new
            held.weight += weigh(item) * is_new
            self.counts.kept += is_new
        for retry in retried:
            self._retrying.pop(_key(retry.item), None)
            self._busy[stage].discard(retry.letter.id)
        self.wake.unpark_all()

    def exported(self, letters: Iterable[Letter]) -> None:
        """Subtract letters that the store moved to files, except those in progress, which count
        until their stage is done with them."""
        in_progress = {retry.letter.id for retry in self._retrying.values()}
        for letter in letters:
            if letter.id not in in_progress and not self._is_done(letter.id):
                self._lose(letter.stage, 1, letter.weight)

    def sent(self, letter: Letter, item: Item) -> None:
        """Note that the item of a letter is sent to its stage again."""
        self._retrying[_key(item)] = Retry(letter, item)
        self.busy(letter.stage).add(letter.id)
        self.counts.retried += 1
        sent = self.counts.retried_weight
        sent[letter.stage] = sent.get(letter.stage, 0) + letter.weight

    def not_sent(self, item: Item) -> None:
        """Note that the service stops before the item is in its channel."""
        del self._retrying[_key(item)]

    def finished(self, items: Iterable[Item]) -> None:
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
            self.wake.unpark_all()

    def take_done(self) -> list[int]:
        """The letters to delete, because their items are safe."""
        done, self._done = self._done, []
        return done

    def put_back(self, done: list[int]) -> None:
        """Note that letters of :meth:`take_done` could not be deleted."""
        self._done += done

    def deleted(self, done: Iterable[int]) -> None:
        """Note that letters of :meth:`take_done` are deleted."""
        for busy in self._busy.values():
            busy.difference_update(done)

    # Checkpoints.

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
            positions = frame_positions(retry.item)
            if known and not any_unfolded(progress, retry.item.tenant, positions):
                ids.append(retry.letter.id)
        return ids

    def saved(self, ids: Iterable[int]) -> list[int]:
        """Note that a checkpoint with the spans of these letters is durable. Returns those that
        every checkpoint contains that may be loaded."""
        complete = []
        for letter_id in ids:
            retry = self._folded.get(letter_id)
            if retry is not None:
                retry.saved += 1
                if retry.saved >= KEPT:
                    complete.append(letter_id)
        return complete

    def saved_deleted(self, ids: Iterable[int]) -> None:
        """Note that letters of :meth:`saved` are deleted."""
        for letter_id in ids:
            del self._folded[letter_id]
            self._busy[SPANS_STAGE].discard(letter_id)

    def stale(self, deleted: Mapping[str, tuple[int, int]]) -> None:
        """Subtract letters that were deleted at the start: by stage, their number and weight."""
        for stage, (number, weight) in deleted.items():
            self._subtract(stage, number, weight)
        self.carried_spans = self.spans

    # Letters that are given up.

    def discarded(self, deleted: Mapping[str, tuple[int, int]]) -> int:
        """Note that an operator deleted letters; returns how many."""
        found = 0
        for stage, (number, weight) in deleted.items():
            self._lose(stage, number, weight)
            found += number
        self.counts.discarded += found
        return found

    def forgotten(self, letters: Sequence[Letter]) -> None:
        """Note that letters of a deleted tenant are deleted."""
        ids = {letter.id for letter in letters}
        for letter in letters:
            if not self._is_done(letter.id):
                self._lose(letter.stage, 1, letter.weight)
                self.counts.discarded += 1
            self._folded.pop(letter.id, None)
        self._done = [each for each in self._done if each not in ids]
        for busy in self._busy.values():
            busy -= ids

    def _is_done(self, letter_id: int) -> bool:
        return letter_id in self._folded or letter_id in self._done

    def _recovered(self, retry: Retry) -> None:
        self._subtract(retry.letter.stage, 1, retry.letter.weight)
        self.counts.recovered += 1

    def _lose(self, stage: str, number: int, weight: int) -> None:
        self._subtract(stage, number, weight)
        lost = self.counts.lost_weight
        lost[stage] = lost.get(stage, 0) + weight

    def _subtract(self, stage: str, number: int, weight: int) -> None:
        held = self.totals(stage)
        held.letters -= number
        held.weight -= weight


def any_unfolded(progress: Progress, tenant: str, positions: list[int]) -> bool:
    """Whether some frames are not folded yet: pending, or beyond the last."""
    last, pending = progress.get(tenant, (0, []))
    return any(position > last or position in pending for position in positions)


def _key(item: Item) -> tuple[Any, ...]:
    if isinstance(item, SpanBatch):
        return (item.tenant, *frame_positions(item)[:1])
    return (item.ticket,)
