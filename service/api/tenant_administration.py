"""What operators do with tenants; each action is written to the audit log first."""

from __future__ import annotations

from typing import Any

import trio

from betrace.channels import ThreadRunner
from betrace.service.api.audit import AuditTrail, Operator
from betrace.service.api.subscriptions import Subscriptions
from betrace.service.pipeline.recovery.removal import Removal
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.tenancy.directory import Tenant, TenantState, UnknownTenantError
from betrace.service.tenancy.gate import Gate
from betrace.service.tenancy.tokens import read_public_key
from betrace.service.times import write_time

Json = dict[str, Any]
IMPLICIT = "implicit"
"""The state of a tenant that has sent spans although it was never created."""


class TenantAdministration:
    """Reads and changes tenants; as JSON a tenant is ``name``, ``state``, ``createdAt``, ``quota``
    and ``keys``. Methods are called on the Trio thread. They raise
    :exc:`betrace.service.tenancy.directory.TenantError`,
    :exc:`betrace.service.tenancy.directory.DirectoryError` and, before they change anything,
    :exc:`betrace.service.api.audit.AuditError`."""

    def __init__(
        self,
        gate: Gate,
        removal: Removal,
        log: SpanLog,
        subscriptions: Subscriptions,
        threads: ThreadRunner,
        audit: AuditTrail,
    ) -> None:
        self._gate = gate
        self._directory = gate.directory
        self._closed = gate.closed
        self._quotas = gate.quotas
        self._removal = removal
        self._log = log
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
            for name in self._log.tenants():
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
            there = name not in self._closed and name in self._log.tenants()
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
            made = await self._threads.run(self._directory.create, name, quota, public)
            self._quotas.set(name, quota)
            await self._removal.reopen(name)
            if self._gate.tenant_limit is not None:
                self._gate.tenant_limit.create(name)
            self._gate.keys_changed(name)
        return _shown(made)

    async def set_quota(self, who: Operator, name: str, quota: int | None) -> Json:
        """Change how many spans per second a tenant may send; None means the configured quota."""
        async with self._changing:
            await self._note(who, "tenants.quota", {"tenant": name, "quota": quota})
            changed = await self._threads.run(self._directory.set_quota, name, quota)
            self._quotas.set(name, quota)
        return _shown(changed)

    async def add_key(
        self, who: Operator, name: str, public_key: str, grace_seconds: float
    ) -> Json:
        """Add a key (PEM). The tenant's other keys stay valid for ``grace_seconds``."""
        public = read_public_key(public_key)
        async with self._changing:
            await self._note(
                who, "tenants.add-key", {"tenant": name, "graceSeconds": grace_seconds}
            )
            changed = await self._threads.run(self._directory.add_key, name, public, grace_seconds)
            self._gate.keys_changed(name)
        return _shown(changed)

    async def revoke_key(self, who: Operator, name: str, kid: str) -> Json:
        """Remove a key; its tokens are invalid from now on."""
        async with self._changing:
            await self._note(who, "tenants.revoke-key", {"tenant": name, "kid": kid})
            changed = await self._threads.run(self._directory.revoke_key, name, kid)
            self._gate.keys_changed(name)
            self._subscriptions.end(name)
        return _shown(changed)

    async def delete(self, who: Operator, name: str, wait_seconds: float) -> bool:
        """Delete a tenant with all its data; whether that was completed within
        ``wait_seconds``."""
        async with self._changing:
            if await self.get(name) is None:
                raise UnknownTenantError(f"there is no tenant {name}", "see `betrace tenants list`")
            await self._note(who, "tenants.delete", {"tenant": name})
            done = await self._removal.begin(name)
            self._quotas.set(name, None)
            if self._gate.tenant_limit is not None:
                self._gate.tenant_limit.delete(name)
            self._gate.keys_changed(name)
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
    return {"name": name, "state": IMPLICIT, "createdAt": None, "quota": None, "keys": []}
