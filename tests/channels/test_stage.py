"""Stages: batches, redelivery, dead letters, restarts, pausing, stalling, draining."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from betrace.channels import (
    ExpectedError,
    SendChannel,
    Stage,
    StageOptions,
    TransientError,
    open_channel,
)

Item = str
Handler = Callable[[list[Item]], Awaitable[None]]


@dataclass
class Recorder:
    """A handler that records its calls and raises a number of times for chosen items."""

    errors: dict[Item, list[Exception]] = field(default_factory=dict)
    duration: float = 0.0
    calls: list[tuple[float, list[Item]]] = field(default_factory=list)
    done: list[Item] = field(default_factory=list)
    dead: list[tuple[float, Item, Exception, int]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def handle(self, items: list[Item]) -> None:
        self.calls.append((trio.current_time(), list(items)))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await trio.sleep(self.duration)
        finally:
            self.running -= 1
        for item in items:
            if self.errors.get(item):
                raise self.errors[item].pop(0)
        self.done += items

    async def bury(self, item: Item, error: Exception, attempts: int) -> None:
        self.dead.append((trio.current_time(), item, error, attempts))


def make(
    recorder: Recorder, capacity: int = 100, **settings: Any
) -> tuple[SendChannel[Item], Stage[Item]]:
    send, receive = open_channel("work", capacity, len, hold=True)
    settings.setdefault("on_dead", recorder.bury)
    return send, Stage("work", receive, recorder.handle, StageOptions(**settings))


async def test_takes_everything_queued_as_one_batch_and_ends_with_its_channel(
    autojump_clock: MockClock,
) -> None:
    recorder = Recorder()
    observed: list[tuple[float, int]] = []
    recorder.duration = 0.25
    send, stage = make(recorder, on_done=lambda *call: observed.append(call))
    for item in ("a", "bb", "ccc"):
        send.send_nowait(item)
    send.close()
    await stage.run()
    assert recorder.calls == [(0.0, ["a", "bb", "ccc"])]
    assert observed == [(0.25, 6)]
    after = stage.statistics()
    assert (after.items_in, after.items_out, after.weight_in, after.weight_out) == (3, 3, 6, 6)
    assert (after.failed, after.dead, after.items_held, after.busy_workers) == (0, 0, 0, 0)
    assert after.last_progress == 0.25


async def test_batches_are_limited_by_weight(autojump_clock: MockClock) -> None:
    recorder = Recorder()
    send, stage = make(recorder, max_batch_weight=3)
    for item in ("a", "bb", "ccc", "dddddd", "e"):
        send.send_nowait(item)
    send.close()
    await stage.run()
    assert [items for _, items in recorder.calls] == [["a", "bb"], ["ccc"], ["dddddd"], ["e"]]


async def test_batches_may_wait_to_grow_and_never_mix_keys(autojump_clock: MockClock) -> None:
    recorder = Recorder()
    send, stage = make(
        recorder, max_batch_weight=4, max_batch_wait=0.5, batch_key=lambda item: item[0]
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await send.send("a1")
        await send.send("b1")
        await trio.sleep(0.2)
        await send.send("a2")  # 4 in all: full
        await trio.sleep(0.8)
        assert recorder.calls == [(0.2, ["a1", "a2"]), (0.5, ["b1"])]
        await send.send("c1")
        send.close()
    assert recorder.calls[2:] == [(1.0, ["c1"])]


async def test_one_bad_item_fails_alone(autojump_clock: MockClock) -> None:
    bad = [TransientError(f"try {n}") for n in range(1, 5)]
    recorder = Recorder({"bad": list(bad)})
    send, stage = make(recorder)
    for item in ("x", "bad", "y"):
        send.send_nowait(item)
    send.close()
    await stage.run()
    assert recorder.done == ["x", "y"]
    assert recorder.dead == [(3.0, "bad", bad[3], 4)]
    assert [(at, items) for at, items in recorder.calls if "bad" in items] == [
        (0.0, ["x", "bad", "y"]),
        (1.0, ["bad"]),
        (2.0, ["bad"]),
        (3.0, ["bad"]),
    ]
    after = stage.statistics()
    assert (after.items_in, after.items_out, after.dead, after.dead_weight) == (3, 2, 1, 3)
    assert (after.failed, after.redelivered, after.restarts) == (4, 5, 0)
    assert after.last_error == "TransientError('try 4')"


async def test_an_item_that_recovers_is_not_dead(autojump_clock: MockClock) -> None:
    recorder = Recorder({"a": [TransientError()] * 3})
    send, stage = make(recorder)
    send.send_nowait("a")
    send.close()
    await stage.run()
    assert (recorder.done, recorder.dead) == (["a"], [])
    assert [at for at, _ in recorder.calls] == [0.0, 1.0, 2.0, 3.0]


async def test_a_single_attempt_means_no_redelivery(autojump_clock: MockClock) -> None:
    error = TransientError()
    recorder = Recorder({"a": [error]})
    send, stage = make(recorder, attempts=1)
    send.send_nowait("a")
    send.close()
    await stage.run()
    assert recorder.dead == [(0.0, "a", error, 1)]
    assert len(recorder.calls) == 1


async def test_new_items_proceed_while_others_wait_for_redelivery(
    autojump_clock: MockClock,
) -> None:
    recorder = Recorder({"bad": [TransientError()] * 4})
    send, stage = make(recorder)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await send.send("bad")
        await trio.sleep(0.5)
        await send.send("good")
        await wait_all_tasks_blocked()
        assert recorder.done == ["good"]
        assert stage.statistics().waiting == 1
        send.close()


async def test_items_waiting_for_redelivery_use_capacity(autojump_clock: MockClock) -> None:
    recorder = Recorder({"aaa": [TransientError()] * 4})
    send, stage = make(recorder, capacity=4)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await send.send("aaa")
        await wait_all_tasks_blocked()
        assert await send.offer("b", 0.1)
        await wait_all_tasks_blocked()
        assert not await send.offer("bb", 0.5)
        assert await send.offer("bb", 10)
        assert trio.current_time() == 3.0  # when "aaa" was dead
        send.close()
    assert recorder.done == ["b", "bb"]


async def test_one_worker_means_one_call_at_a_time_and_turns_are_shared(
    autojump_clock: MockClock,
) -> None:
    recorder = Recorder({"bad": [TransientError()] * 2}, duration=0.4)
    send, stage = make(recorder, max_batch_weight=1, capacity=1000)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await send.send("bad")
        for _ in range(20):
            await send.send("x")
        send.close()
    assert recorder.most_running == 1
    # Due at 1.4 and 3.0, during other calls: it gets the next turn.
    assert [round(at, 3) for at, items in recorder.calls if items == ["bad"]] == [0.0, 1.6, 3.2]
    assert recorder.done.count("x") == 20


@pytest.mark.parametrize("workers", [1, 3])
async def test_no_more_calls_than_workers(autojump_clock: MockClock, workers: int) -> None:
    recorder = Recorder({f"b{n}": [TransientError()] for n in range(9)}, duration=0.3)
    send, stage = make(recorder, workers=workers, max_batch_weight=4)
    for n in range(9):
        send.send_nowait(f"b{n}")
    send.close()
    await stage.run()
    assert recorder.most_running == workers
    assert sorted(recorder.done) == [f"b{n}" for n in range(9)]


async def test_an_unexpected_error_restarts_the_worker_and_loses_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    bug = KeyError("bug")
    recorder = Recorder({"bad": [bug] * 4})
    send, stage = make(recorder)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        with caplog.at_level(logging.ERROR):
            await send.send("bad")
            await wait_all_tasks_blocked()
        await send.send("good")
        await wait_all_tasks_blocked()
        assert recorder.done == []  # the worker pauses
        await trio.sleep(0.1)
        await wait_all_tasks_blocked()
        assert recorder.done == ["good"]
        send.close()
    assert recorder.dead == [(3.0, "bad", bug, 4)]
    assert stage.statistics().restarts == 1
    crash, burial = caplog.records
    assert crash.message == "worker work-1 crashed; restarting it in 0.1 s"
    assert crash.exc_info is not None
    assert crash.exc_info[1] is bug
    assert burial.message == "stage work gave up an item after 4 deliveries: KeyError('bug')"


async def test_errors_of_listed_kinds_and_their_groups_are_expected(
    autojump_clock: MockClock,
) -> None:
    group = ExceptionGroup("both", [OSError(), ExceptionGroup("inner", [ExpectedError()])])
    recorder = Recorder({"a": [group], "b": [OSError()]})
    send, stage = make(recorder, expected=(ExpectedError, OSError), max_batch_weight=1)
    send.send_nowait("a")
    send.send_nowait("b")
    send.close()
    await stage.run()
    assert recorder.done == ["a", "b"]
    assert stage.statistics().failed == 2
    assert stage.statistics().restarts == 0


async def test_an_item_is_kept_until_on_dead_takes_it(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[float] = []

    async def bury(item: Item, error: Exception, attempts: int) -> None:
        tries.append(trio.current_time())
        if len(tries) < 4:
            raise OSError("disk full")

    recorder = Recorder({"bad": [TransientError()] * 4})
    send, stage = make(recorder, on_dead=bury)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await send.send("bad")
        await trio.sleep(3.5)
        held = stage.statistics()
        assert (held.items_held, held.waiting, held.dead, held.burial_failures) == (1, 1, 0, 1)
        assert send.statistics().in_flight == 3
        await send.send("good")
        await wait_all_tasks_blocked()
        assert recorder.done == ["good"]
        send.close()
    assert tries == [3.0, 4.0, 6.0, 10.0]
    assert stage.statistics().dead == 1
    assert "on_dead failed; calling it again in 1 s" in caplog.text


async def test_a_failing_observer_does_not_undo_a_batch(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def observe(seconds: float, weight: int) -> None:
        raise RuntimeError("observer")

    recorder = Recorder()
    send, stage = make(recorder, on_done=observe)
    send.send_nowait("a")
    send.close()
    await stage.run()
    assert recorder.calls == [(0.0, ["a"])]
    assert stage.statistics().items_out == 1
    assert "observer on_done failed" in caplog.text


async def test_slow_calls_are_reported_whether_they_failed_or_not(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[list[str], float, str | None]] = []

    def observe(items: list[str], seconds: float, error: Exception | None) -> None:
        told.append((items, seconds, error and str(error)))
        raise RuntimeError("observer")

    async def handle(items: list[str]) -> None:
        await trio.sleep(0.1 if items == ["quick"] else 0.5)
        if items == ["bad"]:
            raise ExpectedError("no")

    async def bury(*_: object) -> None:
        pass

    send, receive = open_channel("work", 100, len, hold=True)
    options = StageOptions[str](
        on_dead=bury, attempts=1, on_slow=observe, slow_after=0.5, max_batch_weight=1
    )
    stage = Stage("work", receive, handle, options)
    for item in ("slow", "quick", "bad"):
        send.send_nowait(item)
    send.close()
    await stage.run()
    half = pytest.approx(0.5)
    assert told == [(["slow"], half, None), (["bad"], half, "no")]
    assert caplog.text.count("observer on_slow failed") == 2
    assert (stage.statistics().items_out, stage.statistics().dead) == (2, 1)


async def test_pause_and_resume(autojump_clock: MockClock) -> None:
    recorder = Recorder({"bad": [TransientError()]})
    send, stage = make(recorder)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await send.send("bad")
        await wait_all_tasks_blocked()
        stage.pause()
        stage.pause()
        await send.send("x")
        await trio.sleep(5)
        assert len(recorder.calls) == 1  # neither the new item nor the redelivery
        assert stage.statistics().paused
        assert not stage.stalled(1.0)
        stage.resume()
        assert not stage.stalled(1.0)
        await wait_all_tasks_blocked()
        assert sorted(recorder.done) == ["bad", "x"]
        send.close()


async def test_pausing_while_a_worker_waits_for_its_turn(autojump_clock: MockClock) -> None:
    recorder = Recorder({"bad": [TransientError()]}, duration=2.0)
    send, stage = make(recorder, max_batch_weight=3)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await send.send("bad")  # fails at 2, due again at 3
        await trio.sleep(2.5)
        await send.send("xxx")  # 2.5 to 4.5, so that the redelivery waits for its turn
        await trio.sleep(1.0)
        stage.pause()
        await trio.sleep(5.0)
        assert [items for _, items in recorder.calls] == [["bad"], ["xxx"]]
        stage.resume()
        send.close()
    assert recorder.done == ["xxx", "bad"]


async def test_stalled_means_input_and_no_progress(autojump_clock: MockClock) -> None:
    recorder = Recorder(duration=10.0)
    send, stage = make(recorder, max_batch_weight=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await trio.sleep(100)
        assert not stage.stalled(5.0)  # idle is not stalled
        await send.send("a")
        await send.send("b")
        await trio.sleep(4.9)
        assert not stage.stalled(5.0)
        await trio.sleep(0.1)
        assert stage.stalled(5.0)
        await trio.sleep(5.0)  # "a" is done
        await wait_all_tasks_blocked()
        assert not stage.stalled(5.0)
        await trio.sleep(5.0)
        assert stage.stalled(5.0)
        await stage.drained()
        assert not stage.stalled(0.0)
        send.close()


async def test_drained_waits_for_redeliveries_and_senders(autojump_clock: MockClock) -> None:
    recorder = Recorder({"bad": [TransientError()] * 2})
    send, stage = make(recorder, capacity=3)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await stage.drained()
        await send.send("bad")
        nursery.start_soon(send.send, "x")  # no room before "bad" is done
        await wait_all_tasks_blocked()
        await stage.drained()
        assert trio.current_time() == 2.0
        assert recorder.done == ["bad", "x"]
        send.close()


async def test_cancellation_passes_through_and_is_not_a_failure(autojump_clock: MockClock) -> None:
    recorder = Recorder(duration=10.0)
    send, stage = make(recorder)
    with trio.move_on_after(1.0) as scope:
        send.send_nowait("a")
        await stage.run()
    assert scope.cancelled_caught
    after = stage.statistics()
    assert (after.failed, after.items_held, after.dead, after.busy_workers) == (0, 1, 0, 0)
    with pytest.raises(trio.BrokenResourceError):
        await send.send("b")


@pytest.mark.parametrize("seed", range(8))
async def test_every_item_is_done_or_dead_whatever_fails(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """Random failures of handler and on_dead, pauses, workers and limits."""
    caplog.set_level(logging.CRITICAL)
    dice = random.Random(seed)
    workers, capacity = dice.randrange(1, 4), dice.randrange(5, 60)
    done: list[str] = []
    dead: list[str] = []
    deliveries: dict[str, int] = {}
    running = 0

    async def handle(items: list[str]) -> None:
        nonlocal running
        running += 1
        assert running <= workers
        for item in items:
            deliveries[item] = deliveries.get(item, 0) + 1
        try:
            await trio.sleep(dice.choice([0, 0.01, 0.5]))
            if dice.random() < 0.4:
                raise dice.choice(
                    [TransientError(), ValueError(), ExceptionGroup("g", [OSError()])]
                )
        finally:
            running -= 1
        done.extend(items)

    async def bury(item: str, error: Exception, attempts: int) -> None:
        await trio.sleep(dice.choice([0, 0.1]))
        if dice.random() < 0.5:
            raise OSError
        assert attempts == deliveries[item] == 3
        dead.append(item)

    weigh: Callable[[str], int] = len
    send, receive = open_channel("work", capacity, weigh, hold=True)
    options = StageOptions[str](
        on_dead=bury,
        workers=workers,
        attempts=3,
        max_batch_weight=dice.randrange(1, 30),
        max_batch_wait=dice.choice([0, 0.2]),
        batch_key=dice.choice([None, len]),
    )
    stage = Stage("work", receive, handle, options)
    sent = [f"{n}".rjust(dice.randrange(3, 8)) for n in range(120)]

    async def produce() -> None:
        with send:
            for item in sent:
                await send.send(item)
                await trio.sleep(dice.choice([0, 0, 0.05, 2.0]))

    async def meddle() -> None:
        while True:
            await trio.sleep(dice.choice([1.0, 5.0]))
            stage.pause()
            await trio.sleep(dice.choice([0, 0.5]))
            stage.resume()
            now = stage.statistics()
            assert now.items_in == now.items_out + now.dead + now.items_held
            assert receive.statistics().size <= capacity
            assert now.busy_workers == running

    async with trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        nursery.start_soon(meddle)
        await stage.run()
        nursery.cancel_scope.cancel()
    assert sorted(done + dead) == sorted(sent)
    assert dead
    after = stage.statistics()
    assert (after.items_in, after.items_out, after.dead) == (120, len(done), len(dead))
    assert after.weight_in == after.weight_out + after.dead_weight
    assert receive.statistics().in_flight == 0


async def test_closing_its_receiver_ends_a_stage(autojump_clock: MockClock) -> None:
    recorder = Recorder()
    send, receive = open_channel("work", 10, len, hold=True)
    stage = Stage("work", receive, recorder.handle, StageOptions(on_dead=recorder.bury))
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        await send.send("a")
        await stage.drained()
        receive.close()
    assert recorder.done == ["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"attempts": 0}, "attempts"),
        ({"retry_delay": -1}, "retry_delay"),
        ({"max_batch_weight": 0}, "max_batch_weight"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Recorder(), **settings)


def test_a_stage_needs_a_channel_with_hold() -> None:
    _, receive = open_channel("work", 10, len)
    recorder = Recorder()
    with pytest.raises(ValueError, match="hold=True"):
        Stage("work", receive, recorder.handle, StageOptions(on_dead=recorder.bury))


@dataclass
class Direct:
    """Handles items in the sender's call, as long as it is willing."""

    willing: bool = True
    taken: list[Item] = field(default_factory=list)

    def __call__(self, item: Item) -> bool:
        if self.willing:
            self.taken.append(item)
        return self.willing


async def test_a_stage_without_other_work_handles_items_in_the_senders_call(
    autojump_clock: MockClock,
) -> None:
    recorder, direct = Recorder(), Direct()
    observed: list[tuple[float, int]] = []
    send, stage = make(
        recorder, direct=direct, interval=1.0, enough=4, on_done=lambda *call: observed.append(call)
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        send.send_nowait("aa")
        assert direct.taken == ["aa"]
        assert send.statistics().size == 0
        direct.willing = False
        send.send_nowait("b")
        await wait_all_tasks_blocked()
        assert recorder.done == ["b"]
        direct.willing = True
        for item in ("cc", "dd", "ee"):  # beyond a weight of 4 in an interval they are queued
            await send.send(item)
        await trio.sleep(2)
        await send.send("ff")
        send.close()
    assert direct.taken == ["aa", "cc", "ff"]
    assert recorder.done == ["b", "dd", "ee"]
    found = stage.statistics()
    assert (found.items_in, found.items_out, found.items_held) == (6, 6, 0)
    assert (found.weight_in, found.weight_out) == (11, 11)
    assert send.statistics().total_in == send.statistics().total_out == 11
    assert (0.0, 2) in observed


async def test_a_stage_that_is_paused_or_busy_handles_nothing_directly(
    autojump_clock: MockClock,
) -> None:
    recorder, direct = Recorder(duration=1.0), Direct()
    send, stage = make(recorder, direct=direct, interval=0.1, enough=100)
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        stage.pause()
        send.send_nowait("a")
        await trio.sleep(1)
        stage.resume()
        await trio.sleep(0.5)
        send.send_nowait("b")  # while the handler runs
        await trio.sleep(10)
        send.send_nowait("c")
        send.close()
    assert direct.taken == ["c"]
    assert recorder.done == ["a", "b"]
