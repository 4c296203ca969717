"""What was stored of signals: in the ledger, or in the files that wait for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

import orjson

from betrace.service.signals import Signal
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.ledger.base import Ledger, LedgerError
from betrace.service.storage.ledger.clients import ClientCounts

_log = logging.getLogger("service.record")

PAGE = 1000
_CLOCK_NS = 60 * 1_000_000_000  # the wall clock may have been set back by this much


class Entries(Protocol):
    """A ledger whose signals can be read again. Methods block and raise :exc:`LedgerError`."""

    def tenants(self) -> list[str]:
        """The tenants that ever had a signal."""

    def count(self, tenant: str) -> int:
        """How many signals the tenant has."""

    def last_entry(self, tenant: str) -> int:
        """The number of the tenant's newest signal, 0 without any."""

    def entries(self, tenant: str, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """The tenant's signals beyond a number, in order, each with its own."""

    def held(self, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """Signals of all tenants, beyond a number, of which the ledger does not know yet whether
        it has them; it finds out by itself."""


class SignalLedger(Ledger, Entries, Protocol):
    """The ledger of a service."""

    @property
    def kind(self) -> str:
        """As the settings name it."""

    @property
    def problem(self) -> str | None:
        """What keeps it from working until somebody puts it right."""

    @property
    def clients(self) -> ClientCounts:
        """What became of its clients."""


class Record:
    """Signals that are safe, wherever they are. Methods block."""

    def __init__(self, ledger: Entries, files: FallbackFiles) -> None:
        self._ledger = ledger
        self._files = files
        self._last: dict[str, int] = {}

    def last_entries(self) -> dict[str, int]:
        """The ledger's last entry by tenant; what it was before where the ledger does not answer,
        which makes :meth:`since` read more than it must."""
        try:
            self._last = {each: self._ledger.last_entry(each) for each in self._ledger.tenants()}
        except LedgerError as error:
            _log.warning("the ledger cannot be read: %s", error)
        return dict(self._last)

    def since(self, recorded: dict[str, int], taken_ns: int) -> Iterator[list[Signal]]:
        """Pages of the signals that were stored after ``recorded``, and after ``taken_ns`` (nearly:
        some from before are among them). Raises :exc:`LedgerError` and :exc:`OSError`."""
        since = taken_ns - _CLOCK_NS
        # The files come first: what is written back from them meanwhile is met in the ledger.
        for lines in self._files.pages(PAGE):
            yield [s for s in map(_signal, lines) if s is not None and s.detected_at >= since]
        after = 0
        while held := self._ledger.held(after, PAGE):
            after = held[-1][0]
            yield [signal for _, signal in held]
        for tenant in self._ledger.tenants():
            after = recorded.get(tenant, 0)
            while page := self._ledger.entries(tenant, after, PAGE):
                after = page[-1][0]
                yield [signal for _, signal in page if signal.detected_at >= since]


def _signal(line: bytes) -> Signal | None:
    try:
        return Signal.from_json(orjson.loads(line))
    except (LookupError, TypeError, ValueError):  # it is set aside when it is written back
        return None
