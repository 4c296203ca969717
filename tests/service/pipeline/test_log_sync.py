"""Group commit: one sync for all waiting callers, failures for the affected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from betrace.service.pipeline.log_sync import GroupSync
from betrace.service.storage.spanlog.log import LogSyncError


class Log:
    """A span log that only records synced tenants; the disk of tenants in ``fails`` fails."""

    def __init__(self) -> None:
        self.synced: list[set[str] | None] = []
        self.fails: set[str] = set()
        self.error: Exception | None = None

    def sync(self, tenants: Iterable[str] | None) -> int:
        wanted = None if tenants is None else set(tenants)
        self.synced.append(wanted)
        if self.error is not None:
            raise self.error
        failed = self.fails if wanted is None else self.fails & wanted
        if failed:
            raise LogSyncError(sorted(failed), OSError(5, "I/O error"))
        return 0


class Threads:
    """A runner on the virtual clock: a call takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        await trio.sleep(self.seconds)
        return function(*args)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def group(log: Log) -> GroupSync:
    return GroupSync(log, Threads(1.0))  # type: ignore[arg-type]


async def test_callers_that_arrive_during_a_sync_share_the_next(log, group, autojump_clock):
    finished: dict[str, float] = {}

    async def sync(tenant: str, after: float) -> None:
        await trio.sleep(after)
        await group.sync([tenant])
        finished[tenant] = trio.current_time()

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number, after in enumerate((0.0, 0.1, 0.5, 0.9)):
            nursery.start_soon(sync, f"t{number}", after)
    assert log.synced == [{"t0"}, {"t1", "t2", "t3"}]
    assert {name: round(at - start, 6) for name, at in finished.items()} == {
        "t0": 1.0,
        "t1": 2.0,
        "t2": 2.0,
        "t3": 2.0,
    }


async def test_a_sync_that_started_before_the_call_does_not_count(log, group, autojump_clock):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(group.sync, ["t"])
        await trio.sleep(0.5)
        await group.sync(["t"])
        assert log.synced == [{"t"}, {"t"}]


async def test_a_failure_is_raised_for_the_affected_tenants(log, group, autojump_clock):
    log.fails = {"bad"}
    outcomes: dict[str, str] = {}

    async def sync(name: str, tenants: list[str]) -> None:
        try:
            await group.sync(tenants)
            outcomes[name] = "safe"
        except LogSyncError as error:
            outcomes[name] = ",".join(error.tenants)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sync, "first", ["good"])
        await trio.sleep(0.5)
        nursery.start_soon(sync, "good", ["good"])
        nursery.start_soon(sync, "bad", ["bad"])
        nursery.start_soon(sync, "both", ["good", "bad"])
    assert outcomes == {"first": "safe", "good": "safe", "bad": "bad", "both": "bad"}
    assert group.failures == 1
    log.fails = set()
    await group.sync(["bad"])  # the disk works again


@pytest.mark.parametrize("how", ["cancelled", "unexpected error"])
async def test_no_caller_succeeds_without_a_finished_sync(log, group, autojump_clock, how):
    """The task that runs the shared sync is cancelled; the other callers must see a failure."""
    told: list[str] = []

    async def follow() -> None:
        with pytest.raises(LogSyncError):
            await group.sync(["t"])
        told.append("failed")

    scope = trio.CancelScope()

    async def lead() -> None:
        with scope:
            if how == "cancelled":
                await group.sync(["t"])
            else:
                with pytest.raises(RuntimeError):
                    await group.sync(["t"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(group.sync, ["t"])
        await trio.sleep(0.5)
        nursery.start_soon(lead)
        await wait_all_tasks_blocked()
        nursery.start_soon(follow)
        await trio.sleep(0.6)  # the first is done, the second runs
        if how == "cancelled":
            scope.cancel()
        else:
            log.error = RuntimeError("closed")
    assert told == ["failed"]
    log.error = None
    await group.sync(["t"])


async def test_old_failures_are_forgotten(log, group, autojump_clock):
    log.fails = {"t"}
    for _ in range(200):
        with pytest.raises(LogSyncError):
            await group.sync(["t"])
    assert len(group._failed) <= 64


async def test_unsynced_data_is_synced_on_a_schedule(log, group, autojump_clock):
    log.fails = {"t"}
    with trio.move_on_after(10.5):
        await group.every(2.0)
    assert log.synced == [None] * 3  # each takes a second
    assert group.failures == 3
