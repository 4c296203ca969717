"""Who is let in: the tenant directory, keys and quotas as the running service uses them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from betrace.channels import ThreadRunner
from betrace.service.caches import LoadingCache
from betrace.service.config.settings import Settings
from betrace.service.storage.ledger.base import LedgerEntries
from betrace.service.tenancy.authentication import Authenticator, OperatorTokens
from betrace.service.tenancy.directory import PublicKey, TenantDirectory, TenantState
from betrace.service.tenancy.ledger_filter import CurrentEntries
from betrace.service.tenancy.quotas import SpanQuotas
from betrace.service.tenancy.tenant_limit import TenantLimit

PUBLIC_KEYS = "publicKeys"
PublicKeys = LoadingCache[tuple[str, str], PublicKey]
"""Keys by tenant and key id."""


class Gate:
    """Built from the settings and the directory. ``tokens`` is None without authentication;
    ``tenant_exists`` says whether an operator may act for a tenant; ``stored`` returns the tenants
    that have something on disk.

    ``closed`` holds the tenants from which nothing is accepted; ``hidden`` says which ledger
    entries no longer belong to a tenant. Both are shared with their users, and change.
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
            self.tenant_limit = TenantLimit(settings.ingest.max_tenants, stored, created)
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

    def keys_changed(self, tenant: str) -> None:
        """Read a tenant's keys again, and verify its tokens again."""
        self.public_keys.invalidate_where(lambda key: key[0] == tenant)
        if self.authenticator is not None:
            self.authenticator.forget(tenant)

    def close(self) -> None:
        """Stop the worker threads."""
        self._keys.close()
        self._signatures.close()
