"""The loading cache: against a model, and with loads that overlap."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

import pytest
import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from betrace.service.caches import LoadingCache

KEYS = st.tuples(st.sampled_from("ab"), st.integers(0, 3))


class CacheMachine(RuleBasedStateMachine):
    """The cache against an ordered dictionary, least recently used first."""

    @initialize(
        maxsize=st.integers(1, 5),
        expire_after=st.sampled_from(["write", "access"]),
        max_bytes=st.none() | st.integers(1, 12),
    )
    def start(self, maxsize, expire_after, max_bytes):
        self.now = 0.0
        self.fails = False
        self.loads = self.failures = self.hits = self.misses = self.evictions = 0
        self.maxsize, self.max_bytes, self.touch = maxsize, max_bytes, expire_after == "access"
        self.model: OrderedDict[tuple[str, int], tuple[int, float]] = OrderedDict()
        self.value = 0
        self.cache = LoadingCache(
            "test",
            self.load,
            maxsize=maxsize,
            ttl_seconds=10,
            expire_after=expire_after,
            max_bytes=max_bytes,
            weigher=None if max_bytes is None else self.weight,
            clock=lambda: self.now,
        )

    @staticmethod
    def weight(value):
        return value % 7

    def load(self, key):
        if self.fails:
            raise OSError("no")
        self.value += 1
        return None if key[1] == 3 else self.value

    def expire(self):
        for key in [k for k, (_, until) in self.model.items() if until <= self.now]:
            del self.model[key]
            self.evictions += 1

    def expected(self, key):
        """What the cache holds of a key, counted as a look-up."""
        self.expire()
        if key not in self.model:
            self.misses += 1
            return None
        self.hits += 1
        value, until = self.model[key]
        self.model[key] = value, self.now + 10 if self.touch else until
        self.model.move_to_end(key)
        return value

    @rule(key=KEYS)
    def peek(self, key):
        assert self.cache.peek(key) == self.expected(key)

    @rule(key=KEYS)
    def get(self, key):
        expected = self.expected(key)
        if expected is not None:
            assert self.cache.get(key) == expected
            return
        if self.fails:
            with pytest.raises(OSError, match="no"):
                self.cache.get(key)
            self.failures += 1
            return
        found = self.cache.get(key)
        self.loads += 1
        if key[1] == 3:
            assert found is None
            return
        assert found == self.value
        weight = self.weight(found) if self.max_bytes is not None else 0
        if self.max_bytes is not None and weight > self.max_bytes:
            return
        while len(self.model) >= self.maxsize or (
            self.max_bytes is not None and self.bytes() + weight > self.max_bytes
        ):
            self.model.popitem(last=False)
            self.evictions += 1
        self.model[key] = found, self.now + 10

    def bytes(self):
        return sum(self.weight(value) for value, _ in self.model.values())

    @rule(key=KEYS)
    def invalidate(self, key):
        self.expire()
        assert self.cache.invalidate(key) == (self.model.pop(key, None) is not None)

    @rule(tenant=st.none() | st.sampled_from("ab"))
    def invalidate_where(self, tenant):
        self.expire()
        doomed = [key for key in self.model if tenant in (None, key[0])]
        for key in doomed:
            del self.model[key]
        condition = None if tenant is None else lambda key: key[0] == tenant
        assert self.cache.invalidate_where(condition) == len(doomed)

    @rule(seconds=st.floats(0, 12))
    def wait(self, seconds):
        self.now += seconds

    @rule(fails=st.booleans())
    def loader_fails(self, fails):
        self.fails = fails

    @invariant()
    def same_statistics(self):
        if not hasattr(self, "cache"):
            return
        self.expire()
        found = self.cache.statistics()
        assert (found.hits, found.misses) == (self.hits, self.misses)
        assert (found.loads, found.load_failures) == (self.loads, self.failures)
        assert (found.size, found.evictions) == (len(self.model), self.evictions)
        assert found.nbytes == (None if self.max_bytes is None else self.bytes())


TestCacheMachine = CacheMachine.TestCase


class Loader:
    """Loads when let; in worker threads."""

    def __init__(self):
        self.calls: list[str] = []
        self.began = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.error: Exception | None = None

    def __call__(self, key):
        self.calls.append(key)
        number = len(self.calls)
        self.began.release()
        assert self.go.acquire(timeout=60)
        if self.error is not None:
            raise self.error
        return f"{key}{number}"

    async def has_begun(self):
        with trio.fail_after(60):
            while not self.began.acquire(blocking=False):
                await trio.sleep(0.001)


@pytest.fixture
def loader():
    return Loader()


@pytest.fixture
def cache(loader):
    return LoadingCache("test", loader, maxsize=10, ttl_seconds=60)


def getter(cache, found):
    """A task that appends what it gets in a thread, or the error, to a list."""

    async def get(key):
        try:
            found.append(await trio.to_thread.run_sync(cache.get, key))
        except OSError as error:
            found.append(error)

    return get


async def test_concurrent_misses_load_once(cache, loader):
    found = []
    get = getter(cache, found)
    async with trio.open_nursery() as nursery:
        for _ in range(21):
            nursery.start_soon(get, "k")
        await loader.has_begun()
        with trio.fail_after(60):
            while cache.statistics().misses < 21:  # until all threads have looked
                await trio.sleep(0.001)
        loader.go.release()
    assert found == ["k1"] * 21
    assert cache.get("k") == "k1"
    stats = cache.statistics()
    assert (stats.hits, stats.misses, stats.loads) == (1, 21, 1)
    assert stats.hit_rate == 1 / 22


async def test_a_failed_load_reaches_all_and_is_not_kept(cache, loader):
    found = []
    get = getter(cache, found)
    loader.error = OSError("disk")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(get, "k")
        await loader.has_begun()
        with trio.fail_after(60):
            while cache.statistics().misses < 3:
                await trio.sleep(0.001)
        loader.go.release()
    assert [str(each) for each in found] == ["disk"] * 3
    loader.error = None
    loader.go.release()
    assert cache.get("k") == "k2"
    stats = cache.statistics()
    assert (stats.loads, stats.load_failures) == (1, 1)
    assert stats.to_json()["averageLoadPenaltyMs"] > 0


@pytest.mark.parametrize("how", ["one", "many", "tenant", "all"])
async def test_what_is_invalidated_while_it_loads_is_not_kept(cache, loader, how):
    found = []
    get = getter(cache, found)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(get, "k")
        await loader.has_begun()
        if how == "one":
            cache.invalidate("k")
        elif how == "many":
            assert cache.invalidate_all({"j", "k"}) == 0
        else:
            cache.invalidate_where(None if how == "all" else lambda key: key == "k")
        nursery.start_soon(get, "k")  # this one must not see what was loaded before
        await loader.has_begun()
        loader.go.release(2)
    assert sorted(found) == ["k1", "k2"]
    assert cache.get("k") == "k2"
    assert cache.statistics().evictions == 0


async def test_an_invalidation_of_another_key_leaves_a_load(cache, loader):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, cache.get, "k")
        await loader.has_begun()
        cache.invalidate_where(lambda key: key == "l")
        cache.invalidate("l")
        cache.invalidate_all({"l", "m"})
        loader.go.release()
    assert cache.peek("k") == "k1"


async def test_many_are_invalidated_at_once(cache, loader):
    loader.go.release(4)
    for key in "klmn":
        cache.get(key)
    assert cache.invalidate_all({"k", "l", "x"}) == 2  # fewer than there are, and then more
    assert cache.invalidate_all({"m", "x", "y", "z"}) == 1
    assert [cache.peek(key) for key in "klmn"] == [None, None, None, "n4"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"maxsize": 0, "ttl_seconds": 1},
        {"maxsize": 1, "ttl_seconds": 0},
        {"maxsize": 1, "ttl_seconds": 1, "max_bytes": 5},
    ],
)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="cache test"):
        LoadingCache("test", str, **wrong)


def test_concurrent_look_ups_and_invalidations():
    """Many threads, few keys, invalidations between: no value that was dropped comes back."""
    current = dict.fromkeys(range(4), 0)

    def load(key):
        value = current[key]
        time.sleep(0.0001)
        return value + 1

    cache = LoadingCache("test", load, maxsize=3, ttl_seconds=60)

    def read():
        for k in range(300):
            cache.get(k % 4)

    def write():
        for k in range(300):
            current[k % 4] += 1
            cache.invalidate(k % 4)
            time.sleep(0.0001)

    workers = [threading.Thread(target=target) for target in (read, read, write)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all(cache.get(key) == current[key] + 1 for key in current)
