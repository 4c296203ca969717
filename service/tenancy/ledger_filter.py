"""The ledger without the entries of tenants from before they were deleted.

The ledger is append-only, so a deletion removes nothing from it. But what is read from it to repair
losses elsewhere must not bring a deleted tenant back.
"""

from __future__ import annotations

from collections.abc import Mapping

from betrace.service.signals import Signal
from betrace.service.storage.ledger.base import PAGE, LedgerEntries
from betrace.service.tenancy.directory import Hidden

_NOTHING = Hidden(0, 0)


class CurrentEntries:
    """The :class:`betrace.service.storage.ledger.base.LedgerEntries` recorded since each tenant was
    last deleted. ``hidden`` says what to leave out, and may change."""

    def __init__(self, ledger: LedgerEntries, hidden: Mapping[str, Hidden]) -> None:
        self._ledger = ledger
        self._hidden = hidden

    def tenants(self) -> list[str]:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        return [each for each in self._ledger.tenants() if self._has_entries(each)]

    def _has_entries(self, tenant: str) -> bool:
        hidden = self._hidden.get(tenant)
        return hidden is None or self._ledger.last_entry(tenant) > hidden.entry

    def count(self, tenant: str) -> int:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        return self._ledger.count(tenant) - self._hidden.get(tenant, _NOTHING).count

    def last_entry(self, tenant: str) -> int:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        return self._ledger.last_entry(tenant)

    def entries(self, tenant: str, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        hidden = self._hidden.get(tenant, _NOTHING)
        return self._ledger.entries(tenant, max(after, hidden.entry), limit)

    def outgoing(self, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        while page := self._ledger.outgoing(after, limit):
            current = [each for each in page if self._has_entries(each[1].tenant)]
            if current:
                return current
            after = page[-1][0]
        return []
