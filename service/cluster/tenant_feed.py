"""The tenants of a cluster as the configuration bucket has them, and whether ingestion is paused.

One feed serves all roles of a process. While the servers are unavailable, it keeps what it knows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from betrace.service.cluster.tenant_entries import (
    INGESTION_KEY,
    TENANTS_PREFIX,
    TenantEntryError,
    unpack_ingestion,
    unpack_tenant,
)
from betrace.service.storage.jetstream.bucket import ConfigBucket, Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.tenancy.tenant import Tenant

_log = logging.getLogger("service.cluster.tenants")

RETRY_SECONDS = 0.5


class TenantFeed:
    """Follows the bucket. Everything belongs to Trio's thread."""

    def __init__(self, bucket: ConfigBucket) -> None:
        self.bucket = bucket
        self.tenants: dict[str, Tenant] = {}
        """The latest entries, including those of deleted tenants."""
        self.paused = False
        """Whether ingestion is paused."""
        self.ingestion_revision = 0
        """Of the entry that says so."""
        self.synced = trio.Event()
        """Set when the whole bucket was read once."""
        self._on_tenant: list[Callable[[Tenant], object]] = []
        self._on_paused: list[Callable[[bool], object]] = []

    def subscribe(self, on_tenant: Callable[[Tenant], object]) -> None:
        """Call a function with each tenant that is known, and with each change."""
        self._on_tenant.append(on_tenant)
        for tenant in list(self.tenants.values()):
            on_tenant(tenant)

    def subscribe_paused(self, on_paused: Callable[[bool], object]) -> None:
        """Call a function with :attr:`paused`, now and when it changes."""
        self._on_paused.append(on_paused)
        on_paused(self.paused)

    async def run(self) -> None:
        """Watch until cancelled."""
        while not self.synced.is_set():
            try:
                for entry in await self.bucket.entries(TENANTS_PREFIX):
                    self.note(entry)
                self.synced.set()
            except NatsUnavailable as error:
                _log.debug("the tenants cannot be read now: %s", error)
                await trio.sleep(RETRY_SECONDS)
        async for entry in self.bucket.watch(TENANTS_PREFIX):
            self.note(entry)

    def note(self, entry: Entry) -> None:
        """Take an entry of the bucket into account."""
        try:
            if entry.key == INGESTION_KEY:
                self._note_ingestion(entry)
            elif entry.value is not None:
                self._note_tenant(unpack_tenant(entry))
        except TenantEntryError as error:
            _log.error("%s", error)

    def _note_tenant(self, tenant: Tenant) -> None:
        known = self.tenants.get(tenant.name)
        if known is None or known.revision < tenant.revision:
            self.tenants[tenant.name] = tenant
            for call in self._on_tenant:
                call(tenant)

    def _note_ingestion(self, entry: Entry) -> None:
        if entry.revision <= self.ingestion_revision:
            return
        paused = unpack_ingestion(entry)
        self.ingestion_revision = entry.revision
        if paused != self.paused:
            self.paused = paused
            for call in self._on_paused:
                call(paused)
