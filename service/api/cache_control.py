"""The caches by name: statistics, invalidation and warm-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import trio

from betrace.channels import ThreadRunner
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.caches import LoadingCache
from betrace.service.rules.registry import RuleRegistry
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.tenancy.directory import DirectoryError
from betrace.service.tenancy.gate import Gate

_log = logging.getLogger("service.caches")

Json = dict[str, Any]

WARM_SIGNALS = 5
"""A warm-up loads the traces of this many of each tenant's newest signals."""


class CacheControl:
    """All caches. ``active`` returns the tenants to warm up, those in use first; a warm-up covers
    as many as fit."""

    def __init__(
        self,
        registry: RuleRegistry,
        gate: Gate,
        metadata: TraceMetadataCache,
        active: Callable[[], Iterable[str]],
        threads: ThreadRunner,
    ) -> None:
        self._registry = registry
        self._gate = gate
        self._metadata = metadata
        self._active = active
        self._threads = threads
        self._warming = trio.Lock()
        self._caches: dict[str, LoadingCache[Any, Any]] = {
            cache.name: cache for cache in (registry.cache, gate.public_keys, metadata.cache)
        }

    @property
    def names(self) -> list[str]:
        """The names of the caches."""
        return list(self._caches)

    def statistics(self) -> dict[str, Json]:
        """Statistics of every cache, by name."""
        return {name: cache.statistics().to_json() for name, cache in self._caches.items()}

    def invalidate(self, name: str, tenant: str | None) -> int:
        """Drop the entries of a cache, for one tenant or for all; returns their number. Tokens
        verified with a dropped key are verified again."""
        cache = self._caches[name]
        tenants: set[str] = set() if tenant is None else {tenant}

        def matches(key: Any) -> bool:
            owner: str = key if isinstance(key, str) else key[0]
            if tenant not in (None, owner):
                return False
            tenants.add(owner)
            return True

        dropped = cache.invalidate_where(matches)
        if cache is self._gate.public_keys:
            for each in tenants:
                self._gate.keys_changed(each)
        return dropped

    async def warm_up_after(self, seconds: float) -> None:
        """Fill the caches once, after a delay."""
        await trio.sleep(seconds)
        found = await self.warm_up()
        _log.info(
            "caches are warm after %.1f s; entries loaded: %d, tenants: %d",
            found["seconds"],
            found["loaded"],
            found["tenants"],
        )

    async def warm_up(self) -> Json:
        """Fill the caches for the active tenants; returns ``tenants``, ``loaded`` and ``failed``
        entries, and ``seconds``."""
        async with self._warming:
            started = time.monotonic()
            most = self._registry.cache.statistics().max_size
            tenants = list(islice(dict.fromkeys(self._active()), most))
            loaded = failed = 0
            for tenant in tenants:
                # One call per tenant, so that others can use the thread in between.
                one, wrong = await self._threads.run(self._warm, tenant, abandon_on_cancel=True)
                loaded += one
                failed += wrong
            seconds = round(time.monotonic() - started, 3)
            found = {"tenants": len(tenants), "loaded": loaded, "failed": failed}
            return {**found, "seconds": seconds}

    def _warm(self, tenant: str) -> tuple[int, int]:
        """How many entries of a tenant were loaded, and how many kinds of them failed."""
        failed = 0
        loaded = 0
        for load in (self._warm_rules, self._warm_keys, self._warm_traces):
            try:
                loaded += load(tenant)
            except (StoreError, PoolTimeout, DirectoryError) as error:
                failed += 1
                _log.warning("a cache was not filled for the tenant %s: %s", tenant, error)
        return loaded, failed

    def _warm_rules(self, tenant: str) -> int:
        return self._registry.cache.load_ahead(tenant) is not None

    def _warm_keys(self, tenant: str) -> int:
        known = self._gate.directory.get(tenant)
        keys = self._gate.public_keys
        kids = [key.kid for key in known.keys] if known else []
        return sum(keys.load_ahead((tenant, kid)) is not None for kid in kids)

    def _warm_traces(self, tenant: str) -> int:
        return self._metadata.warm_up(tenant, WARM_SIGNALS)
