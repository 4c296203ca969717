"""Deleting a tenant with all its data, while the service runs and others send.

The order makes it safe: first the tenant is *closed*, durably, so that nothing new of it is taken;
then what is under way is waited for; then every store forgets it; and last, two checkpoints later,
no file has it any more and the deletion is complete. A step that fails is tried again; after a
crash all steps are, and what the checkpoints still have of the tenant is passed over.

The ledger is append-only and keeps its accounts; its entries up to now are hidden
(:mod:`service.tenancy.living`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

from channels import ThreadRunner
from service.archive.parquet import tenant_archive
from service.ledger.base import LedgerError
from service.pipeline import Pipeline
from service.queries import StoreQueries
from service.rebuild import Rebuild
from service.record import Entries
from service.recovery import Recovery
from service.storage.deadletters import DeadLetterError
from service.storage.duck import DuckStore, PoolTimeout, StoreError
from service.storage.paths import tenant_directory
from service.storage.spanlog import SpanLog
from service.tenancy.directory import DirectoryError, Hidden, State
from service.tenancy.gate import Gate
from service.traces.checkpoint import KEPT

_log = logging.getLogger("service.tenancy")

POLL_SECONDS = 0.05
RETRY_SECONDS = 5.0

_FAILURES = (DeadLetterError, DirectoryError, LedgerError, OSError, PoolTimeout, StoreError)


class Removal:
    """Deletes tenants. Methods are called on the Trio thread.

    Args:
      data: the data directory.
      archive: the directory of the archive.
      gate: what lets tenants in.
      ledger: all of it, what is hidden too.
    """

    def __init__(
        self,
        data: Path,
        archive: Path,
        gate: Gate,
        ledger: Entries,
        log: SpanLog,
        store: DuckStore,
        queries: StoreQueries,
        pipeline: Pipeline,
        recovery: Recovery,
        rebuild: Rebuild,
        threads: ThreadRunner,
    ) -> None:
        self._data = data
        self._archive = archive
        self._gate = gate
        self._directory = gate.directory
        self._closed = gate.closed
        self._ledger = ledger
        self._log = log
        self._store = store
        self._queries = queries
        self._pipeline = pipeline
        self._recovery = recovery
        self._rebuild = rebuild
        self._threads = threads
        self._wanted: dict[str, trio.Event] = {}
        self._arrived = trio.lowlevel.ParkingLot()
        self.removed = 0
        """Tenants deleted since the start."""

    async def begin(self, tenant: str) -> trio.Event:
        """Close a tenant, durably, and have it deleted; the event is set when that is done."""
        found = self._wanted.get(tenant)
        if found is not None:
            return found
        self._closed.add(tenant)
        try:
            await self._threads.run(self._directory.begin_deletion, tenant)
        except BaseException:
            self._closed.discard(tenant)
            raise
        done = self._wanted[tenant] = trio.Event()
        self._arrived.unpark_all()
        return done

    async def reopen(self, tenant: str) -> None:
        """Take what a tenant sends again: it was created anew."""
        await self._threads.run(self._pipeline.progress.reopen, tenant)
        await self._threads.run(self._store.reopen, tenant)
        self._pipeline.letters.reopen_tenant(tenant)
        self._closed.discard(tenant)

    async def take_up(self) -> None:
        """At the start, before anything is read back: go on where the last process stopped."""
        for tenant in await self._threads.run(self._directory.in_state, State.DELETING):
            self._wanted[tenant] = trio.Event()
            try:
                await self._erase(tenant)
            except _FAILURES as error:
                _log.warning("the tenant %s cannot be deleted yet: %s", tenant, error)

    async def run(self) -> None:
        """Delete tenants as they come, for ever; once the traces are restored."""
        while True:
            for tenant in list(self._wanted):
                try:
                    await self._delete(tenant)
                except _FAILURES as error:
                    _log.warning("the tenant %s cannot be deleted yet: %s", tenant, error)
            with trio.move_on_after(RETRY_SECONDS if self._wanted else float("inf")):
                await self._arrived.park()

    async def _delete(self, tenant: str) -> None:
        await self._erase(tenant)
        for _ in range(KEPT):
            if not await self._recovery.save():
                raise OSError("a checkpoint without it cannot be written")
        await self._threads.run(self._directory.finish_deletion, tenant)
        self._wanted.pop(tenant).set()
        self.removed += 1
        _log.info("the tenant %s is deleted, with all its data", tenant)

    async def _erase(self, tenant: str) -> None:
        pipeline, run = self._pipeline, self._threads.run
        self._gate.keys_changed(tenant)
        pipeline.letters.close_tenant(tenant)
        await run(pipeline.progress.close, tenant)
        await _until(lambda: not pipeline.progress.waiting(tenant))
        mark = await run(pipeline.correlate.forget, tenant)
        await pipeline.in_flight.wait(mark)
        await _until(lambda: self._rebuild.working != tenant)
        self._rebuild.forget(tenant)
        pipeline.evaluate.forget(tenant)
        await pipeline.letters.forget_tenant(tenant)
        for fallback in pipeline.fallbacks.values():
            await fallback.drop(tenant)
        self._gate.hidden[tenant] = await run(self._hide, tenant)
        await run(self._remove_files, tenant)
        pipeline.progress.forget(tenant)

    def _hide(self, tenant: str) -> Hidden:
        after = 0
        while page := self._ledger.held(after):
            after = page[-1][0]
            if any(signal.tenant == tenant for _, signal in page):
                raise OSError("the ledger does not know yet whether it has signals of it")
        hidden = Hidden(self._ledger.last_entry(tenant), self._ledger.count(tenant))
        self._directory.hide(tenant, hidden)
        return hidden

    def _remove_files(self, tenant: str) -> None:
        self._queries.delete_rules(tenant)
        self._store.remove(tenant)
        self._log.delete_tenant(tenant)
        for directory in (
            tenant_archive(self._archive, tenant),
            tenant_directory(self._data, tenant),  # what else there is: notes, files put aside
        ):
            with suppress(FileNotFoundError):
                shutil.rmtree(directory)


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for what threads do, of which no event tells."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(POLL_SECONDS)
