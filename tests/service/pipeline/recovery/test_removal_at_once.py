"""Deletions that hang or fail do not delay others, in virtual time."""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import trio

from betrace.channels import ThreadRunner
from betrace.service.pipeline.recovery.removal import (
    AT_ONCE,
    ATTEMPT_SECONDS,
    RETRY_SECONDS,
    Removal,
)
from betrace.service.tenancy import changes
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.tenant import TenantState
from tests.support import virtual


class Store:
    """A store whose ``remove`` hangs for some tenants and fails a few times for others."""

    def __init__(self) -> None:
        self.stuck: dict[str, virtual.Hang] = {}
        self.failures: dict[str, int] = {}
        self.tried: list[tuple[float, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.now = trio.lowlevel.current_clock().current_time

    def remove(self, tenant: str) -> None:
        with self.lock:
            self.tried.append((self.now(), tenant))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if tenant in self.stuck:
                self.stuck[tenant].wait()
            if self.failures.get(tenant, 0):
                self.failures[tenant] -= 1
                raise OSError("the disk is away")
        finally:
            with self.lock:
                self.at_once -= 1

    def times(self, tenant: str) -> list[float]:
        return [when for when, each in self.tried if each == tenant]


class Recovery:
    """Counts checkpoints; ``failing`` of them cannot be written."""

    saved = failing = 0

    async def save(self) -> bool:
        await trio.sleep(1)
        if self.failing:
            self.failing -= 1
            return False
        self.saved += 1
        return True


async def nothing(*_: Any) -> None:
    pass


@asynccontextmanager
async def deleting(path: Path, *tenants: str):
    directory = TenantDirectory(path / "tenants.sqlite")
    for tenant in tenants:
        directory.change(tenant, changes.create(None, None))
    store, recovery = Store(), Recovery()
    pipeline = MagicMock()
    pipeline.progress.waiting.return_value = False
    pipeline.in_flight.wait = nothing
    pipeline.letters.forget_tenant = nothing
    pipeline.fallbacks = {}
    ledger = MagicMock(**{"outgoing.return_value": [], "last_entry.return_value": 0})
    ledger.count.return_value = 0
    gate = SimpleNamespace(
        directory=directory,
        closed=set(),
        hidden={},
        keys_changed=lambda tenant: None,
        close_tenant=lambda tenant, generation: None,
    )
    stores: Any = SimpleNamespace(log=MagicMock(), ledger=ledger, duckdb=store)
    with ThreadRunner("service", 2) as threads:
        removal = Removal(
            path / "data",
            stores,
            gate,  # type: ignore[arg-type]
            pipeline,
            recovery,  # type: ignore[arg-type]
            MagicMock(working=None),
            threads,
            (),
        )
        try:
            yield removal, store, recovery, directory
        finally:
            for hang in store.stuck.values():
                hang.release()
            removal.close()
    directory.close()


def test_hanging_deletions_do_not_delay_others(tmp_path: Path) -> None:
    names = [f"t{n}" for n in range(12)]

    async def main() -> None:
        async with (
            deleting(tmp_path, *names) as (removal, store, recovery, directory),
            trio.open_nursery() as nursery,
        ):
            store.stuck = {name: virtual.Hang() for name in names[:3]}
            nursery.start_soon(removal.run)
            done = {name: await removal.begin(name) for name in names}
            with trio.fail_after(ATTEMPT_SECONDS / 2):
                for name in names[3:]:
                    await done[name].wait()
            assert store.most_at_once <= AT_ONCE
            assert recovery.saved <= 8  # shared
            assert directory.in_state(TenantState.DELETING) == set(names[:3])
            # While the thread of an ended attempt hangs, no second one is started.
            await trio.sleep(10 * ATTEMPT_SECONDS)
            assert [len(store.times(name)) for name in names[:3]] == [1, 1, 1]
            for hang in store.stuck.values():
                hang.release()
            store.stuck.clear()
            with trio.fail_after(1000):
                for name in names[:3]:
                    await done[name].wait()
            assert directory.in_state(TenantState.DELETING) == set()
            assert removal.removed == 12
            nursery.cancel_scope.cancel()

    virtual.run(main)


def test_a_failing_deletion_is_retried_with_growing_pauses(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            deleting(tmp_path, "acme", "beta") as (removal, store, recovery, _),
            trio.open_nursery() as nursery,
        ):
            store.failures["acme"] = 10
            recovery.failing = 1
            nursery.start_soon(removal.run)
            acme, beta = await removal.begin("acme"), await removal.begin("beta")
            with trio.fail_after(2 * RETRY_SECONDS):
                await beta.wait()
            await acme.wait()
            times = store.times("acme")
            pauses = [round(b - a) for a, b in pairwise(times)]
            assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300, 300]
            assert await removal.begin("acme") is not acme  # it may be done once more
            nursery.cancel_scope.cancel()

    virtual.run(main)


def test_a_hanging_deletion_does_not_block_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with deleting(tmp_path, "acme", "beta") as (removal, store, _, directory):
            store.stuck["acme"] = virtual.Hang()
            directory.begin_deletion("acme")
            directory.begin_deletion("beta")
            began = trio.current_time()
            await removal.take_up()
            assert trio.current_time() - began <= ATTEMPT_SECONDS + 1
            assert {tenant for _, tenant in store.tried} == {"acme", "beta"}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(removal.run)
                await trio.sleep(1)
                store.stuck.pop("acme").release()
                for done in list(removal._wanted.values()):
                    await done.wait()
                nursery.cancel_scope.cancel()
            assert directory.in_state(TenantState.DELETED) == {"acme", "beta"}

    virtual.run(main)
