"""Who is let in: the tenant directory, keys and quotas as the running service uses them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable

from betrace.channels import ThreadRunner
from betrace.service.caches import LoadingCache
from betrace.service.config.settings import Settings
from betrace.service.storage.ledger.base import LedgerEntries
from betrace.service.tenancy.authentication import Authenticator, OperatorTokens
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.ledger_filter import CurrentEntries
from betrace.service.tenancy.quotas import SpanQuotas
from betrace.service.tenancy.tenant import PublicKey, Tenant, TenantState
from betrace.service.tenancy.tenant_limit import TenantLimit
from betrace.service.tenants import log_name

PUBLIC_KEYS = "publicKeys"
PublicKeys = LoadingCache[tuple[str, str], PublicKey]
"""Keys by tenant and key id."""


class Gate:
    """Built from the settings and the directory. ``tokens`` is None without authentication;
    ``tenant_exists`` says whether an operator may act for a tenant; ``stored`` returns the tenants
    that have something on disk.

    ``closed`` holds the tenants from which nothing is accepted; ``hidden`` says which ledger
    entries no longer belong to a tenant. On a cluster, ``generations`` has the present generation
    of tenants that were deleted, ``revisions`` those of the entries in the bucket that are in the
    directory, and ``implicit`` the tenants that were never created but have sent spans. All are
    shared with their users, and change.
    """

    def __init__(
        self,
        settings: Settings,
        directory: TenantDirectory,
        tokens: OperatorTokens | None,
        tenant_exists: Callable[[str], Awaitable[bool]],
        stored: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self.directory = directory
        self.closed = directory.in_state(TenantState.DELETING, TenantState.DELETED)
        self.hidden = directory.hidden()
        self.generations = directory.generations()
        self.revisions = directory.revisions()
        self.implicit: set[str] = set()
        self.opened_ns: dict[str, int] = {}
        """When tenants that had been deleted were opened again (nanoseconds since 1970)."""
        # Threads of their own, so that a flood of tokens does not delay other work.
        self._keys = ThreadRunner("public-keys", 1)
        self._signatures = ThreadRunner("signatures", 1)
        self.public_keys: PublicKeys = LoadingCache(
            PUBLIC_KEYS,
            lambda key: directory.public_key(*key),
            maxsize=settings.caches.public_keys,
            ttl_seconds=settings.caches.public_keys_ttl_seconds,
        )
        self.authenticator: Authenticator | None = None
        self.tenant_limit: TenantLimit | None = None
        """None with authentication: then only operators create tenants."""
        if tokens is not None:
            self.authenticator = Authenticator(
                settings.auth,
                tokens,
                self._public_key,
                tenant_exists,
                self._signatures,
            )
        else:
            created = directory.in_state(TenantState.ACTIVE)
            self.tenant_limit = TenantLimit(
                settings.ingest.max_tenants, lambda: {*stored(), *self.implicit}, created
            )
        quotas = settings.quotas
        self.quotas = SpanQuotas(
            quotas.spans_per_second,
            quotas.burst_seconds,
            quotas.tenants,
            quotas.tracked_tenants,
        )
        for tenant, quota in directory.quotas().items():
            self.quotas.set(tenant, quota)

    async def _public_key(self, key: tuple[str, str]) -> PublicKey | None:
        found = self.public_keys.peek(key)
        if found is not None:
            return found
        return await self._keys.run(self.public_keys.load_ahead, key, abandon_on_cancel=True)

    def current_entries(self, ledger: LedgerEntries) -> CurrentEntries:
        """The ledger without its hidden entries."""
        return CurrentEntries(ledger, self.hidden)

    def log_name(self, tenant: str) -> str:
        """The tenant's name in the log of a cluster."""
        return log_name(tenant, self.generations.get(tenant, 0))

    def note_implicit(self, tenant: str) -> None:
        """Note a tenant of the cluster that was never created but has sent spans."""
        self.implicit.add(tenant)
        if self.tenant_limit is not None:
            self.tenant_limit.note(tenant)

    def close_tenant(self, tenant: str, generation: int = 0) -> None:
        """Accept nothing of a tenant any more, because it is deleted. On a cluster, ``generation``
        is the one after the deletion."""
        self.closed.add(tenant)
        if generation:
            self.generations[tenant] = generation

    def reopen_tenant(self, tenant: str) -> None:
        """Accept requests of a tenant again, because it was created anew."""
        self.opened_ns[tenant] = time.time_ns()
        self.closed.discard(tenant)

    def follow(self, tenant: Tenant) -> None:
        """Use the new state of a tenant, which the directory already has."""
        name, active = tenant.name, tenant.state is TenantState.ACTIVE
        self.quotas.set(name, tenant.quota if active else None)
        if self.tenant_limit is not None:
            if active:
                self.tenant_limit.create(name)
            else:
                self.tenant_limit.delete(name)
        self.implicit.discard(name)
        if tenant.revision:
            self.revisions[name] = tenant.revision
        self.keys_changed(name)

    def keys_changed(self, tenant: str) -> None:
        """Read a tenant's keys again, and verify its tokens again."""
        self.public_keys.invalidate_where(lambda key: key[0] == tenant)
        if self.authenticator is not None:
            self.authenticator.forget(tenant)

    def close(self) -> None:
        """Stop the worker threads."""
        self._keys.close()
        self._signatures.close()
