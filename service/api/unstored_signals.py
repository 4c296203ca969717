"""Signals that DuckDB may not have yet.

Alerts, exports and streams follow the ledger, and DuckDB is written a moment later, or much later
if commits are scarce. Whoever follows an alert at once must still find its signal.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from cachetools import FIFOCache

from betrace.service.signals import Kind, Signal, raised_id

MOST = 10_000
"""Signals that are remembered, the newest."""


class UnstoredSignals:
    """The newest signals of all tenants, by id. Methods may be called from any thread."""

    def __init__(self, most: int = MOST) -> None:
        self._lock = threading.Lock()
        self._signals: FIFOCache[tuple[str, str], Signal] = FIFOCache(most)
        self._retracted: FIFOCache[tuple[str, str], None] = FIFOCache(most)

    def add(self, signals: Iterable[Signal]) -> None:
        """Remember signals that are new in the ledger."""
        with self._lock:
            for signal in signals:
                self._signals[signal.tenant, signal.id] = signal
                if signal.kind is Kind.RETRACTED:
                    self._retracted[signal.tenant, signal.id] = None
                    self._retracted[signal.tenant, raised_id(signal)] = None

    def find(self, tenant: str, signal_id: str) -> tuple[Signal, bool] | None:
        """A signal, and whether it is active; None if it is not remembered."""
        key = tenant, signal_id
        with self._lock:
            found = self._signals.get(key)
            return None if found is None else (found, key not in self._retracted)

    def of_trace(self, tenant: str, trace_id: str) -> list[Signal]:
        """The signals of a trace, oldest first. Looks at all signals."""
        with self._lock:
            found = list(self._signals.items())
        return [each for (of, _), each in found if of == tenant and each.trace_id == trace_id]

    def forget(self, tenant: str) -> None:
        """Forget the signals of a deleted tenant."""
        with self._lock:
            for known in (self._signals, self._retracted):
                for key in [each for each in known if each[0] == tenant]:
                    del known[key]
