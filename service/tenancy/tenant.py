"""A tenant: its state, its quota and its public keys."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TenantState(StrEnum):
    """The state of a tenant."""

    ACTIVE = "active"
    DELETING = "deleting"
    DELETED = "deleted"
    IMPLICIT = "implicit"
    """It has sent spans while authentication was off, but was never created. The directory does not
    have such tenants."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key of a tenant: 32 bytes. Its tokens are valid until ``expires_ns`` (nanoseconds since
    1970), without end if that is None."""

    kid: str
    public: bytes
    created_ns: int
    expires_ns: int | None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant. ``quota`` is in spans per second: 0 means no limit, None the quota from the
    configuration.

    On a cluster, ``revision`` is the revision of the tenant's entry in the configuration bucket, or
    0 before there is one, and ``generation`` is the revision of its last deletion, or 0 if it was
    never deleted. In one process, both are always 0."""

    name: str
    state: TenantState
    created_ns: int
    quota: int | None
    keys: tuple[PublicKey, ...] = ()
    generation: int = 0
    revision: int = 0
