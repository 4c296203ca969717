"""Calls in worker threads, including calls that hang."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from betrace.channels import ThreadRunner, ThreadTimeout


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Hanging calls wait for this event; it is set at the end, so that threads end with the
    test."""
    event = threading.Event()
    yield event
    event.set()


def live(name: str) -> int:
    return sum(thread.name.startswith(f"{name}-") for thread in threading.enumerate())


async def until(condition: object) -> None:
    assert callable(condition)
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.005)


async def test_returns_results_and_raises_errors() -> None:
    with ThreadRunner("calls", 2) as threads:
        assert await threads.run(divmod, 7, 3) == (2, 1)
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 7, 0)
        with pytest.raises(SystemExit):
            await threads.run(exit_thread)
        assert await threads.run(threading.current_thread) is not threading.current_thread()
        assert threads.statistics().calls == 4
        assert threads.statistics().running == 0


def exit_thread() -> None:
    raise SystemExit(3)


def system_name() -> str:
    return Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system has no /proc")
async def test_a_thread_has_its_runners_name_in_the_system() -> None:
    with ThreadRunner("a-name-of-20-letters", 1) as threads:
        assert await threads.run(system_name) == "a-name-of-20-le"


async def test_systems_without_thread_names_are_supported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    with ThreadRunner("calls", 1) as threads:
        assert await threads.run(divmod, 7, 3) == (2, 1)


async def test_threads_start_on_demand_and_end_at_close() -> None:
    with ThreadRunner("pool", 3) as threads:
        assert live("pool") == 0
        for _ in range(5):
            await threads.run(int)
        assert live("pool") == 1
        barrier = threading.Barrier(3)
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(threads.run, barrier.wait)
        assert live("pool") == 3
    await until(lambda: live("pool") == 0)
    threads.close()
    with pytest.raises(trio.ClosedResourceError):
        await threads.run(int)


async def test_no_more_calls_at_once_than_threads(release: threading.Event) -> None:
    with ThreadRunner("limit", 2) as threads:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(threads.run, release.wait)
            await wait_all_tasks_blocked()
            now = threads.statistics()
            assert (now.running, now.waiting, live("limit")) == (2, 3, 2)
            release.set()
        assert threads.statistics().calls == 5


async def test_a_hanging_thread_is_left_behind_counted_and_replaced(
    release: threading.Event,
) -> None:
    with ThreadRunner("hang", 1) as threads:
        with pytest.raises(ThreadTimeout, match=r"no result after 0\.05 s; thread left behind"):
            await threads.run(release.wait, timeout=0.05)
        now = threads.statistics()
        assert (now.abandoned, now.left_behind, now.running) == (1, 1, 0)
        assert await threads.run(abs, -3, timeout=60.0) == 3
        assert live("hang") == 2
        release.set()
        await until(lambda: threads.statistics().left_behind == 0)
        await until(lambda: live("hang") == 1)
        assert threads.statistics().abandoned == 1
        assert await threads.run(abs, -4) == 4


async def test_a_thread_that_returns_before_its_replacement_is_reused(
    release: threading.Event,
) -> None:
    with ThreadRunner("back", 1) as threads:
        with pytest.raises(ThreadTimeout):
            await threads.run(release.wait, timeout=0.02)
        release.set()
        await until(lambda: threads.statistics().left_behind == 0)
        assert await threads.run(abs, -3) == 3
        assert live("back") == 1


async def test_the_number_of_replaced_threads_is_limited(release: threading.Event) -> None:
    with ThreadRunner("bound", 1, max_left_behind=1) as threads:
        for _ in range(2):
            with pytest.raises(ThreadTimeout, match="left behind"):
                await threads.run(release.wait, timeout=0.02)
        with pytest.raises(ThreadTimeout, match="no thread was free"):
            await threads.run(int, timeout=0.02)
        assert live("bound") == 2
        release.set()
        assert await threads.run(abs, -3, timeout=60.0) == 3
        await until(lambda: threads.statistics().left_behind == 0)
        await until(lambda: live("bound") == 1)


async def cancel_when_blocked(scope: trio.CancelScope) -> None:
    await wait_all_tasks_blocked()
    scope.cancel()


async def set_soon(event: threading.Event) -> None:
    await trio.sleep(0.05)
    event.set()


@pytest.mark.parametrize("timeout", [None, 60.0])
async def test_a_cancelled_caller_waits_for_its_thread(
    release: threading.Event, timeout: float | None
) -> None:
    with ThreadRunner("wait", 1) as threads:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_blocked, scope)
                nursery.start_soon(set_soon, release)
                result = await threads.run(release.wait, 60.0, timeout=timeout)
        assert scope.cancel_called
        assert result is True  # the work was done, so its result is kept
        assert threads.statistics().abandoned == 0


async def test_a_cancelled_caller_waits_no_longer_than_the_timeout(
    release: threading.Event,
) -> None:
    with ThreadRunner("wait", 1) as threads:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_blocked, scope)
                with pytest.raises(ThreadTimeout):
                    await threads.run(release.wait, timeout=0.1)
        assert threads.statistics().abandoned == 1


@pytest.mark.parametrize("timeout", [None, 60.0])
async def test_a_thread_may_be_left_behind_by_cancellation(
    release: threading.Event, timeout: float | None
) -> None:
    with ThreadRunner("leave", 1) as threads:
        with trio.move_on_after(0.05) as scope:
            await threads.run(release.wait, timeout=timeout, abandon_on_cancel=True)
        assert scope.cancelled_caught
        assert threads.statistics().left_behind == 1
        assert await threads.run(abs, -3) == 3


async def test_a_call_cancelled_before_it_starts_does_nothing(
    release: threading.Event,
) -> None:
    with ThreadRunner("early", 1) as threads:
        with trio.CancelScope() as scope:
            scope.cancel()
            await threads.run(release.set)
        assert threads.statistics().calls == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, release.wait)
            await wait_all_tasks_blocked()
            with trio.move_on_after(0.02):
                await threads.run(release.set)
            assert not release.is_set()
            assert threads.statistics().waiting == 0
            release.set()


async def test_a_call_that_waited_for_a_thread_is_refused_after_close(
    release: threading.Event,
) -> None:
    with ThreadRunner("closed", 1) as threads:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, release.wait)
            await wait_all_tasks_blocked()

            async def wait_in_vain() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await threads.run(int)

            nursery.start_soon(wait_in_vain)
            await wait_all_tasks_blocked()
            threads.close()
            release.set()
    await until(lambda: live("closed") == 0)


async def test_a_thread_left_behind_ends_after_close(release: threading.Event) -> None:
    with ThreadRunner("late", 1) as threads, pytest.raises(ThreadTimeout):
        await threads.run(release.wait, timeout=0.02)
    release.set()
    await until(lambda: live("late") == 0)


def test_a_thread_left_behind_ends_after_trio(release: threading.Event) -> None:
    async def main() -> None:
        with ThreadRunner("outlive", 1) as threads, pytest.raises(ThreadTimeout):
            await threads.run(release.wait, timeout=0.02)

    trio.run(main)
    assert live("outlive") == 1
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("outlive-"):
            thread.join(60)
    assert live("outlive") == 0


async def test_results_and_errors_are_not_kept() -> None:
    class Big:
        pass

    kept: list[weakref.ref[Big]] = []

    def make() -> Big:
        big = Big()
        kept.append(weakref.ref(big))
        return big

    def fail() -> None:
        big = make()
        raise ValueError(id(big))

    gc.disable()  # reference counts alone must free them
    try:
        with ThreadRunner("memory", 1) as threads:
            await threads.run(make)
            with contextlib.suppress(ValueError):
                await threads.run(fail)
            await until(lambda: [ref() for ref in kept] == [None, None])
    finally:
        gc.enable()


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        ThreadRunner("none", 0)


async def test_calls_that_wait_let_others_run():
    with ThreadRunner("test", 4, busy=1) as threads:
        released = threading.Event()
        order: list[str] = []

        def wait() -> None:
            with threads.waiting():
                released.wait(60)
            order.append("waited")

        def work(name: str) -> None:
            order.append(name)
            if name == "last":
                released.set()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(threads.run, wait)
                nursery.start_soon(threads.run, wait)
                await trio.sleep(0.01)
                await threads.run(work, "first")
                await threads.run(work, "last")
            assert order == ["first", "last", "waited", "waited"]
            assert threads._alive == 1


async def test_few_threads_take_many_calls():
    with ThreadRunner("test", 8, busy=2) as threads:
        names: set[str] = set()

        async def call() -> None:
            names.add(await threads.run(lambda: threading.current_thread().name))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(call)
        assert 1 <= len(names) <= 2
