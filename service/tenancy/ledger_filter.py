"""The ledger without what it has of tenants from before they were deleted.

The ledger is append-only, so nothing is taken out of it; but what is read from it to make up for
losses elsewhere must not bring a deleted tenant back.
"""

from __future__ import annotations

from collections.abc import Mapping

from betrace.service.signals import Signal
from betrace.service.storage.ledger.record import PAGE, Entries
from betrace.service.tenancy.directory import Hidden

_NOTHING = Hidden(0, 0)


class LivingEntries:
    """Implements :class:`betrace.service.storage.ledger.record.Entries` over another; ``hidden``
    may change."""

    def __init__(self, ledger: Entries, hidden: Mapping[str, Hidden]) -> None:
        self._ledger = ledger
        self._hidden = hidden

    def tenants(self) -> list[str]:
        """See :class:`betrace.service.storage.ledger.record.Entries`."""
        return [each for each in self._ledger.tenants() if self._lives(each)]

    def _lives(self, tenant: str) -> bool:
        hidden = self._hidden.get(tenant)
        return hidden is None or self._ledger.last_entry(tenant) > hidden.entry

    def count(self, tenant: str) -> int:
        """See :class:`betrace.service.storage.ledger.record.Entries`."""
        return self._ledger.count(tenant) - self._hidden.get(tenant, _NOTHING).count

    def last_entry(self, tenant: str) -> int:
        """See :class:`betrace.service.storage.ledger.record.Entries`."""
        return self._ledger.last_entry(tenant)

    def entries(self, tenant: str, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """See :class:`betrace.service.storage.ledger.record.Entries`."""
        hidden = self._hidden.get(tenant, _NOTHING)
        return self._ledger.entries(tenant, max(after, hidden.entry), limit)

    def held(self, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """See :class:`betrace.service.storage.ledger.record.Entries`."""
        while page := self._ledger.held(after, limit):
            living = [each for each in page if self._lives(each[1].tenant)]
            if living:
                return living
            after = page[-1][0]
        return []
