"""All signals that are stored durably: in the ledger, or in the files that wait for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import orjson

from betrace.service.signals import Signal
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.ledger.base import PAGE, LedgerEntries, LedgerError

_log = logging.getLogger("service.record")

_CLOCK_NS = 60 * 1_000_000_000  # the wall clock may have been set back by this much


class Record:
    """Signals that are durable, wherever they are. Methods block."""

    def __init__(self, ledger: LedgerEntries, files: FallbackFiles) -> None:
        self._ledger = ledger
        self._files = files
        self._last: dict[str, int] = {}

    def last_entries(self) -> dict[str, int]:
        """The number of the last ledger entry by tenant. If the ledger does not answer, the numbers
        found before, with which :meth:`since` reads more than necessary."""
        try:
            self._last = {each: self._ledger.last_entry(each) for each in self._ledger.tenants()}
        except LedgerError as error:
            _log.warning("the ledger cannot be read: %s", error)
        return dict(self._last)

    def since(self, recorded: dict[str, int], taken_ns: int) -> Iterator[list[Signal]]:
        """Pages of the signals that were stored after the entries in ``recorded`` and after
        ``taken_ns``; a few may be older. Raises :exc:`LedgerError` and :exc:`OSError`."""
        since = taken_ns - _CLOCK_NS
        # Files first: what is written back from them meanwhile is then found in the ledger.
        for lines in self._files.pages(PAGE):
            yield [s for s in map(_signal, lines) if s is not None and s.detected_at >= since]
        after = 0
        while outgoing := self._ledger.outgoing(after, PAGE):
            after = outgoing[-1][0]
            yield [signal for _, signal in outgoing]
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
