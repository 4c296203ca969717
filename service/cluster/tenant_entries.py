"""Tenants in the configuration bucket: the keys of their entries, and what is in them.

An entry has what every node needs to know: the state, the quota, and public keys. Private keys are
never here. The entry of a deleted tenant stays, so that no node can bring the tenant back by
publishing what it knew before.

The *generation* of a tenant is the revision of its last deletion. It is part of the tenant's name
in the logs (:func:`betrace.service.tenants.log_name`), so what was sent before a deletion never
belongs to a tenant that is created again.
"""

from __future__ import annotations

import base64
from typing import Any

import orjson

from betrace.service.storage.jetstream.bucket import Entry
from betrace.service.tenancy.tenant import PublicKey, Tenant, TenantState
from betrace.service.tenancy.tokens import KEY_BYTES, key_id
from betrace.service.tenants import is_tenant_name

TENANTS_PREFIX = "tenants."

INGESTION_KEY = TENANTS_PREFIX + "=ingestion"
"""Its entry says whether ingestion is paused; no tenant can have this name. Edges watch it together
with the tenants."""

GONE = "=deleted."
"""A marker in the log of a partition has this before the name of a deleted tenant, in place of the
tenant of its rules, and the generation in place of their revision."""


class TenantEntryError(ValueError):
    """The entry was written by another version of the program, or is damaged."""


def tenant_key(tenant: str) -> str:
    """The key of a tenant's entry."""
    return TENANTS_PREFIX + tenant


def pack_tenant(tenant: Tenant) -> bytes:
    """The value of a tenant's entry."""
    gone = tenant.state in (TenantState.DELETING, TenantState.DELETED)
    if gone:  # how far each node is with the deletion is not in the bucket
        return orjson.dumps({"state": TenantState.DELETED, "createdNs": tenant.created_ns})
    return orjson.dumps(
        {
            "state": tenant.state,
            "createdNs": tenant.created_ns,
            "generation": tenant.generation,
            "quota": tenant.quota,
            "keys": [
                {
                    "public": base64.b64encode(key.public).decode(),
                    "createdNs": key.created_ns,
                    "expiresNs": key.expires_ns,
                }
                for key in tenant.keys
            ],
        }
    )


def unpack_tenant(entry: Entry) -> Tenant:
    """The tenant of an entry, at its revision. Raises :exc:`TenantEntryError`."""
    name = entry.key.removeprefix(TENANTS_PREFIX)
    try:
        if not is_tenant_name(name):
            raise ValueError("the key has no name of a tenant")
        found = orjson.loads(entry.value or b"")
        state, created_ns = TenantState(found["state"]), int(found["createdNs"])
        if state is TenantState.DELETED:
            return Tenant(name, state, created_ns, None, (), entry.revision, entry.revision)
        quota = None if found["quota"] is None else int(found["quota"])
        keys = tuple(map(_key, found["keys"]))
        generation = int(found["generation"])
        return Tenant(name, state, created_ns, quota, keys, generation, entry.revision)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TenantEntryError(f"the entry {entry.key} cannot be read: {error}") from error


def _key(found: dict[str, Any]) -> PublicKey:
    public = base64.b64decode(found["public"], validate=True)
    if len(public) != KEY_BYTES:
        raise ValueError(f"a public key has {len(public)} bytes")
    expires_ns = None if found["expiresNs"] is None else int(found["expiresNs"])
    return PublicKey(key_id(public), public, int(found["createdNs"]), expires_ns)


def pack_ingestion(paused: bool) -> bytes:
    """The value of :data:`INGESTION_KEY`."""
    return orjson.dumps({"paused": paused})


def unpack_ingestion(entry: Entry) -> bool:
    """Whether ingestion is paused. Raises :exc:`TenantEntryError`."""
    try:
        return bool(orjson.loads(entry.value or b"{}").get("paused", False))
    except (ValueError, AttributeError) as error:
        raise TenantEntryError(f"the entry {entry.key} cannot be read: {error}") from error
