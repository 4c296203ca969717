"""Deletes a tenant with all its data while the service runs and other tenants send.

The order makes it safe. First the tenant is *closed*, durably, so that nothing new is accepted for
it. Then the work in progress is waited for. Then every store forgets the tenant. After two more
checkpoints no file contains it, and the deletion is complete. A deletion that fails or hangs is
retried with growing pauses and does not delay others. After a crash all steps are repeated, and
what the checkpoints still contain of the tenant is skipped.

The ledger is append-only and keeps its accounts; its entries up to now are hidden
(:mod:`betrace.service.tenancy.ledger_filter`).
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from betrace.channels import ThreadRunner
from betrace.service.pipeline.build import Stores
from betrace.service.pipeline.pipeline import Pipeline
from betrace.service.pipeline.recovery.rebuild import Rebuild
from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.storage.dead_letters import DeadLetterError
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.paths import tenant_directory
from betrace.service.tenancy.directory import DirectoryError, Hidden
from betrace.service.tenancy.gate import Gate
from betrace.service.tenancy.tenant import TenantState
from betrace.service.traces.checkpoint import KEPT

_log = logging.getLogger("service.tenancy")

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

AT_ONCE = 4
"""Tenants whose data is deleted at the same time, including deletions that hang."""
ATTEMPT_SECONDS = 60.0
"""After this an attempt that hangs is abandoned, so that others can run."""
RETRY_SECONDS = 5.0
"""Pause after the first failure; it doubles with each further one, up to LONGEST_RETRY_SECONDS."""
LONGEST_RETRY_SECONDS = 300.0
POLL_SECONDS = 0.05

_FAILURES = (
    DeadLetterError,
    DirectoryError,
    LedgerError,
    OSError,
    PoolTimeout,
    StoreError,
    trio.TooSlowError,
)


class Removal:
    """Deletes tenants. Methods are called on the Trio thread.

    Args:
      data: the data directory.
      stores: the stores; the ledger with its hidden entries.
      gate: what lets tenants in.
      erase: blocking callables that delete what others keep of a tenant, such as its rules and its
        archive; each must be idempotent, and may raise :exc:`OSError`.
    """

    def __init__(
        self,
        data: Path,
        stores: Stores,
        gate: Gate,
        pipeline: Pipeline,
        recovery: Recovery,
        rebuild: Rebuild,
        threads: ThreadRunner,
        erase: Sequence[Callable[[str], object]],
    ) -> None:
        self._data = data
        self._ledger, self._log, self._store = stores.ledger, stores.log, stores.duckdb
        self._gate = gate
        self._directory = gate.directory
        self._pipeline = pipeline
        self._recovery = recovery
        self._rebuild = rebuild
        self._threads = threads
        self._erase_elsewhere = erase
        self._wanted: dict[str, trio.Event] = {}
        self._erased: dict[str, None] = {}  # except from checkpoints; in order
        self._arrived, self._forgotten = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self._turns = trio.CapacityLimiter(AT_ONCE)
        self._erasing = ThreadRunner("removal", AT_ONCE)
        self._lock = threading.Lock()
        self._busy: set[str] = set()  # tenants with a deleting thread; guarded by the lock
        self.removed = 0
        """Tenants deleted since the start."""

    async def begin(self, tenant: str, generation: int = 0) -> trio.Event:
        """Close a tenant durably and start its deletion. The event is set when it is complete. On a
        cluster, ``generation`` is the tenant's generation after the deletion."""
        found = self._wanted.get(tenant)
        if found is not None:
            return found
        self._gate.close_tenant(tenant, generation)
        try:
            await self._threads.run(self._directory.begin_deletion, tenant, generation)
        except BaseException:
            if not generation:  # on a cluster it is deleted anyway
                self._gate.closed.discard(tenant)
            raise
        done = self._wanted[tenant] = trio.Event()
        self._arrived.unpark_all()
        return done

    async def reopen(self, tenant: str) -> None:
        """Accept requests of a tenant again, because it was created anew."""
        await self._threads.run(self._pipeline.progress.reopen, tenant)
        await self._threads.run(self._store.reopen, tenant)
        self._pipeline.letters.reopen_tenant(tenant)
        self._gate.reopen_tenant(tenant)

    async def take_up(self) -> None:
        """Continue the deletions of the last process; call it at the start, before anything is read
        back. Deletions that hang are left to :meth:`run`."""
        for tenant in await self._threads.run(self._directory.in_state, TenantState.DELETING):
            self._wanted[tenant] = trio.Event()
        with trio.move_on_after(ATTEMPT_SECONDS):
            async with trio.open_nursery() as nursery:
                for tenant in self._wanted:
                    nursery.start_soon(self._attempt, tenant)

    async def run(self) -> None:
        """Delete tenants, forever. Start it once the traces are restored."""
        begun: set[trio.Event] = set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._forget)
            while True:
                for tenant, done in self._wanted.items():
                    if done not in begun:
                        nursery.start_soon(self._delete, tenant)
                begun = set(self._wanted.values())
                await self._arrived.park()

    def close(self) -> None:
        """Start no more threads."""
        self._erasing.close()

    async def _delete(self, tenant: str) -> None:
        pause = RETRY_SECONDS
        while not await self._attempt(tenant):
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)
        self._erased[tenant] = None
        self._forgotten.unpark_all()

    async def _attempt(self, tenant: str) -> bool:
        """Try to delete a tenant; returns whether only checkpoints still contain it."""
        async with self._turns:
            try:
                with trio.fail_after(ATTEMPT_SECONDS):
                    await self._erase(tenant)
            except _FAILURES as error:
                _log.warning(
                    "tenant %s cannot be deleted yet: %s",
                    tenant,
                    "it took too long" if isinstance(error, trio.TooSlowError) else error,
                )
                return False
            return True

    async def _forget(self) -> None:
        """Complete the deletion of erased tenants, all together, once the checkpoints that contain
        them are replaced."""
        while True:
            while not self._erased:
                await self._forgotten.park()
            erased = list(self._erased)
            try:
                for _ in range(KEPT):
                    if not await self._recovery.save():
                        raise OSError("a checkpoint without them cannot be written")
                for tenant in erased:
                    await self._threads.run(self._directory.finish_deletion, tenant)
                    del self._erased[tenant]
                    self._wanted.pop(tenant).set()
                    self.removed += 1
                    _log.info("tenant %s is deleted with all its data", tenant)
            except _FAILURES as error:
                _log.warning("%d tenants cannot be deleted yet: %s", len(self._erased), error)
                await trio.sleep(RETRY_SECONDS)

    async def _run(self, tenant: str, fn: Callable[[*Ts], R], *args: *Ts) -> R:
        """Call ``fn`` in a thread, which is abandoned if the attempt ends."""

        def alone() -> R:
            # An abandoned thread must return before the tenant may be created anew.
            with self._lock:
                if tenant in self._busy:
                    raise OSError("an earlier attempt still hangs")
                self._busy.add(tenant)
            try:
                return fn(*args)
            finally:
                with self._lock:
                    self._busy.discard(tenant)

        return await self._erasing.run(alone, abandon_on_cancel=True)

    async def _erase(self, tenant: str) -> None:
        pipeline = self._pipeline
        self._gate.keys_changed(tenant)
        pipeline.letters.close_tenant(tenant)
        await self._run(tenant, pipeline.progress.close, tenant)
        while pipeline.progress.waiting(tenant):
            await self._run(tenant, pipeline.correlate.discard_waiting, tenant)
            await trio.sleep(POLL_SECONDS)
        mark = await self._run(tenant, pipeline.correlate.forget, tenant)
        await pipeline.in_flight.wait(mark)
        await _until(lambda: self._rebuild.working != tenant)
        self._rebuild.forget(tenant)
        pipeline.evaluate.forget(tenant)
        pipeline.rules.forget(tenant)
        await pipeline.letters.forget_tenant(tenant)
        for fallback in pipeline.fallbacks.values():
            await fallback.drop(tenant)
        self._gate.hidden[tenant] = await self._run(tenant, self._hide, tenant)
        await self._run(tenant, self._remove_files, tenant)
        pipeline.progress.forget(tenant)

    def _hide(self, tenant: str) -> Hidden:
        after = 0
        while page := self._ledger.outgoing(after):
            after = page[-1][0]
            if any(signal.tenant == tenant for _, signal in page):
                raise OSError("the outcome of ledger calls with its signals is not known yet")
        hidden = Hidden(self._ledger.last_entry(tenant), self._ledger.count(tenant))
        self._directory.hide(tenant, hidden)
        return hidden

    def _remove_files(self, tenant: str) -> None:
        self._store.remove(tenant)
        self._log.delete_tenant(tenant)
        for erase in self._erase_elsewhere:
            erase(tenant)
        with suppress(FileNotFoundError):  # what is left: notes, quarantined files
            shutil.rmtree(tenant_directory(self._data, tenant))


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that threads make true without an event."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(POLL_SECONDS)
