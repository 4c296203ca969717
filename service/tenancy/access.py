"""Who a caller is. Without authentication anyone is who they say; with it, see the implementation
that the service passes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from betrace.service.tenants import DEFAULT_TENANT, TENANT_RULE, is_tenant_name


@dataclass(frozen=True, slots=True)
class Denied:
    """Why a caller is not let in: 400, 401 or 403, and what to do."""

    status: int
    message: str


class Authenticator(Protocol):
    """Checks Authorization headers."""

    def remembered(self, authorization: str) -> str | None:
        """The tenant of a header that :meth:`tenant` accepted before; never waits."""

    async def tenant(self, authorization: str | None) -> str | Denied:
        """The tenant that the header proves."""

    async def caller(self, authorization: str | None, scope: str | None) -> str | Denied:
        """The same; or for an operator the tenant that ``scope`` names."""

    async def operator(self, authorization: str | None) -> Denied | None:
        """None where the header proves an operator."""

    async def scraper(self, authorization: str | None) -> Denied | None:
        """None where the header proves someone who may read metrics."""


def claimed_tenant(header: str | None) -> str | Denied:
    """The tenant that the header X-Scope-OrgID names, for use without authentication."""
    if header is None:
        return DEFAULT_TENANT
    if is_tenant_name(header):
        return header
    return Denied(400, f"X-Scope-OrgID {header[:80]!r} names no tenant: {TENANT_RULE}")


def closed_tenant(tenant: str) -> Denied:
    """What to tell a tenant that is deleted."""
    return Denied(
        403, f"the tenant {tenant} is deleted; an operator may create it again: betrace tenants"
    )
