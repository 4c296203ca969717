"""Caches that load missing entries, bounded in number, age and optionally bytes.

`cachetools` stores the entries. This module adds what a service needs: use from several threads at
once, one load for concurrent misses on a key, invalidation that also reaches running loads, and
statistics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Set
from concurrent.futures import Future
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, Literal, TypeVar, final

from cachetools import TTLCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

Expiry = Literal["write", "access"]


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """The state of a cache; counts are since the start. A look-up that joins a running load is a
    miss. An eviction is for lack of space or for age, not by invalidation."""

    hits: int
    misses: int
    evictions: int
    loads: int
    load_failures: int
    load_seconds: float
    """Time spent in loads, including failed ones."""
    size: int
    max_size: int
    nbytes: int | None
    """Bytes of the entries, None if the cache is not bounded in bytes."""
    max_bytes: int | None

    @property
    def hit_rate(self) -> float:
        """The fraction of look-ups that were hits, 0 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    def to_json(self) -> dict[str, Any]:
        """The statistics as the API returns them."""
        loads = self.loads + self.load_failures
        shown: dict[str, Any] = {
            "hitCount": self.hits,
            "missCount": self.misses,
            "hitRate": self.hit_rate,
            "evictionCount": self.evictions,
            "loadSuccessCount": self.loads,
            "loadFailureCount": self.load_failures,
            "averageLoadPenaltyMs": 1e3 * self.load_seconds / loads if loads else 0.0,
            "size": self.size,
            "maxSize": self.max_size,
        }
        if self.max_bytes is not None:
            shown |= {"bytes": self.nbytes, "maxBytes": self.max_bytes}
        return shown


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    nbytes: int


@dataclass(slots=True, eq=False)
class _Load(Generic[K, V]):
    """A load that runs or is about to; the cache's lock guards its fields."""

    key: K
    future: Future[V | None]
    begun: bool = False
    stale: bool = False  # invalidated: its value is returned to waiters but not kept


class _Entries(TTLCache[Any, Any]):
    """Counts evictions."""

    evictions = 0

    def popitem(self) -> tuple[Any, Any]:
        item = super().popitem()
        self.evictions += 1
        return item

    def expire(self, time: float | None = None) -> list[tuple[Any, Any]]:
        expired = list(super().expire(time))
        self.evictions += len(expired)
        return expired


@final
class LoadingCache(Generic[K, V]):
    """A cache that ``loader`` fills. Thread-safe; concurrent misses on one key load once.

    The first thread that misses a key loads it; others that miss it wait for that load. A None from
    the loader means that there is no value, and is not kept. What it raises reaches all waiters and
    is not kept either.

    Args:
      name: the cache's name in statistics.
      loader: returns the value for a key; may block.
      maxsize: the most entries; above it the least recently used one is evicted.
      ttl_seconds: how long after it was written, or last read, an entry is evicted.
      expire_after: which of the two.
      max_bytes: the most bytes of all entries; a larger value is never kept.
      weigher: returns the bytes of a value; called once for each load.
      clock: monotonic, in seconds.
    """

    def __init__(
        self,
        name: str,
        loader: Callable[[K], V | None],
        *,
        maxsize: int,
        ttl_seconds: float,
        expire_after: Expiry = "write",
        max_bytes: int | None = None,
        weigher: Callable[[V], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if maxsize < 1 or ttl_seconds <= 0:
            raise ValueError(f"cache {name}: maxsize must be 1 or more, ttl_seconds more than 0")
        if (max_bytes is None) != (weigher is None):
            raise ValueError(f"cache {name}: max_bytes and weigher go together")
        self.name = name
        self._loader = loader
        self._maxsize = maxsize
        self._max_bytes = max_bytes
        self._weigher = weigher
        self._touch = expire_after == "access"
        self._clock = clock
        self._lock = threading.Lock()  # held only for moments, never during a load
        if max_bytes is None:
            self._entries = _Entries(maxsize, ttl_seconds, clock)
        else:
            self._entries = _Entries(max_bytes, ttl_seconds, clock, attrgetter("nbytes"))
        self._loads: dict[K, _Load[K, V]] = {}
        self._hits = self._misses = self._loaded = self._failed = 0
        self._load_seconds = 0.0

    def peek(self, key: K) -> V | None:
        """The value if it is in the cache, else None; counts as a hit or a miss. Never waits."""
        with self._lock:
            entry = self._find(key)
            self._count(entry)
            return entry.value if entry else None

    def __contains__(self, key: K) -> bool:
        """Whether the value is in the cache; does not count as a look-up."""
        with self._lock:
            return key in self._entries

    def count_hit(self) -> None:
        """Count a look-up that the caller answered with a value that it keeps."""
        self._hits += 1  # without the lock: a lost count does not matter

    def get(self, key: K) -> V | None:
        """The value, loaded if it is missing. Raises what the loader raises. Blocks."""
        return self._get(key, counted=True)

    def load_ahead(self, key: K) -> V | None:
        """As :meth:`get`, but not counted as a look-up."""
        return self._get(key, counted=False)

    def _get(self, key: K, *, counted: bool) -> V | None:
        with self._lock:
            entry = self._find(key)
            if counted:
                self._count(entry)
            if entry:
                return entry.value
            load = self._loads.get(key)
            if load is None:
                load = self._loads[key] = _Load(key, Future())
        self._run(load)  # the first thread loads, the others wait
        return load.future.result()

    def invalidate(self, key: K) -> bool:
        """Drop an entry, and do not keep what is being loaded for it. Returns whether there was
        one."""
        with self._lock:
            if (load := self._loads.pop(key, None)) is not None:
                load.stale = True
            return self._entries.pop(key, None) is not None

    def invalidate_all(self, keys: Set[K]) -> int:
        """Drop the entries of many keys as :meth:`invalidate` does; returns how many there were."""
        with self._lock:
            for key in self._loads.keys() & keys:
                self._loads.pop(key).stale = True
            few = self._entries if len(self._entries) < len(keys) else keys
            doomed = [key for key in few if key in self._entries and key in keys]
            for key in doomed:
                self._entries.pop(key, None)
            return len(doomed)

    def invalidate_where(self, condition: Callable[[K], bool] | None = None) -> int:
        """Drop the entries whose keys satisfy the condition (all without one), and do not keep what
        is being loaded for such keys. Returns how many entries there were."""
        with self._lock:
            for key in [k for k in self._loads if condition is None or condition(k)]:
                self._loads.pop(key).stale = True
            doomed = [k for k in self._entries if condition is None or condition(k)]
            for key in doomed:
                self._entries.pop(key, None)
            return len(doomed)

    def statistics(self) -> CacheStatistics:
        """The present counts and sizes."""
        with self._lock:
            size = len(self._entries)  # evicts and counts expired entries
            return CacheStatistics(
                hits=self._hits,
                misses=self._misses,
                evictions=self._entries.evictions,
                loads=self._loaded,
                load_failures=self._failed,
                load_seconds=self._load_seconds,
                size=size,
                max_size=self._maxsize,
                nbytes=None if self._max_bytes is None else int(self._entries.currsize),
                max_bytes=self._max_bytes,
            )

    # The caller holds the lock

    def _find(self, key: K) -> _Entry[V] | None:
        entry: _Entry[V] | None = self._entries.get(key)
        if entry is not None and self._touch:
            self._entries[key] = entry
        return entry

    def _count(self, entry: _Entry[V] | None) -> None:
        if entry is None:
            self._misses += 1
        else:
            self._hits += 1

    def _keep(self, key: K, entry: _Entry[V]) -> None:
        if self._max_bytes is not None and entry.nbytes > self._max_bytes:
            return
        self._entries.pop(key, None)
        while len(self._entries) >= self._maxsize:
            self._entries.popitem()
        self._entries[key] = entry

    # Loads

    def _run(self, load: _Load[K, V]) -> None:
        """Load the value, unless another thread does. Never raises."""
        with self._lock:
            if load.begun:
                return
            load.begun = True
        started = self._clock()
        value: V | None = None
        failed: BaseException | None = None
        try:
            value = self._loader(load.key)
            nbytes = self._weigher(value) if self._weigher and value is not None else 0
        except BaseException as error:  # delivered to all waiters, whatever it is
            failed = error
        with self._lock:
            self._load_seconds += self._clock() - started
            if self._loads.get(load.key) is load:
                del self._loads[load.key]
            if failed is not None:
                self._failed += 1
            else:
                self._loaded += 1
                if value is not None and not load.stale:
                    self._keep(load.key, _Entry(value, nbytes))
        if failed is not None:
            load.future.set_exception(failed)
        else:
            load.future.set_result(value)
