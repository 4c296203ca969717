"""The output is written in order, one append at a time, and never goes backwards."""

from __future__ import annotations

import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.evaluator.output_writer import SOON_ROWS, OutputWriter
from betrace.service.cluster.output import Counts, Output, unpack
from betrace.service.storage.jetstream.errors import StreamFull
from betrace.service.storage.jetstream.fenced import Fenced
from betrace.service.traces.verdicts import Decided
from tests.support import virtual
from tests.support.cluster_fakes import FakeFencedLog, FakeNats, FakeNode, FakeState


def signals(*ids: str) -> list[Decided]:
    return [Decided("acme", [FakeState(0)._signal(each) for each in ids], None)]


def out(step: int, *ids: str) -> Output:
    return Output(10 * step, step, 0, 0, Counts(), signals(*ids) if ids else [])


def in_virtual_time(test):
    def run() -> None:
        async def main() -> None:
            with ThreadRunner("test", 2) as threads:
                log = FakeFencedLog(FakeNode(FakeNats(), "one"), 0)
                epoch = await log.open("one")
                await test(log, OutputWriter(log, threads, epoch.sequence))

        virtual.run(main)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def written(log: FakeFencedLog) -> list[Output]:
    return [unpack(message.data) for message in log.node.nats.logs[log.log] if message.data]


@in_virtual_time
async def test_what_is_added_during_an_append_goes_together(log, writer):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        writer.add(out(1, "a"))
        await trio.sleep(0.001)
        writer.add(out(2, "b"))
        writer.add(out(3))
        writer.add(out(4, "c"))
        await writer.settled()
        assert (writer.step, writer.upto, writer.sequence) == (4, 40, 3)
        nursery.cancel_scope.cancel()
    assert [each.step for each in written(log)] == [1, 4]
    assert [s.id for each in written(log) for d in each.decided for s in d.signals] == list("abc")


@in_virtual_time
async def test_progress_alone_is_written_once_a_second(log, writer):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        for step in range(1, 41):
            writer.add(out(step))
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert 3 <= len(written(log)) <= 4


@in_virtual_time
async def test_closed_traces_without_signals_wait_for_more_of_them(log, writer):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        for step in range(1, 41):
            found = out(step)
            found.decided = [Decided("acme", [], None)]
            writer.add(found)
            await trio.sleep(0.1)
        assert 3 <= len(written(log)) <= 4
        many = out(41)
        many.decided = [Decided("acme", [], None)] * SOON_ROWS
        writer.add(many)
        await trio.sleep(0.01)
        assert writer.step == 41
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_a_replay_writes_nothing_before_the_steps_that_are_stored(log, writer):
    writer.first_step = 5
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await trio.sleep(2)
        writer.add(out(3))
        writer.add(out(4, "forgotten"))
        await trio.sleep(2)
        await writer.settled()
        await writer.wait_stored(4)
        await writer.room()
        assert written(log) == []
        writer.add(out(5))
        await writer.wait_stored(5)
        nursery.cancel_scope.cancel()
    (only,) = written(log)
    assert only.step == 5
    assert [signal.id for signal in only.decided[0].signals] == ["forgotten"]


@in_virtual_time
async def test_a_former_owner_is_fenced(log, writer):
    async with trio.open_nursery() as nursery:
        await FakeFencedLog(log.node, 0).open("two")
        writer.add(out(1, "a"))
        with pytest.raises(Fenced):
            await writer.run()
        nursery.cancel_scope.cancel()
    assert written(log) == []


@in_virtual_time
async def test_a_full_stream_is_tried_again(log, writer):
    append, failures = log.append, iter(range(3))

    async def full(data: bytes) -> int:
        if next(failures, None) is not None:
            raise StreamFull("the stream is full")
        return await append(data)

    log.append = full
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        writer.add(out(1, "a"))
        await writer.settled()
        nursery.cancel_scope.cancel()
    assert [each.step for each in written(log)] == [1]


@in_virtual_time
async def test_many_results_that_wait_hold_the_partition_back(log, writer):
    rows = [Decided("acme", [FakeState(0)._signal("x")] * 30_000, None)]
    writer.add(Output(10, 1, 0, 0, Counts(), rows))
    with trio.move_on_after(5) as waiting:
        await writer.room()
    assert waiting.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await writer.room()
        nursery.cancel_scope.cancel()
