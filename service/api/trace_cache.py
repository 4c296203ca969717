"""What the query store says of recent traces, cached for those who look at them.

A user who comes from a signal opens its trace, then that of the next, and comes back. Each look
costs the store several queries; this cache keeps their answer: the trace's row of the index, its
log positions and its signals. Whatever the store writes of a trace drops it from here before the
write returns, so that a look that begins later sees it. What late spans are folded into comes from
the arrays of closed traces or from the index, never from here (docs/decisions/0015): no verdict of
the pipeline depends on this cache.

Nothing is done for tenants whose traces nobody looks at, so that closing traces by the thousand
costs one look into a dictionary. Of the others, traces with new signals are loaded ahead.
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
"""Of a trace, the newest."""

AHEAD_SECONDS = 0.25
AHEAD_TRACES = 10  # loaded ahead at once, at most
_AHEAD_WAITING = 256  # older ones are left out
_LISTED_AHEAD = 5
_MOST_EXPECTED = 4096
_MOST_TENANTS = 4096  # of whom something is kept; beyond it everything is forgotten

_ROW_BYTES, _POSITION_BYTES, _SIGNAL_BYTES = 1024, 40, 2048


@dataclass(frozen=True, slots=True)
class TraceMetadata:
    """A trace as the store has it: its row with all positions, its signals, newest first."""

    row: TraceRow
    signals: tuple[StoredSignal, ...]


def weight(found: TraceMetadata) -> int:
    """About the bytes of it."""
    evidence = sum(len(str(stored.signal.context)) for stored in found.signals)
    return (
        _ROW_BYTES
        + _POSITION_BYTES * len(found.row.positions)
        + _SIGNAL_BYTES * len(found.signals)
        + evidence
    )


class TraceMetadataCache:
    """The cache, and what keeps it true and filled. All methods but :meth:`run` may be called from
    any thread; :meth:`find` and :meth:`load_ahead` block."""

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
        # A tenant is in here, with the time of its last load, whenever a key of it is in the
        # cache or being loaded.
        self._kept: dict[str, float] = {}
        self._viewed: dict[str, float] = {}
        # Traces with signals that will be in the index later, or are looked at: early signals.
        self._expected: LRUCache[tuple[str, str], bool] = LRUCache(_MOST_EXPECTED)
        self._lock = threading.Lock()  # of changes to these
        self._ahead: deque[tuple[str, str]] = deque(maxlen=_AHEAD_WAITING)
        store.on_change = self.changed

    def find(self, tenant: str, trace_id: str) -> TraceMetadata | None:
        """What the store has of a trace, None where its index does not have it. Raises what the
        store does."""
        self._view(tenant)
        found = self.cache.get((tenant, trace_id.lower()))
        if found is None:
            self.expect(tenant, trace_id)
        return found

    def expect(self, tenant: str, trace_id: str) -> None:
        """Somebody looks at a trace that is not in the index yet: load it when it comes."""
        self._view(tenant)
        with self._lock:
            self._expected[tenant, trace_id.lower()] = True

    def listed(self, tenant: str, signals: Sequence[StoredSignal]) -> None:
        """Somebody looks at a list of a tenant's signals: the first ones' traces may be next."""
        self._view(tenant)
        first = dict.fromkeys(stored.signal.trace_id for stored in signals[:_LISTED_AHEAD])
        self._ahead.extend((tenant, trace_id) for trace_id in reversed(first))

    def _view(self, tenant: str) -> None:
        with self._lock:
            if len(self._viewed) >= _MOST_TENANTS:
                self._viewed.clear()
            self._viewed[tenant] = self._clock()

    def changed(self, tenant: str, change: StoreChange | None) -> None:
        """The store has written something of a tenant."""
        self._drop(tenant, change)
        if change is not None and self._is_viewed(tenant):
            self._note(tenant, change)

    def _note(self, tenant: str, change: StoreChange) -> None:
        """Have traces loaded that have signals, now or when they are closed."""
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
        """Load traces that were stored last, some at most; how many."""
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
        """Load the traces of a tenant's newest signals; how many. Of a tenant whose file is closed,
        since it was not used for long, none. Raises what the store does."""
        if tenant not in self._store.connections():
            return 0
        newest, _ = self._store.signals(tenant, limit=signals)
        traces = dict.fromkeys(stored.signal.trace_id for stored in newest)
        return sum(self.cache.load_ahead((tenant, each)) is not None for each in traces)

    async def run(self, threads: ThreadRunner) -> None:
        """Load ahead, for ever."""
        while True:
            await trio.sleep(AHEAD_SECONDS)
            if self._ahead:
                await threads.run(self.load_ahead, abandon_on_cancel=True)

    def _load(self, key: tuple[str, str]) -> TraceMetadata | None:
        tenant, trace_id = key
        # Said before anything is read: a write that is not seen here will drop the key.
        with self._lock:
            full = tenant not in self._kept and len(self._kept) >= _MOST_TENANTS
            if full:
                self._kept.clear()
            self._kept[tenant] = self._clock()
        if full:
            self.cache.invalidate_where()  # this load as well, it is not kept
        row = self._store.trace(tenant, trace_id)
        if row is None:
            return None
        signals, _ = self._store.signals(tenant, SignalFilter(trace_id=trace_id), limit=MAX_SIGNALS)
        return TraceMetadata(row, tuple(signals))
