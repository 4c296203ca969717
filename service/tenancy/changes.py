"""What operators change about a tenant, and what they cannot change.

A change is a function of the tenant as it is, and returns what it becomes. It is applied in a
transaction of the directory, or by compare-and-set in the configuration bucket of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import trio

from betrace.service.tenancy.tenant import PublicKey, Tenant, TenantState
from betrace.service.tenancy.tokens import key_id

MOST_KEYS = 16
"""Keys per tenant, including those in their grace period."""


class TenantError(Exception):
    """The request cannot be carried out for this tenant; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UnknownTenantError(TenantError):
    """The tenant does not exist, or it has no such key."""


class TenantConflictError(TenantError):
    """The tenant already exists, is being deleted, or has too many keys."""


Change = Callable[[str, Tenant | None, int], Tenant]
"""Called with the name, the tenant, None if there was never one of that name, and the time
(nanoseconds since 1970). Raises :exc:`TenantError`."""


class TenantChanges(Protocol):
    """What makes changes: the local directory, or the configuration bucket of a cluster."""

    async def change(self, name: str, change: Change) -> Tenant:
        """Change a tenant, and return it once this process uses its new state. Raises what
        ``change`` raises, and what the directory or the bucket raises."""

    async def delete(self, name: str) -> trio.Event:
        """Refuse what a tenant sends from now on, and begin to delete its data; the event is set
        when that is done."""


def create(quota: int | None, public: bytes | None) -> Change:
    """Create a tenant, with its first key if given; a deleted tenant starts afresh."""

    def change(name: str, found: Tenant | None, now_ns: int) -> Tenant:
        if found is not None and found.state in (TenantState.ACTIVE, TenantState.DELETING):
            state = "is being deleted" if found.state is TenantState.DELETING else "exists"
            raise TenantConflictError(f"the tenant {name} {state}", "choose another name")
        keys = () if public is None else (PublicKey(key_id(public), public, now_ns, None),)
        generation, revision = (found.generation, found.revision) if found is not None else (0, 0)
        return Tenant(name, TenantState.ACTIVE, now_ns, quota, keys, generation, revision)

    return change


def set_quota(quota: int | None) -> Change:
    """Change the quota."""

    def change(name: str, found: Tenant | None, now_ns: int) -> Tenant:
        return replace(_active(name, found), quota=quota)

    return change


def add_key(public: bytes, grace_seconds: float) -> Change:
    """Add a key; the other keys stay valid for ``grace_seconds``."""

    def change(name: str, found: Tenant | None, now_ns: int) -> Tenant:
        tenant = _active(name, found)
        kid = key_id(public)
        if any(key.kid == kid for key in tenant.keys):
            raise TenantConflictError(f"the tenant {name} already has this key", "make a new key")
        until = now_ns + int(grace_seconds * 1e9)
        others = [
            replace(key, expires_ns=min(key.expires_ns or until, until))
            for key in tenant.keys
            if key.expires_ns is None or key.expires_ns > now_ns
        ]
        if len(others) >= MOST_KEYS:
            raise TenantConflictError(
                f"the tenant {name} has {MOST_KEYS} keys, the most allowed",
                "revoke one of them first",
            )
        return replace(tenant, keys=(PublicKey(kid, public, now_ns, None), *others))

    return change


def revoke_key(kid: str) -> Change:
    """Remove a key, which makes its tokens invalid."""

    def change(name: str, found: Tenant | None, now_ns: int) -> Tenant:
        tenant = _active(name, found)
        left = tuple(key for key in tenant.keys if key.kid != kid)
        if len(left) == len(tenant.keys):
            raise UnknownTenantError(
                f"the tenant {name} has no such key", "see `betrace tenants list`"
            )
        return replace(tenant, keys=left)

    return change


def _active(name: str, found: Tenant | None) -> Tenant:
    if found is None or found.state not in (TenantState.ACTIVE, TenantState.DELETING):
        raise UnknownTenantError(f"there is no tenant {name}", "see `betrace tenants list`")
    if found.state is TenantState.DELETING:
        raise TenantConflictError(
            f"the tenant {name} is being deleted", "wait until the deletion is done"
        )
    return found
