"""The rules of all tenants as the bucket has them, and which tenants were deleted, for the owners
of partitions.

One watch serves all partitions of an evaluator. An owner appends a marker for each tenant whose
revision its partition does not have yet. A deletion is a marker under a name of its own
(:data:`betrace.service.cluster.tenant_entries.GONE`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from betrace.service.cluster.rule_keys import PUBLISHED, RULES_PREFIX
from betrace.service.cluster.tenant_entries import (
    GONE,
    INGESTION_KEY,
    TENANTS_PREFIX,
    TenantEntryError,
    unpack_tenant,
)
from betrace.service.storage.jetstream.bucket import ConfigBucket, Entry

_log = logging.getLogger("service.cluster.owner")


@dataclass(frozen=True, slots=True)
class TenantRules:
    """The rules of a tenant; without ``definitions`` they were removed, or the tenant was."""

    tenant: str
    revision: int
    definitions: bytes


class RuleFeed:
    """Follows the rules in the bucket."""

    def __init__(self, bucket: ConfigBucket) -> None:
        self._bucket = bucket
        self._latest: dict[str, TenantRules] = {}
        self.changed = trio.Event()
        """Set, and replaced by a new one, when rules change."""

    async def run(self) -> None:
        """Watch until cancelled."""
        async for entry in self._bucket.watch():
            self.note(entry)

    def note(self, entry: Entry) -> None:
        """Take an entry of the bucket into account."""
        if entry.key.startswith(RULES_PREFIX):
            self._set(entry.key.removeprefix(RULES_PREFIX), entry.revision, entry.value or b"")
        elif entry.key.startswith(TENANTS_PREFIX) and entry.key != INGESTION_KEY:
            try:
                tenant = unpack_tenant(entry)
            except TenantEntryError as error:
                _log.error("%s", error)
            else:
                if tenant.generation:
                    self._set(GONE + tenant.name, tenant.generation, b"")

    def _set(self, tenant: str, revision: int, definitions: bytes) -> None:
        known = self._latest.get(tenant)
        if known is None or known.revision < revision:
            self._latest[tenant] = TenantRules(tenant, revision, definitions)
            self.changed.set()
            self.changed = trio.Event()

    @property
    def published(self) -> bool:
        """Whether a query node has published all of its rules once."""
        return PUBLISHED in self._latest

    def newer_than(self, revisions: dict[str, int]) -> list[TenantRules]:
        """The rules with a higher revision than a partition has. The last one says that all are
        published, if the partition does not know it yet."""
        found = [
            rules
            for tenant, rules in self._latest.items()
            if rules.revision > revisions.get(tenant, 0)
        ]
        return sorted(found, key=lambda rules: rules.tenant == PUBLISHED)
