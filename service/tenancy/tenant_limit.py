"""Bounds the number of tenants while nobody has to prove who they are.

Without authentication a tenant is a name in a header, and each name costs a directory, files and a
place in every cache. Tenants that exist always go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from betrace.service.tenancy.authentication import Denied
from betrace.service.tenants import DEFAULT_TENANT

REFRESH_SECONDS = 10.0
"""A name that was let in but never stored anything makes room after this long."""


class TenantLimit:
    """Lets in ``most`` tenants, and those that operators created. ``stored`` returns the tenants
    that have something on disk. May be called from any thread; only a new name costs more than a
    lookup."""

    def __init__(
        self,
        most: int,
        stored: Callable[[], Iterable[str]],
        created: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._stored = stored
        self._created = {DEFAULT_TENANT, *created}
        self._clock = clock
        self._known: set[str] = set()
        self._refreshed: float | None = None
        self._lock = threading.Lock()  # guards changes

    def refusal(self, tenant: str) -> Denied | None:
        """Why ``tenant`` may not become one more tenant; None if it may, or is known."""
        if tenant in self._known or tenant in self._created:
            return None
        with self._lock:
            if self._refreshed is None or len(self._known) >= self._most:
                self._refresh()
            if tenant in self._known:
                return None
            if len(self._known) < self._most:
                self._known.add(tenant)
                return None
        return Denied(
            403,
            f"{tenant} would be a new tenant, and there are {self._most} already; "
            "raise ingest.max_tenants, delete some or create this one with `betrace tenants`, "
            "or turn on authentication",
        )

    def note(self, tenant: str) -> None:
        """Another process of the cluster let a tenant in."""
        with self._lock:
            self._known.add(tenant)

    def create(self, tenant: str) -> None:
        """An operator created a tenant."""
        with self._lock:
            self._created = {*self._created, tenant}

    def delete(self, tenant: str) -> None:
        """An operator deleted a tenant."""
        with self._lock:
            self._created = self._created - {tenant} | {DEFAULT_TENANT}
            self._known.discard(tenant)

    def _refresh(self) -> None:
        now = self._clock()
        if self._refreshed is not None and now - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = now
        self._known = set(self._stored())
