"""What decides who is let in: the directory of tenants, keys and quotas as the running service
uses them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from betrace.channels import ThreadRunner
from betrace.service.caches import LoadingCache
from betrace.service.config.settings import Settings
from betrace.service.storage.ledger.record import Entries
from betrace.service.tenancy.authentication import TokenAuthenticator
from betrace.service.tenancy.directory import PublicKey, State, TenantDirectory
from betrace.service.tenancy.ledger_filter import LivingEntries
from betrace.service.tenants import Quotas

PUBLIC_KEYS = "publicKeys"
PublicKeys = LoadingCache[tuple[str, str], PublicKey]
"""Keys by tenant and kid."""


class Gate:
    """Built from the settings and the directory. ``operator_token`` is None with authentication
    off; ``tenant_exists`` says whether an operator may act for a tenant.

    ``closed`` are the tenants of which nothing is taken; ``hidden`` is what of the ledger is not
    theirs any more. Both are shared with those who ask, and change.
    """

    def __init__(
        self,
        settings: Settings,
        directory: TenantDirectory,
        operator_token: str | None,
        tenant_exists: Callable[[str], Awaitable[bool]],
    ) -> None:
        self.directory = directory
        self.closed = directory.in_state(State.DELETING, State.DELETED)
        self.hidden = directory.hidden()
        # A thread for keys and one for signatures, so that a flood of tokens keeps nobody else.
        self._keys = ThreadRunner("public-keys", 1)
        self._signatures = ThreadRunner("signatures", 1)
        self.public_keys: PublicKeys = LoadingCache(
            PUBLIC_KEYS,
            lambda key: directory.public_key(*key),
            self._keys,
            maxsize=settings.caches.public_keys,
            ttl_seconds=settings.caches.public_keys_ttl_seconds,
        )
        self.authenticator: TokenAuthenticator | None = None
        if operator_token is not None:
            self.authenticator = TokenAuthenticator(
                settings.auth,
                operator_token,
                self.public_keys.get,
                tenant_exists,
                self._signatures,
            )
        quotas = settings.quotas
        self.quotas = Quotas(
            quotas.spans_per_second,
            quotas.burst_seconds,
            quotas.tenants,
            quotas.tracked_tenants,
        )
        for tenant, quota in directory.quotas().items():
            self.quotas.set(tenant, quota)

    def living(self, ledger: Entries) -> LivingEntries:
        """A ledger without what is hidden."""
        return LivingEntries(ledger, self.hidden)

    def keys_changed(self, tenant: str) -> None:
        """Ask for a tenant's keys again, and verify its tokens again."""
        self.public_keys.invalidate_where(lambda key: key[0] == tenant)
        if self.authenticator is not None:
            self.authenticator.forget(tenant)

    def close(self) -> None:
        """End the worker threads."""
        self._keys.close()
        self._signatures.close()
