"""The tenants at an edge: it admits those that the configuration bucket has.

The edge's own directory is a copy. An edge that is cut off keeps what it knows; it cannot store
spans then. Changes of a tenant reach it within about a second.
"""

from __future__ import annotations

import logging
import time

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.tenant_entries import pack_tenant, tenant_key
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.pipeline.request import Refused
from betrace.service.storage.jetstream.bucket import Conflict
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.tenancy.authentication import closed_tenant
from betrace.service.tenancy.directory import DirectoryError
from betrace.service.tenancy.gate import Gate
from betrace.service.tenancy.tenant import Tenant, TenantState

_log = logging.getLogger("service.edge")

RETRY_SECONDS = 1.0
SYNC_SECONDS = 5.0


class TenantCopy:
    """Keeps the gate and the directory of an edge equal to the bucket."""

    def __init__(self, gate: Gate, feed: TenantFeed, threads: ThreadRunner) -> None:
        self._gate = gate
        self._feed = feed
        self._threads = threads
        self._waiting: dict[str, Tenant] = {}
        self._changed = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the feed until cancelled. Starts when the tenants of the cluster are known, or
        after a moment with those that were known before."""
        with trio.move_on_after(SYNC_SECONDS):
            await self._feed.synced.wait()
        self._feed.subscribe(self._note)
        started = False
        while True:
            while self._waiting:
                await self._copy(list(self._waiting.values()))
            if not started:
                started = True
                task_status.started()
            self._changed = trio.Event()
            await self._changed.wait()

    def _note(self, tenant: Tenant) -> None:
        gate, name = self._gate, tenant.name
        if tenant.state is TenantState.IMPLICIT:
            gate.note_implicit(name)
        elif tenant.revision <= gate.revisions.get(name, 0):
            return
        if tenant.state is TenantState.DELETED or tenant.generation > gate.generations.get(name, 0):
            gate.close_tenant(name, tenant.generation)  # at once; what is written comes later
        self._waiting[name] = tenant
        self._changed.set()

    async def _copy(self, changed: list[Tenant]) -> None:
        created = [each for each in changed if each.state is not TenantState.IMPLICIT]
        try:
            await self._threads.run(self._gate.directory.write, created)
        except DirectoryError as error:
            _log.error("changes of tenants cannot be stored yet: %s", error)
            await trio.sleep(RETRY_SECONDS)
            return
        for tenant in changed:
            if self._waiting[tenant.name] is tenant:  # otherwise it has changed since
                del self._waiting[tenant.name]
                self._use(tenant)

    def _use(self, tenant: Tenant) -> None:
        gate, name = self._gate, tenant.name
        if tenant.state is not TenantState.IMPLICIT:
            gate.follow(tenant)
        if tenant.state is not TenantState.DELETED and name in gate.closed:
            gate.reopen_tenant(name)


class IngestTenants:
    """The tenants of spans on their way to the log. Without authentication, it makes the tenants
    that send spans known to the cluster."""

    def __init__(self, gate: Gate, feed: TenantFeed) -> None:
        self._gate = gate
        self._feed = feed
        self._seen: set[str] = set()
        self._new: dict[str, None] = {}
        self._arrived = trio.Event()

    def was_deleted(self, tenant: str) -> bool:
        """Whether the tenant was deleted since the start, even if it was created again."""
        return tenant in self._gate.closed or tenant in self._gate.opened_ns

    def refusal(self, tenant: str, received_ns: int) -> Refused | None:
        """Why spans that were received at this time (nanoseconds since 1970) are not stored: the
        tenant was deleted meanwhile, and perhaps created again."""
        gate = self._gate
        if tenant in gate.closed or received_ns < gate.opened_ns.get(tenant, 0):
            denied = closed_tenant(tenant)
            return Refused(denied.status, denied.message)
        return None

    def log_name(self, tenant: str) -> str:
        """The tenant's name in the log, for spans that are stored now."""
        if tenant not in self._seen and self._gate.tenant_limit is not None:
            self._seen.add(tenant)
            self._new[tenant] = None
            self._arrived.set()
        return self._gate.log_name(tenant)

    async def run(self) -> None:
        """Make new tenants known until cancelled."""
        while True:
            while self._new:
                tenant = next(iter(self._new))
                try:
                    await self._announce(tenant)
                except NatsUnavailable as error:
                    _log.debug("the tenant %s is not known to others yet: %s", tenant, error)
                    await trio.sleep(RETRY_SECONDS)
                    continue
                del self._new[tenant]
            self._arrived = trio.Event()
            await self._arrived.wait()

    async def _announce(self, name: str) -> None:
        if name in self._feed.tenants:
            return
        tenant = Tenant(name, TenantState.IMPLICIT, time.time_ns(), None)
        try:
            await self._feed.bucket.put(tenant_key(name), pack_tenant(tenant), 0)
        except Conflict:
            _log.debug("the tenant %s is known", name)
