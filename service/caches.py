"""Caches that load what they miss: bounded in number, age and, if wanted, bytes.

Entries are held by `cachetools`; what this module adds is what a service needs around them: use
from Trio and from threads at once, one load for concurrent misses on a key, invalidation that also
reaches loads under way, and statistics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Set
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Generic, Literal, Protocol, TypeVar, TypeVarTuple, final

import trio
from cachetools import TTLCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

Expiry = Literal["write", "access"]


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A cache at one moment; counts are since the start. A look-up that joins a load under way is a
    miss; an eviction is for room or age, not by invalidation."""

    hits: int
    misses: int
    evictions: int
    loads: int
    load_failures: int
    load_seconds: float
    """Spent in loads, failed ones too."""
    size: int
    max_size: int
    nbytes: int | None
    """What the entries weigh, None where the cache is not bounded in bytes."""
    max_bytes: int | None

    @property
    def hit_rate(self) -> float:
        """Part of the look-ups that were hits, 0 before any."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    def to_json(self) -> dict[str, Any]:
        """As the API and the TUI show it."""
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


class Threads(Protocol):
    """A :class:`channels.ThreadRunner`."""

    async def run(
        self, fn: Callable[[*Ts], R], *args: *Ts, abandon_on_cancel: bool = False
    ) -> R: ...


class _NotBegunError(Exception):
    """Who wanted to load went away before it began: look again."""


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    nbytes: int


@dataclass(slots=True, eq=False)
class _Load(Generic[K, V]):
    """A load under way, or about to begin; its fields are guarded by the cache's lock."""

    key: K
    future: Future[V | None]
    begun: bool = False
    stale: bool = False  # invalidated since: its value is given to who waits, but not kept


class _Entries(TTLCache[Any, Any]):
    """Counts what leaves for room or for its age."""

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
    """A cache whose ``loader`` fills it: concurrent misses on one key load once.

    :meth:`get` is for Trio tasks and loads in ``threads``; :meth:`get_blocking` is for worker
    threads and loads in the calling one. Both may be used at once, and share the loads. A loader
    returns None where there is nothing; that is not kept. What it raises reaches all who wait for
    the load, and is not kept either. A cancelled task leaves its load to those who wait for it.

    Args:
      name: what statistics are kept under.
      loader: gives the value of a key; called in worker threads, it may block.
      threads: runs loads for :meth:`get`; None where only threads ask.
      maxsize: entries, beyond which the least recently used leaves.
      ttl_seconds: an entry leaves so long after it was written, or last read.
      expire_after: which of the two.
      max_bytes: what the entries may weigh together; one that weighs more is never kept.
      weigher: the bytes of a value; called once for each load.
      clock: seconds.
    """

    def __init__(
        self,
        name: str,
        loader: Callable[[K], V | None],
        threads: Threads | None = None,
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
        self._threads = threads
        self._maxsize = maxsize
        self._max_bytes = max_bytes
        self._weigher = weigher
        self._touch = expire_after == "access"
        self._clock = clock
        self._lock = threading.Lock()  # held for moments: never while a value is loaded
        if max_bytes is None:
            self._entries = _Entries(maxsize, ttl_seconds, clock)
        else:
            self._entries = _Entries(max_bytes, ttl_seconds, clock, attrgetter("nbytes"))
        self._loads: dict[K, _Load[K, V]] = {}
        self._hits = self._misses = self._loaded = self._failed = 0
        self._load_seconds = 0.0

    def peek(self, key: K) -> V | None:
        """The value if it is there, None otherwise; counted as a hit or a miss. Never waits."""
        with self._lock:
            entry = self._find(key)
            self._count(entry)
            return entry.value if entry else None

    async def get(self, key: K) -> V | None:
        """The value, loaded if it is not there. Raises what the loader raises."""
        if self._threads is None:
            raise RuntimeError(f"cache {self.name} has no threads to load in")
        await trio.lowlevel.checkpoint()
        counted = False
        while True:
            with self._lock:
                entry = self._find(key)
                if not counted:
                    self._count(entry)
                    counted = True
                if entry:
                    return entry.value
                load, mine = self._join(key)
            if mine:
                try:
                    await self._threads.run(self._run, load, abandon_on_cancel=True)
                except BaseException:
                    self._give_up(load)
                    raise
            await _finished(load.future)
            with suppress(_NotBegunError):
                return load.future.result()

    def get_blocking(self, key: K) -> V | None:
        """As :meth:`get`, for worker threads."""
        return self._get_blocking(key, counted=False)

    def load_ahead(self, key: K) -> V | None:
        """As :meth:`get_blocking`, but not counted as a look-up: nobody asked for it yet."""
        return self._get_blocking(key, counted=True)

    def _get_blocking(self, key: K, *, counted: bool) -> V | None:
        while True:
            with self._lock:
                entry = self._find(key)
                if not counted:
                    self._count(entry)
                    counted = True
                if entry:
                    return entry.value
                load, _ = self._join(key)
            # Who comes first loads. Waiting for a task to begin could wait for this very thread.
            self._run(load)
            with suppress(_NotBegunError):
                return load.future.result()

    def invalidate(self, key: K) -> bool:
        """Drop an entry; also what is being loaded for it will not be kept. Whether one was
        there."""
        with self._lock:
            if (load := self._loads.pop(key, None)) is not None:
                load.stale = True
            return self._entries.pop(key, None) is not None

    def invalidate_all(self, keys: Set[K]) -> int:
        """The same with many keys, of which few may be there; how many were."""
        with self._lock:
            for key in self._loads.keys() & keys:
                self._loads.pop(key).stale = True
            few = self._entries if len(self._entries) < len(keys) else keys
            doomed = [key for key in few if key in self._entries and key in keys]
            for key in doomed:
                self._entries.pop(key, None)
            return len(doomed)

    def invalidate_where(self, condition: Callable[[K], bool] | None = None) -> int:
        """Drop the entries whose keys meet the condition, all without one; how many there were.
        What is being loaded for such keys will not be kept."""
        with self._lock:
            for key in [k for k in self._loads if condition is None or condition(k)]:
                self._loads.pop(key).stale = True
            doomed = [k for k in self._entries if condition is None or condition(k)]
            for key in doomed:
                self._entries.pop(key, None)
            return len(doomed)

    def statistics(self) -> CacheStatistics:
        """Counts and sizes as of now."""
        with self._lock:
            size = len(self._entries)  # expired ones leave now, and are counted
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

    # With the lock held

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

    def _join(self, key: K) -> tuple[_Load[K, V], bool]:
        """The load of a key, and whether it is new."""
        load = self._loads.get(key)
        if load is not None:
            return load, False
        load = self._loads[key] = _Load(key, Future())
        return load, True

    def _keep(self, key: K, entry: _Entry[V]) -> None:
        if self._max_bytes is not None and entry.nbytes > self._max_bytes:
            return
        self._entries.pop(key, None)
        while len(self._entries) >= self._maxsize:
            self._entries.popitem()
        self._entries[key] = entry

    # Loads

    def _run(self, load: _Load[K, V]) -> None:
        """Load, in a worker thread, unless another one has begun to. Never raises."""
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
        except BaseException as error:  # delivered to all who wait, whatever it is
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

    def _give_up(self, load: _Load[K, V]) -> None:
        """The task that was to load is gone; one that waits does it, unless it has begun."""
        with self._lock:
            if load.begun:
                return
            load.begun = True
            if self._loads.get(load.key) is load:
                del self._loads[load.key]
        load.future.set_exception(_NotBegunError())


async def _finished(future: Future[V]) -> None:
    """Wait until a future, which another thread completes, has a result or an error."""
    if future.done():
        return
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()
    future.add_done_callback(partial(_tell, token, done))
    await done.wait()


def _tell(token: trio.lowlevel.TrioToken, done: trio.Event, _: Future[Any]) -> None:
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(done.set)
