"""Changes of tenants in one process: in its directory, and at once."""

from __future__ import annotations

import trio

from betrace.channels import ThreadRunner
from betrace.service.pipeline.recovery.removal import Removal
from betrace.service.tenancy.changes import Change
from betrace.service.tenancy.gate import Gate
from betrace.service.tenancy.tenant import Tenant, TenantState


class LocalTenants:
    """Implements :class:`betrace.service.tenancy.changes.TenantChanges`. Call it on the Trio
    thread, one change at a time."""

    def __init__(self, gate: Gate, removal: Removal, threads: ThreadRunner) -> None:
        self._gate = gate
        self._removal = removal
        self._threads = threads

    async def change(self, name: str, change: Change) -> Tenant:
        """Change a tenant in the directory."""
        made = await self._threads.run(self._gate.directory.change, name, change)
        if name in self._gate.closed:
            await self._removal.reopen(name)
        self._gate.follow(made)
        return made

    async def delete(self, name: str) -> trio.Event:
        """Close a tenant and begin its deletion."""
        done = await self._removal.begin(name)
        self._gate.follow(Tenant(name, TenantState.DELETING, 0, None))
        return done
