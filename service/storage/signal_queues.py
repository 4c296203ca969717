"""Queues of signals, from which exports and alerts read at their own pace.

A queue is durable and ordered, and never shrinks. A reader keeps the number of the last entry that
it has read. In one process each tenant's ledger is a queue; in a cluster each partition's ``OUT``
stream is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from betrace.channels import TransientError
from betrace.service.signals import Signal
from betrace.service.storage.ledger.base import LedgerEntries


class SignalsUnavailable(TransientError):  # noqa: N818
    """A queue cannot be read now."""


@dataclass(frozen=True, slots=True)
class QueuePage:
    """Signals of a queue with their numbers, in order, and how far the queue was read: up to the
    number ``upto``, behind which there may be ``more``."""

    signals: list[tuple[int, Signal]]
    upto: int
    more: bool


class SignalQueues(Protocol):
    """The queues by name. Methods block, except :meth:`of`. They raise
    :exc:`~betrace.service.storage.ledger.base.LedgerError` and :exc:`SignalsUnavailable`."""

    def names(self) -> list[str]:
        """The queues that have, or may have, signals."""

    def of(self, signals: Iterable[Signal]) -> set[str]:
        """The queues that these signals are in."""

    def end(self, name: str) -> int:
        """The number of a queue's last entry, 0 without any."""

    def may_read(self, name: str, done: Mapping[str, int]) -> bool:
        """Whether a queue may be read by someone who has read others up to the numbers ``done``:
        not before the queue that it continues was read to its end."""

    def read(self, name: str, after: int, limit: int) -> QueuePage:
        """The signals numbered above ``after``: about ``limit``."""


class LedgerQueues:
    """The ledgers of the tenants, by tenant."""

    def __init__(self, entries: LedgerEntries) -> None:
        self._entries = entries

    def names(self) -> list[str]:
        """The tenants that ever had a signal."""
        return self._entries.tenants()

    def of(self, signals: Iterable[Signal]) -> set[str]:
        """The tenants of these signals."""
        return {signal.tenant for signal in signals}

    def end(self, name: str) -> int:
        """The number of the tenant's newest signal."""
        return self._entries.last_entry(name)

    def may_read(self, name: str, done: Mapping[str, int]) -> bool:
        """Always: no queue continues another."""
        return True

    def read(self, name: str, after: int, limit: int) -> QueuePage:
        """A page of the tenant's signals."""
        found = self._entries.entries(name, after, limit)
        return QueuePage(found, found[-1][0] if found else after, len(found) == limit)
