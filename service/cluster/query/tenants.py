"""The tenants at a query node: it changes them in the configuration bucket, and follows the bucket.

A change is a compare-and-set, so any number of query nodes can make changes at the same time. Each
node deletes its own data of a tenant that was deleted, however late it learns of it, and only then
uses the tenant that was created again under the same name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.tenant_entries import (
    TenantEntryError,
    pack_tenant,
    tenant_key,
    unpack_tenant,
)
from betrace.service.cluster.tenant_feed import RETRY_SECONDS, TenantFeed
from betrace.service.pipeline.recovery.removal import Removal
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.jetstream.bucket import Conflict, Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.tenancy.changes import Change, TenantConflictError
from betrace.service.tenancy.directory import DirectoryError
from betrace.service.tenancy.gate import Gate
from betrace.service.tenancy.tenant import Tenant, TenantState

_log = logging.getLogger("service.query")

FOLLOW_SECONDS = 10.0

_FAILURES = (DirectoryError, LedgerError, OSError, PoolTimeout, StoreError)


class ClusterTenants:
    """Implements :class:`betrace.service.tenancy.changes.TenantChanges`. Everything belongs to
    Trio's thread.

    ``stored`` returns the tenants of which there is something on disk, and blocks; ``drop_rules``
    removes what the buckets still have of a deleted tenant's rules; ``end_streams`` ends a tenant's
    signal streams, because a key was revoked or it was deleted.
    """

    def __init__(
        self,
        feed: TenantFeed,
        gate: Gate,
        removal: Removal,
        threads: ThreadRunner,
        stored: Callable[[], Collection[str]],
        drop_rules: Callable[[str], Awaitable[None]],
        end_streams: Callable[[str], object],
    ) -> None:
        self._feed = feed
        self._gate = gate
        self._removal = removal
        self._threads = threads
        self._stored = stored
        self._drop_rules = drop_rules
        self._end_streams = end_streams
        self._latest: dict[str, Tenant] = {}  # not followed yet
        self._busy: set[str] = set()
        self._waiting: dict[str, list[trio.Event]] = {}  # for deletions
        self._arrived = trio.Event()
        self._changed = trio.Event()  # a change is followed completely

    # Following

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish what only this node knows, then follow the bucket until cancelled. Starts when
        everything in the bucket is known."""
        async with trio.open_nursery() as nursery:
            await self._publish_all()
            await self._feed.synced.wait()
            self._feed.subscribe(self._note)
            task_status.started()
            while True:
                for name in list(self._latest):
                    if name not in self._busy:
                        self._busy.add(name)
                        nursery.start_soon(self._follow, name)
                self._arrived = trio.Event()
                await self._arrived.wait()

    async def _publish_all(self) -> None:
        """Publish the tenants that were made before this node was part of the cluster."""
        for tenant in await self._threads.run(self._gate.directory.all):
            while not tenant.revision:
                try:
                    await self._publish(tenant)
                    break
                except NatsUnavailable as error:
                    _log.debug("the tenant %s is not published yet: %s", tenant.name, error)
                    await trio.sleep(RETRY_SECONDS)

    async def _publish(self, tenant: Tenant) -> None:
        bucket, key = self._feed.bucket, tenant_key(tenant.name)
        entry = await bucket.get(key)
        if entry is not None and not _is_implicit(entry):
            return
        try:
            await bucket.put(key, pack_tenant(tenant), 0 if entry is None else entry.revision)
        except Conflict:
            await self._publish(tenant)

    def _note(self, tenant: Tenant) -> None:
        gate, name = self._gate, tenant.name
        if tenant.state is TenantState.IMPLICIT:
            gate.note_implicit(name)
            return
        if tenant.revision <= gate.revisions.get(name, 0):
            return
        if tenant.state is TenantState.DELETED or tenant.generation > gate.generations.get(name, 0):
            gate.close_tenant(name, tenant.generation)
            self._end_streams(name)
        self._latest[name] = tenant
        self._arrived.set()

    async def _follow(self, name: str) -> None:
        while name in self._latest:
            tenant = self._latest[name]
            try:
                await self._adopt(tenant)
            except _FAILURES as error:
                _log.error("the tenant %s cannot be changed here yet: %s", name, error)
                await trio.sleep(RETRY_SECONDS)
                continue
            if self._latest[name] is tenant:
                del self._latest[name]
            self._changed.set()
            self._changed = trio.Event()
        self._busy.discard(name)
        for done in self._waiting.pop(name, ()):
            done.set()

    async def _adopt(self, tenant: Tenant) -> None:
        """Use a tenant as the bucket has it, once its data from before its last deletion is
        deleted."""
        name, gate = tenant.name, self._gate
        local = await self._threads.run(gate.directory.find, name)
        state, generation = (local.state, local.generation) if local is not None else (None, 0)
        outdated = generation < tenant.generation and state is not TenantState.DELETED
        if outdated and local is None:  # this node is new, or the tenant was never created
            outdated = name in await self._threads.run(self._stored)
        if outdated or state is TenantState.DELETING:
            done = await self._removal.begin(name, tenant.generation)
            gate.follow(Tenant(name, TenantState.DELETING, 0, None))
            await done.wait()
        await self._threads.run(gate.directory.write, [tenant])
        gate.follow(tenant)
        if tenant.state is TenantState.ACTIVE and name in gate.closed:
            await self._removal.reopen(name)
        kept = {key.kid for key in tenant.keys}
        if local is not None and any(key.kid not in kept for key in local.keys):
            self._end_streams(name)

    # Changing

    async def change(self, name: str, change: Change) -> Tenant:
        """Change a tenant in the bucket."""
        bucket, key = self._feed.bucket, tenant_key(name)
        while True:
            entry = await bucket.get(key)
            found = _tenant(entry)
            made = change(name, found, time.time_ns())
            if self._is_deleting(name):
                raise TenantConflictError(
                    f"the tenant {name} is being deleted", "wait until the deletion is done"
                )
            if found is not None and found.state is TenantState.DELETED:
                await self._drop_rules(name)
            try:
                value = pack_tenant(made)
                revision = await bucket.put(key, value, 0 if entry is None else entry.revision)
            except Conflict:
                continue
            self._feed.note(Entry(key, value, revision))
            await self._followed(name, revision)
            return replace(made, revision=revision)

    async def delete(self, name: str) -> trio.Event:
        """Delete a tenant in the bucket, and begin to delete this node's data of it."""
        bucket, key = self._feed.bucket, tenant_key(name)
        while True:
            entry = await bucket.get(key)
            found = _tenant(entry)
            if entry is None or found is None or found.state is not TenantState.DELETED:
                gone = found or Tenant(name, TenantState.DELETED, time.time_ns(), None)
                value = pack_tenant(replace(gone, state=TenantState.DELETED))
                try:
                    revision = await bucket.put(key, value, 0 if entry is None else entry.revision)
                except Conflict:
                    continue
                entry = Entry(key, value, revision)
            self._feed.note(entry)
            break
        return self._removed(name)

    def _is_deleting(self, name: str) -> bool:
        """Whether this node's data from before a deletion are not deleted yet."""
        return name in self._latest and name in self._gate.closed

    async def _followed(self, name: str, revision: int) -> None:
        """Wait until this node uses a tenant at a revision; not forever, because the bucket has it
        in any case."""
        with trio.move_on_after(FOLLOW_SECONDS):
            while self._gate.revisions.get(name, 0) < revision:
                await self._changed.wait()

    def _removed(self, name: str) -> trio.Event:
        """An event that is set when this node's data of a deleted tenant are deleted."""
        done = trio.Event()
        if name in self._latest:
            self._waiting.setdefault(name, []).append(done)
        else:
            done.set()
        return done


def _tenant(entry: Entry | None) -> Tenant | None:
    try:
        return None if entry is None else unpack_tenant(entry)
    except TenantEntryError as error:
        raise TenantConflictError(
            str(error), "is there a newer version at another node?"
        ) from error


def _is_implicit(entry: Entry) -> bool:
    try:
        return unpack_tenant(entry).state is TenantState.IMPLICIT
    except TenantEntryError:
        return False
