"""How far the work has come, for checkpoints."""

from __future__ import annotations

import threading

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from betrace.service.pipeline.progress import InFlight, LogProgress

# The log


def test_frames_are_pending_until_they_are_folded():
    progress = LogProgress()
    assert progress.append("t", lambda: [10, 20, 30]) == [10, 20, 30]
    assert progress.snapshot() == {"t": (30, [10, 20, 30])}
    assert progress.any_pending("t", [5, 20])
    progress.folded("t", [10, 20])
    assert not progress.any_pending("t", [5, 20])
    assert progress.snapshot() == {"t": (30, [30])}
    progress.folded("t", [30, 30, 99])
    assert progress.snapshot() == {"t": (30, [])}


def test_a_write_that_fails_changes_nothing():
    progress = LogProgress()
    progress.append("t", lambda: [1])

    def fail() -> list[int]:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        progress.append("t", fail)
    assert progress.snapshot() == {"t": (1, [1])}
    progress.append("t", lambda: [2])  # the lock is free again


def test_tenants_are_isolated():
    progress = LogProgress()
    progress.append("one", lambda: [7])
    progress.append("other", lambda: [7])
    progress.folded("one", [7])
    assert progress.snapshot() == {"one": (7, []), "other": (7, [7])}
    progress.forget("one")
    progress.forget("nobody")
    assert progress.snapshot() == {"other": (7, [7])}


def test_reading_an_unknown_tenant_does_not_create_it():
    progress = LogProgress()
    assert not progress.any_pending("nobody", [1])
    progress.folded("nobody", [1])
    assert progress.snapshot() == {}


def test_a_checkpoint_can_be_restored():
    progress = LogProgress()
    progress.restore("t", 50, [20, 40])
    assert progress.snapshot() == {"t": (50, [20, 40])}
    progress.register("t", [60])
    assert progress.snapshot() == {"t": (60, [20, 40, 60])}
    progress.register("t", [20])  # again, from the log
    assert progress.snapshot() == {"t": (60, [20, 40, 60])}


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=30), st.randoms())
def test_every_frame_up_to_the_last_is_pending_or_folded(steps, rng):
    progress = LogProgress()
    written: list[int] = []
    folded: set[int] = set()
    for appends, count in steps:
        if appends:
            new = [len(written) + i + 1 for i in range(count)]
            progress.append("t", lambda new=new: written.extend(new) or new)
        elif pending := sorted(set(written) - folded):
            chosen = rng.sample(pending, min(count, len(pending)))
            progress.folded("t", chosen)
            folded.update(chosen)
        if written:
            last, pending = progress.snapshot()["t"]
            assert last == max(written)
            assert set(pending) == set(written) - folded
            assert pending == sorted(pending)


def test_no_snapshot_between_writing_and_registering_misses_a_frame():
    """Threads append in the order of the log; a snapshot's ``last`` never skips a frame that is
    not yet registered."""
    progress = LogProgress()
    written: list[int] = []
    stop = threading.Event()
    wrong: list[tuple[int, list[int]]] = []

    def write() -> list[int]:
        written.append(len(written) + 1)
        return [written[-1]]

    def append() -> None:
        for _ in range(2000):
            progress.append("t", write)

    def look() -> None:
        while not stop.is_set():
            last, pending = progress.snapshot().get("t", (0, []))
            if pending != list(range(1, last + 1)):
                wrong.append((last, pending))

    watcher = threading.Thread(target=look)
    writers = [threading.Thread(target=append) for _ in range(3)]
    watcher.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    watcher.join()
    assert not wrong
    assert progress.snapshot()["t"][0] == 6000


# What left the traces


async def test_waiting_ends_when_all_older_work_is_done():
    in_flight = InFlight()
    first, second = in_flight.enter(), in_flight.enter()
    mark = in_flight.mark()
    third = in_flight.enter()
    assert first < second < mark <= third
    done = []

    async def wait() -> None:
        await in_flight.wait(mark)
        done.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        in_flight.leave(second)
        await wait_all_tasks_blocked()
        assert not done
        in_flight.leave(first)
        await wait_all_tasks_blocked()
        assert done
    assert len(in_flight) == 1
    in_flight.leave(third)
    in_flight.leave(third)
    in_flight.leave(0)
    assert len(in_flight) == 0


async def test_waiting_returns_at_once_with_nothing_in_flight():
    in_flight = InFlight()
    with trio.fail_after(60):
        await in_flight.wait(in_flight.mark())
        in_flight.leave(in_flight.enter())
        await in_flight.wait(in_flight.mark())


async def test_newer_work_is_not_waited_for():
    in_flight = InFlight()
    mark = in_flight.mark()
    in_flight.enter()
    with trio.fail_after(60):
        await in_flight.wait(mark)


async def test_tickets_of_many_threads_are_unique():
    in_flight = InFlight()
    tickets: list[int] = []

    def enter() -> None:
        for _ in range(1000):
            tickets.append(in_flight.enter())

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(trio.to_thread.run_sync, enter)
    assert len(set(tickets)) == 4000 == len(in_flight)


async def test_the_age_of_the_oldest_work():
    in_flight = InFlight()
    assert in_flight.oldest_ns() == 0
    first = in_flight.enter()
    await trio.sleep(0.2)
    second = in_flight.enter()
    of_first = in_flight.oldest_ns()
    in_flight.leave(first)
    assert in_flight.oldest_ns() < of_first
    assert of_first >= 150_000_000
    in_flight.leave(second)
    assert in_flight.oldest_ns() == 0
