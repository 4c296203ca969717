"""Dead letters on a virtual clock, with the real store, log and progress."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest
import trio

from betrace.channels import TransientError, open_channel
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline import letter_codec as letters
from betrace.service.pipeline.dead_letters import DeadLetters
from betrace.service.pipeline.letter_book import SPANS_STAGE
from betrace.service.pipeline.letter_codec import LetterError
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.storage.dead_letters import DeadLetterError, DeadLetterStore
from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.due import DueTraces
from betrace.service.traces.verdicts import Decided
from tests.support.failing_stores import decided, due
from tests.support.oracle import OracleSpan
from tests.support.strategies import encode
from tests.support.virtual import run

EVALUATION = "rule-evaluation"
STAGES = (SPANS_STAGE, EVALUATION, "storage-write", "projection")


def body(number: int, spans: int = 2) -> bytes:
    return encode(
        [
            OracleSpan(
                trace_id=bytes(15) + bytes([number + 1]),
                span_id=bytes(6) + bytes([number, k + 1]),
                name="a",
                start=1,
                end=2,
            )
            for k in range(spans)
        ]
    )


class World:
    """Dead letters, with channels instead of stages."""

    def __init__(self, directory, max_bytes=1 << 20):
        self.store = DeadLetterStore(
            directory / "d.sqlite", directory / "exported", max_bytes, self.now
        )
        self.log = SpanLog(directory)
        self.progress = LogProgress()
        self.in_flight = InFlight()
        self.letters = DeadLetters(
            self.store, self.log, self.progress, self.in_flight, 1 << 20, 60.0, self.now
        )
        self.in_flight.left = self.letters.book.left
        ends = {name: open_channel(name, 1000, letters.weigh) for name in STAGES}
        self.sends = {name: send for name, (send, _) in ends.items()}
        self.receives = {name: receive for name, (_, receive) in ends.items()}

    def now(self) -> int:
        with suppress(RuntimeError):
            return int((1_000_000 + trio.current_time()) * 1e9)
        return 0

    @asynccontextmanager
    async def running(self):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.letters.retries.run, self.sends)
            yield self
            nursery.cancel_scope.cancel()
        self.close()

    def close(self):
        self.letters.close()
        self.store.close()
        self.log.close()

    async def nothing_comes(self, stage, seconds):
        with trio.move_on_after(seconds) as scope:
            await self.receives[stage].receive()
        return scope.cancelled_caught

    def batch(self, *numbers, tenant="acme"):
        """Spans that are in the log but not folded."""
        bodies = [body(number) for number in numbers]
        frames = [Frame("protobuf", "", 5, each, 2) for each in bodies]
        positions = self.progress.append(tenant, lambda: self.log.append(tenant, frames))
        batch = scan_bodies(tenant, bodies)
        batch.positions = np.array(positions, np.int64)
        return batch

    def pending(self, tenant="acme"):
        return self.progress.snapshot().get(tenant, (0, []))[1]


def world_test(test):
    """Run an async test with a world in virtual time."""

    def in_virtual_time(tmp_path):
        async def main():
            async with World(tmp_path).running() as world:
                await trio.sleep(1)
                await test(world)

        run(main)

    in_virtual_time.__name__ = test.__name__
    return in_virtual_time


@world_test
async def test_transient_letters_are_retried_after_a_minute(world):
    item = due(1, 2)
    item.ticket = world.in_flight.enter()
    await world.letters.bury(EVALUATION, item, TransientError("busy"), 4)
    assert len(world.in_flight) == 0  # the letter has it
    assert world.letters.book.held[EVALUATION].letters == 1
    assert await world.nothing_comes(EVALUATION, 59)
    with trio.fail_after(3):
        again = await world.receives[EVALUATION].receive()
    assert isinstance(again, DueTraces)
    assert np.array_equal(again.rows, item.rows)
    assert world.store.page() != []  # until it is stored
    world.in_flight.leave(again.ticket)
    assert world.letters.book.total == 0
    await trio.sleep(2)
    assert world.store.page() == []
    assert world.letters.book.counts.recovered == 1


@world_test
async def test_other_letters_wait_for_an_operator(world):
    await world.letters.bury(EVALUATION, due(1), ValueError("odd"), 4)
    assert await world.nothing_comes(EVALUATION, 90)
    (letter,) = await world.letters.page(None, None, 10, 0)
    assert (letter.error, letter.attempts, letter.next_retry_ns) == ("ValueError: odd", 4, None)
    assert await world.letters.retry([letter.id]) == 1
    with trio.fail_after(3):
        await world.receives[EVALUATION].receive()
    assert await world.nothing_comes(EVALUATION, 90)  # it is in progress and not sent twice


@world_test
async def test_a_letter_that_fails_again_stays_a_single_letter(world):
    await world.letters.bury(EVALUATION, due(1), ValueError("odd"), 4)
    await world.letters.retry()
    again = await world.receives[EVALUATION].receive()
    await world.letters.bury(EVALUATION, again, TransientError("busy"), 3)
    (letter,) = world.store.page()
    assert (letter.attempts, letter.transient, letter.error) == (7, True, "TransientError: busy")
    assert world.letters.book.held[EVALUATION].letters == 1
    assert len(world.in_flight) == 0
    third = await world.receives[EVALUATION].receive()
    world.in_flight.leave(third.ticket)
    await trio.sleep(2)
    assert world.store.page() == []


@world_test
async def test_an_item_that_fails_in_a_later_stage_is_a_letter_of_that_stage(world):
    await world.letters.bury(EVALUATION, due(1), ValueError("odd"), 4)
    await world.letters.retry()
    again = await world.receives[EVALUATION].receive()
    result = Decided("acme", decided(1).signals, again, None, 5, again.ticket)
    await world.letters.bury("storage-write", result, ValueError("poison"), 4)
    await trio.sleep(2)
    (letter,) = world.store.page()
    assert letter.stage == "storage-write"
    assert world.letters.book.held[EVALUATION].letters == 0
    assert world.letters.book.held["storage-write"].letters == 1
    await world.letters.retry(stage="storage-write")
    back = await world.receives["storage-write"].receive()
    assert back.signals == result.signals
    assert np.array_equal(back.closed.rows, again.rows)


@world_test
async def test_several_items_are_kept_together(world):
    items = [due(1), due(2)]
    for item in items:
        item.ticket = world.in_flight.enter()
    await world.letters.bury_all(EVALUATION, items, TransientError("open"), 1)
    assert len(world.store.page()) == 2
    assert len(world.in_flight) == 0


@world_test
async def test_spans_are_read_from_the_log_again(world):
    batch = world.batch(1, 2)
    assert len(world.pending()) == 2
    await world.letters.bury(SPANS_STAGE, batch, ValueError("odd"), 4)
    assert world.pending() == []  # they are in the letter: a restart must not read them
    assert world.letters.book.spans == 4
    await world.letters.retry()
    again = await world.receives[SPANS_STAGE].receive()
    assert np.array_equal(again.spans, batch.spans)
    assert list(again.positions) == list(batch.positions)
    assert world.pending() == list(batch.positions)
    assert (world.letters.book.spans, world.letters.book.retrying_spans) == (4, 4)
    world.progress.folded("acme", world.pending())
    world.letters.book.finished([again])
    assert (world.letters.book.spans, world.letters.book.retrying_spans) == (0, 0)


@world_test
async def test_spans_stay_in_their_letter_until_all_checkpoints_have_them(world):
    await world.letters.bury(SPANS_STAGE, world.batch(1), ValueError("odd"), 4)
    await world.letters.retry()
    again = await world.receives[SPANS_STAGE].receive()

    async def checkpoint():
        before = world.letters.book.retries()
        found = world.letters.book.saved_in(before, world.progress.snapshot())
        await world.letters.saved(found)
        return found

    assert await checkpoint() == []  # not folded yet
    world.progress.folded("acme", world.pending())
    world.letters.book.finished([again])
    await trio.sleep(5)
    assert await checkpoint() == [1]
    assert world.store.page() != []  # the checkpoint before may still be needed
    assert await checkpoint() == [1]
    assert world.store.page() == []
    assert await checkpoint() == []
    assert await world.nothing_comes(SPANS_STAGE, 100)


@world_test
async def test_spans_that_fail_while_a_checkpoint_is_made_are_not_in_it(world):
    await world.letters.bury(SPANS_STAGE, world.batch(1), ValueError("odd"), 4)
    await world.letters.retry()
    again = await world.receives[SPANS_STAGE].receive()
    before = world.letters.book.retries()
    await world.letters.bury(SPANS_STAGE, again, ValueError("odd"), 4)
    assert world.letters.book.saved_in(before, world.progress.snapshot()) == []
    assert world.letters.book.spans == 2


@world_test
async def test_letters_whose_frames_are_gone_say_so(world):
    batch = world.batch(1)
    await world.letters.bury(SPANS_STAGE, batch, TransientError("busy"), 4)
    world.log.delete_tenant("acme")
    assert await world.nothing_comes(SPANS_STAGE, 100)
    (letter,) = world.store.page()
    assert "no longer in the span log" in letter.error
    assert letter.next_retry_ns is None
    assert (world.letters.book.spans, world.letters.book.retrying_spans) == (2, 0)


@world_test
async def test_discarded_letters_are_counted(world):
    await world.letters.bury(SPANS_STAGE, world.batch(1), ValueError("odd"), 4)
    await world.letters.bury(EVALUATION, due(1), ValueError("odd"), 4)
    assert await world.letters.discard([1, 2, 3]) == 2
    assert world.letters.book.total == 0
    assert world.letters.book.counts.lost_weight == {SPANS_STAGE: 2, EVALUATION: 1}


@world_test
async def test_a_letter_being_retried_cannot_be_discarded(world):
    await world.letters.bury(EVALUATION, due(1), ValueError("odd"), 4)
    await world.letters.retry()
    await world.receives[EVALUATION].receive()
    assert await world.letters.discard([1]) == 0
    assert world.letters.book.total == 1


@world_test
async def test_a_letter_shows_its_content(world):
    await world.letters.bury(SPANS_STAGE, world.batch(1), ValueError("odd"), 4)
    await world.letters.bury(EVALUATION, due(1), ValueError("odd"), 4)
    await world.letters.bury("projection", decided(2), ValueError("odd"), 4)
    shown = [(await world.letters.get(number))[1] for number in (1, 2, 3)]
    assert len(shown[0]["positions"]) == 1
    assert shown[1]["traces"] == [f"{2:032x}"]
    assert shown[1]["rules"] == ["no-loop"]
    assert shown[2]["signals"][0]["rule_id"] == "r"
    assert shown[2]["closed"]["traces"] == [f"{3:032x}"]
    assert await world.letters.get(4) is None


@world_test
async def test_retries_wait_for_capacity_in_the_channel(world):
    for number in range(5):
        await world.letters.bury(
            EVALUATION, due(*range(number * 400, number * 400 + 400)), ValueError("odd"), 4
        )
    await world.letters.retry()
    await trio.sleep(5)
    assert world.receives[EVALUATION].statistics().size == 800
    for _ in range(5):
        again = await world.receives[EVALUATION].receive()
        world.in_flight.leave(again.ticket)
    await trio.sleep(3)
    assert world.store.page() == []


def test_a_retry_that_could_not_be_sent_leaves_nothing_behind(tmp_path):
    async def main():
        world = World(tmp_path)
        async with world.running():
            batch = world.batch(1)
            await world.letters.bury(SPANS_STAGE, batch, ValueError("odd"), 4)
            await world.letters.bury(EVALUATION, due(1), ValueError("odd"), 4)
            await world.sends[EVALUATION].send(due(*range(1000)))
            for number in range(2, 502):
                await world.sends[SPANS_STAGE].send(scan_bodies("acme", [body(number % 250)]))
            await world.letters.retry()
            await trio.sleep(5)
            assert len(world.in_flight) == 1
            assert world.pending() == list(batch.positions)
        assert len(world.in_flight) == 0
        assert world.pending() == []
        assert world.letters.book.retrying_spans == 0

    run(main)


def test_letters_survive_a_restart_and_are_retried(tmp_path):
    async def main():
        async with World(tmp_path).running() as world:
            await world.letters.bury(EVALUATION, due(1), TransientError("busy"), 4)
            batch = world.batch(1)
            await world.letters.bury(SPANS_STAGE, batch, TransientError("busy"), 4)
            saved = world.progress.snapshot()
        world = World(tmp_path)
        assert world.letters.book.carried_spans == 2
        for tenant, (last, pending) in saved.items():
            world.progress.restore(tenant, last, pending)
        await world.letters.reconcile([])
        assert world.letters.book.spans == 2
        async with world.running():
            await trio.sleep(60)
            assert (await world.receives[EVALUATION].receive()).trace_id(0) == f"{2:032x}"
            again = await world.receives[SPANS_STAGE].receive()
            assert list(again.positions) == list(batch.positions)

    run(main)


def test_letters_in_the_log_or_the_checkpoint_are_dropped_at_the_start(tmp_path):
    async def main():
        async with World(tmp_path).running() as world:
            first, second, third = world.batch(1), world.batch(2), world.batch(3)
            before = world.progress.snapshot()
            for batch in (first, second):
                await world.letters.bury(SPANS_STAGE, batch, ValueError("odd"), 4)
            after = world.progress.snapshot()
            await world.letters.bury(SPANS_STAGE, third, ValueError("odd"), 4)
        # The earlier checkpoint: all three are read from the log. The later: only the third is.
        for snapshot, saved, left in ((after, [], [1, 2]), (after, [2], [1]), (before, [], [])):
            world = World(tmp_path)
            for tenant, (last, pending) in snapshot.items():
                world.progress.restore(tenant, last, pending)
            await world.letters.reconcile(saved)
            assert [letter.id for letter in world.store.page()] == left
            assert world.letters.book.spans == world.letters.book.carried_spans == 2 * len(left)
            world.close()

    run(main)


def test_letters_that_no_longer_fit_are_exported_and_counted(tmp_path):
    async def main():
        async with World(tmp_path, max_bytes=3000).running() as world:
            for number in range(10):
                await world.letters.bury(EVALUATION, due(number), ValueError("odd"), 4)
            assert world.letters.exported > 0
            assert (
                world.letters.book.total == 10 - world.letters.exported == len(world.store.page())
            )
            lost = world.letters.book.counts.lost_weight[EVALUATION]
            assert lost == world.letters.exported
            assert len(list((tmp_path / "exported").iterdir())) > 0

    run(main)


def test_a_failing_store_loses_nothing(tmp_path):
    async def main():
        async with World(tmp_path).running() as world:
            item = due(1)
            item.ticket = world.in_flight.enter()
            world.store.close()
            with pytest.raises(DeadLetterError, match="check the disk"):
                await world.letters.bury(EVALUATION, item, ValueError("odd"), 4)
            assert len(world.in_flight) == 1
            assert world.letters.book.total == 0
            await trio.sleep(10)  # and the retries continue

    run(main)


@pytest.mark.parametrize(
    ("kind", "payload", "words"),
    [
        ("frames", b"{}", "cannot be read"),
        ("due", b"x", "cannot be read"),
        ("decided", b"[]", "cannot be read"),
        ("decided", b'{"signals": 5}', "cannot be read"),
        ("unheard of", b"", "unknown kind"),
    ],
)
def test_payloads_that_cannot_be_read(tmp_path, kind, payload, words):
    with SpanLog(tmp_path) as log, pytest.raises(LetterError, match=words):
        letters.decode("acme", kind, payload, log, 1000)
    if kind != "unheard of":
        assert "unreadable" in letters.describe(kind, payload)


def test_frames_are_restored_unchanged(tmp_path):
    with SpanLog(tmp_path) as log:
        frames = [Frame("protobuf", "", 5, body(1), 2), Frame("protobuf", "", 7, body(2), 2)]
        positions = log.append("acme", frames)
        batch = read_frames("acme", positions, frames, 1 << 20)
        kind, payload = letters.encode(batch)
        found = letters.decode("acme", kind, payload, log, 1 << 20)
    assert np.array_equal(found.spans, batch.spans)
    assert found.received_ns == 7
