"""A cache of what the query store has of recently viewed traces.

A user who comes from a signal opens its trace, then the next one, and comes back. Each view costs
the store several queries; this cache keeps their results: the trace's row of the index, its log
positions and its signals. A write of the store removes the traces it concerns before it returns,
so a view that starts later sees it. Late spans are folded into the arrays of closed traces or into
traces from the index, never into entries of this cache (docs/decisions/0015): no verdict of the
pipeline depends on it.

Nothing is done for tenants whose traces nobody views, so closing thousands of traces costs one
dictionary lookup. For the others, traces with new signals are loaded ahead.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio
from cachetools import LRUCache

from betrace.channels import ThreadRunner
from betrace.service.caches import LoadingCache
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.queries import SignalFilter, StoredSignal, TraceRow
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore, StoreChange

MAX_SIGNALS = 1000
"""Most signals kept of a trace, the newest."""

AHEAD_SECONDS = 0.25
AHEAD_TRACES = 10  # most loaded ahead at once
_AHEAD_WAITING = 256  # older ones are skipped
_LISTED_AHEAD = 5
_MOST_EXPECTED = 4096
_MOST_TENANTS = 4096  # most tenants remembered; beyond it everything is forgotten

_ROW_BYTES, _POSITION_BYTES, _SIGNAL_BYTES = 1024, 40, 2048


@dataclass(frozen=True, slots=True)
class TraceMetadata:
    """A trace in the store: its row with all positions, and its signals, newest first."""

    row: TraceRow
    signals: tuple[StoredSignal, ...]


def weight(found: TraceMetadata) -> int:
    """Approximate size in bytes."""
    evidence = sum(len(str(stored.signal.context)) for stored in found.signals)
    return (
        _ROW_BYTES
        + _POSITION_BYTES * len(found.row.positions)
        + _SIGNAL_BYTES * len(found.signals)
        + evidence
    )


class TraceMetadataCache:
    """The cache, and what keeps it correct and filled. All methods except :meth:`run` may be called
    from any thread; :meth:`find`, :meth:`load_ahead` and :meth:`warm_up` block."""

    def __init__(
        self,
        store: DuckStore,
        *,
        maxsize: int,
        ttl_seconds: float,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ttl = ttl_seconds
        self.cache: LoadingCache[tuple[str, str], TraceMetadata] = LoadingCache(
            "traceMetadata",
            self._load,
            maxsize=maxsize,
            ttl_seconds=ttl_seconds,
            max_bytes=max_bytes,
            weigher=weight,
            clock=clock,
        )
        # Has every tenant with a key in the cache or being loaded, with the time of its last load.
        self._kept: dict[str, float] = {}
        self._viewed: dict[str, float] = {}
        # Traces to load when they reach the index: viewed ones, and those with early signals.
        self._expected: LRUCache[tuple[str, str], bool] = LRUCache(_MOST_EXPECTED)
        self._lock = threading.Lock()  # guards changes to these
        self._ahead: deque[tuple[str, str]] = deque(maxlen=_AHEAD_WAITING)
        store.on_change = self.changed

    def find(self, tenant: str, trace_id: str) -> TraceMetadata | None:
        """What the store has of a trace; None if it is not in the index. Raises the errors of the
        store."""
        self._view(tenant)
        found = self.cache.get((tenant, trace_id.lower()))
        if found is None:
            self.expect(tenant, trace_id)
        return found

    def expect(self, tenant: str, trace_id: str) -> None:
        """Load a trace when it reaches the index, because somebody views it now."""
        self._view(tenant)
        with self._lock:
            self._expected[tenant, trace_id.lower()] = True

    def listed(self, tenant: str, signals: Sequence[StoredSignal]) -> None:
        """Somebody views a list of a tenant's signals: load the traces of the first ones ahead."""
        self._view(tenant)
        first = dict.fromkeys(stored.signal.trace_id for stored in signals[:_LISTED_AHEAD])
        self._ahead.extend((tenant, trace_id) for trace_id in reversed(first))

    def _view(self, tenant: str) -> None:
        with self._lock:
            if len(self._viewed) >= _MOST_TENANTS:
                self._viewed.clear()
            self._viewed[tenant] = self._clock()

    def changed(self, tenant: str, change: StoreChange | None) -> None:
        """The store has written something of a tenant; None: anything may have changed."""
        self._drop(tenant, change)
        if change is not None and self._is_viewed(tenant):
            self._note(tenant, change)

    def _note(self, tenant: str, change: StoreChange) -> None:
        """Load traces with signals ahead, now or when they are closed."""
        closed = change.traces_closed()
        with self._lock:
            for trace_id in dict.fromkeys(signal.trace_id for signal in change.signals):
                self._expected[tenant, trace_id] = True
            for trace_id in closed:
                if self._expected.pop((tenant, trace_id), False):
                    self._ahead.append((tenant, trace_id))

    def _drop(self, tenant: str, change: StoreChange | None) -> None:
        loaded = self._kept.get(tenant)
        if loaded is None:
            return
        if change is None or self._clock() - loaded > 2 * self._ttl:
            with self._lock:
                self._kept.pop(tenant, None)
            self.cache.invalidate_where(lambda key: key[0] == tenant)
            return
        self.cache.invalidate_all({(tenant, trace_id) for trace_id in change.trace_ids()})

    def _is_viewed(self, tenant: str) -> bool:
        seen = self._viewed.get(tenant)
        if seen is not None and self._clock() - seen > self._ttl:
            with self._lock:
                self._viewed.pop(tenant, None)
            return False
        return seen is not None

    def load_ahead(self) -> int:
        """Load some of the traces stored last; returns their number."""
        for number in range(AHEAD_TRACES):
            try:
                key = self._ahead.pop()
            except IndexError:
                return number
            try:
                self.cache.load_ahead(key)
            except (StoreError, PoolTimeout):
                return number
        return AHEAD_TRACES

    def warm_up(self, tenant: str, signals: int) -> int:
        """Load the traces of a tenant's newest signals; returns their number. Loads none if the
        tenant's file was closed because it was idle. Raises the errors of the store."""
        if tenant not in self._store.connections():
            return 0
        newest, _ = self._store.signals(tenant, limit=signals)
        traces = dict.fromkeys(stored.signal.trace_id for stored in newest)
        return sum(self.cache.load_ahead((tenant, each)) is not None for each in traces)

    async def run(self, threads: ThreadRunner) -> None:
        """Load traces ahead, for ever."""
        while True:
            await trio.sleep(AHEAD_SECONDS)
            if self._ahead:
                await threads.run(self.load_ahead, abandon_on_cancel=True)

    def _load(self, key: tuple[str, str]) -> TraceMetadata | None:
        tenant, trace_id = key
        # Set before reading, so that a write not seen by this load drops the key.
        with self._lock:
            full = tenant not in self._kept and len(self._kept) >= _MOST_TENANTS
            if full:
                self._kept.clear()
            self._kept[tenant] = self._clock()
        if full:
            self.cache.invalidate_where()  # this load is not kept either
        row = self._store.trace(tenant, trace_id)
        if row is None:
            return None
        signals, _ = self._store.signals(tenant, SignalFilter(trace_id=trace_id), limit=MAX_SIGNALS)
        return TraceMetadata(row, tuple(signals))
