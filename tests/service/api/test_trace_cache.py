"""The cache of traces stays correct at its limits, with a store that the test controls."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest

from betrace.service.api import trace_cache
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import StoreChange


class Store:
    """Has every trace, whose positions are the version."""

    def __init__(self):
        self.on_change = None
        self.version = 1
        self.broken = False

    def connections(self):
        return {"open": 1}

    def trace(self, tenant, trace_id):
        if self.broken:
            raise StoreError("away", transient=True)
        return SimpleNamespace(positions=[self.version])

    def signals(self, tenant, wanted=None, **_):
        return [SimpleNamespace(signal=SimpleNamespace(context=None, trace_id="01"))], None


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def cache(store, now):
    return TraceMetadataCache(
        store, maxsize=10, ttl_seconds=100, max_bytes=1 << 20, clock=lambda: now[0]
    )


def seen(cache, tenant="a"):
    return cache.find(tenant, "01").row.positions


def test_an_unknown_change_drops_the_whole_tenant(cache, store):
    assert seen(cache) == seen(cache, "b") == [1]
    store.version = 2
    store.on_change("a", None)
    assert seen(cache) == [2]
    assert seen(cache, "b") == [1]


def test_a_write_long_after_the_last_view_drops_the_tenant(cache, store, now):
    seen(cache)
    now[0] = 201.0
    store.on_change("a", StoreChange((), None, None))
    assert cache.cache.statistics().size == 0
    store.version = 2
    assert seen(cache) == [2]


def test_too_many_viewed_tenants_empty_the_cache(cache, store):
    with mock.patch.object(trace_cache, "_MOST_TENANTS", 2):
        for tenant in ("a", "b"):
            seen(cache, tenant)
        assert cache.cache.statistics().size == 2
        seen(cache, "c")  # not kept either, because its next write would not be noticed
        assert cache.cache.statistics().size == 0
        store.version = 2
        assert seen(cache, "a") == [2]


def test_loading_ahead_stops_while_the_store_is_unavailable(cache, store):
    signals, _ = store.signals("a")
    cache.listed("a", signals)
    cache.listed("b", signals)
    store.broken = True
    assert cache.load_ahead() == 0
    store.broken = False
    assert cache.load_ahead() == 1
    assert cache.cache.statistics().size == 1


def test_a_warm_up_opens_no_files(cache):
    assert cache.warm_up("closed", 5) == 0
    assert cache.warm_up("open", 5) == 1


def test_nothing_is_loaded_ahead_for_tenants_without_recent_views(cache, store, now):
    signals, _ = store.signals("a")
    seen(cache)
    now[0] = 150.0
    store.on_change("a", StoreChange([each.signal for each in signals], None, None))
    assert cache.load_ahead() == 0
