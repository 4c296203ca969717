"""The keys of rules in the configuration bucket.

Query nodes write them, and the owners of partitions append a marker to the partition's log for each
entry. A marker has the key without the prefix in place of the tenant.
"""

from __future__ import annotations

from betrace.service.rules.store import ALL_TENANTS

RULES_PREFIX = "rules."

SHARED = "=all"
"""Stands for the rules of all tenants; no tenant can have this name."""

PUBLISHED = "=published"
"""Its entry says that a query node has published all of its rules; no tenant can have this name.
Its first marker in a log is the end of the rules that the log begins with."""


def rules_key(tenant: str) -> str:
    """The key of a tenant's rules, or of those for all tenants."""
    return RULES_PREFIX + (SHARED if tenant == ALL_TENANTS else tenant)
