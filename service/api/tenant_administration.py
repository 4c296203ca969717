"""What operators do with tenants; each action is written to the audit log first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import trio

from betrace.channels import ThreadRunner
from betrace.service.api.audit import AuditTrail, Operator
from betrace.service.api.subscriptions import Subscriptions
from betrace.service.tenancy.changes import (
    TenantChanges,
    UnknownTenantError,
    add_key,
    create,
    revoke_key,
    set_quota,
)
from betrace.service.tenancy.gate import Gate
from betrace.service.tenancy.tenant import Tenant, TenantState
from betrace.service.tenancy.tokens import read_public_key
from betrace.service.times import write_time

Json = dict[str, Any]


class TenantAdministration:
    """Reads and changes tenants. ``tenants`` makes the changes; ``stored`` returns the tenants that
    have something on disk. As JSON a tenant is ``name``, ``state``, ``createdAt``, ``quota``
    and ``keys``. Methods are called on the Trio thread. They raise
    :exc:`betrace.service.tenancy.changes.TenantError`,
    :exc:`betrace.service.tenancy.directory.DirectoryError` and, before they change anything,
    :exc:`betrace.service.api.audit.AuditError`."""

    def __init__(
        self,
        gate: Gate,
        tenants: TenantChanges,
        stored: Callable[[], Iterable[str]],
        subscriptions: Subscriptions,
        threads: ThreadRunner,
        audit: AuditTrail,
    ) -> None:
        self._directory = gate.directory
        self._closed = gate.closed
        self._tenants = tenants
        self._stored = stored
        self._subscriptions = subscriptions
        self._threads = threads
        self._note = audit.note
        self._changing = trio.Lock()

    # Reading

    async def page(self, after: str, limit: int) -> tuple[list[Json], str | None]:
        """Tenants by name, after the name ``after``; and where the next page starts, None after the
        last."""

        def look() -> list[Json]:
            known = {each.name: _shown(each) for each in self._directory.page(after, limit + 1)}
            for name in self._stored():
                if name > after and name not in known and name not in self._closed:
                    known[name] = _implicit(name)
            return [known[name] for name in sorted(known)[: limit + 1]]

        found = await self._threads.run(look)
        page = found[:limit]
        return page, page[-1]["name"] if len(found) > limit else None

    async def get(self, name: str) -> Json | None:
        """A tenant; None if it does not exist."""

        def look() -> Json | None:
            known = self._directory.get(name)
            if known is not None:
                return _shown(known)
            there = name not in self._closed and name in self._stored()
            return _implicit(name) if there else None

        return await self._threads.run(look)

    async def exists(self, name: str) -> bool:
        """Whether the tenant is active or implicit."""
        found = await self.get(name)
        return found is not None and found["state"] != TenantState.DELETING

    # Changing

    async def create(
        self, who: Operator, name: str, quota: int | None, public_key: str | None
    ) -> Json:
        """Create a tenant, optionally with its first key (PEM). Also raises
        :exc:`betrace.service.tenancy.tokens.BadKeyError`."""
        public = None if public_key is None else read_public_key(public_key)
        async with self._changing:
            await self._note(who, "tenants.create", {"tenant": name, "quota": quota})
            return _shown(await self._tenants.change(name, create(quota, public)))

    async def set_quota(self, who: Operator, name: str, quota: int | None) -> Json:
        """Change how many spans per second a tenant may send; None means the configured quota."""
        async with self._changing:
            await self._note(who, "tenants.quota", {"tenant": name, "quota": quota})
            return _shown(await self._tenants.change(name, set_quota(quota)))

    async def add_key(
        self, who: Operator, name: str, public_key: str, grace_seconds: float
    ) -> Json:
        """Add a key (PEM). The tenant's other keys stay valid for ``grace_seconds``."""
        public = read_public_key(public_key)
        async with self._changing:
            await self._note(
                who, "tenants.add-key", {"tenant": name, "graceSeconds": grace_seconds}
            )
            return _shown(await self._tenants.change(name, add_key(public, grace_seconds)))

    async def revoke_key(self, who: Operator, name: str, kid: str) -> Json:
        """Remove a key; its tokens are invalid from now on."""
        async with self._changing:
            await self._note(who, "tenants.revoke-key", {"tenant": name, "kid": kid})
            changed = await self._tenants.change(name, revoke_key(kid))
            self._subscriptions.end(name)
        return _shown(changed)

    async def delete(self, who: Operator, name: str, wait_seconds: float) -> bool:
        """Delete a tenant with all its data; whether that was completed within
        ``wait_seconds``."""
        async with self._changing:
            if await self.get(name) is None:
                raise UnknownTenantError(f"there is no tenant {name}", "see `betrace tenants list`")
            await self._note(who, "tenants.delete", {"tenant": name})
            done = await self._tenants.delete(name)
            self._subscriptions.end(name)
        with trio.move_on_after(wait_seconds):
            await done.wait()
        return done.is_set()


def _shown(tenant: Tenant) -> Json:
    return {
        "name": tenant.name,
        "state": str(tenant.state),
        "createdAt": write_time(tenant.created_ns),
        "quota": tenant.quota,
        "keys": [
            {
                "kid": key.kid,
                "createdAt": write_time(key.created_ns),
                "expiresAt": None if key.expires_ns is None else write_time(key.expires_ns),
            }
            for key in tenant.keys
        ],
    }


def _implicit(name: str) -> Json:
    return {
        "name": name,
        "state": str(TenantState.IMPLICIT),
        "createdAt": None,
        "quota": None,
        "keys": [],
    }
