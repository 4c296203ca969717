"""Benchmarks of the caches: the time of a hit and of a miss."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.caches import LoadingCache
from betrace.service.pipeline.trace_rows import trace_table
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.storage.duck.store import DuckStore
from betrace.service.tenancy import changes
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.tenant import PublicKey
from betrace.service.traces.layout import HI, LO
from perf.lib.engine import TENANT
from perf.lib.rounds import Taken, rounds, timed
from perf.lib.rows import closed_traces, make_signals
from perf.lib.workload import write_rules

STORED = 100_000  # traces in the store

Json = dict[str, Any]


def caches(directory: Path) -> dict[str, Json]:
    """Measure a hit and a miss of each cache: compiled rules (100), public keys, and traces with
    their signals in a store of ``STORED``."""
    folder = directory / "rules"
    write_rules(folder, [], 100)
    rules = RuleStore(folder)
    rules.load()
    registry = RuleRegistry(rules, 500)
    known = TenantDirectory(directory / "tenants.sqlite")
    (key,) = known.change(TENANT, changes.create(None, bytes(range(32)))).keys
    keys: LoadingCache[tuple[str, str], PublicKey] = LoadingCache(
        "publicKeys", lambda of: known.public_key(*of), maxsize=1000, ttl_seconds=3600.0
    )
    found = {
        **_cache("rules", registry.cache, "default"),
        **_cache("key", keys, (TENANT, key.kid)),
    }
    known.close()
    with DuckStore(directory / "metadata") as store:
        due = closed_traces(1000)
        for first in range(0, STORED, 1000):
            due.rows[:, LO] = np.arange(first, first + 1000)
            signals = [replace(each, trace_id=f"{first:032x}") for each in make_signals(1, first)]
            due.rows[:, HI] = 0
            store.write(TENANT, signals=signals, traces=trace_table(due))
        metadata = TraceMetadataCache(store, maxsize=10_000, ttl_seconds=300.0, max_bytes=64 << 20)
        found |= _cache("trace", metadata.cache, (TENANT, f"{STORED // 2 // 1000 * 1000:032x}"))
    return found


def _cache(name: str, cache: LoadingCache[Any, Any], key: Hashable) -> dict[str, Json]:
    def miss() -> Taken:
        cache.invalidate(key)
        return timed(lambda: cache.get(key))

    def hit() -> None:
        if cache.get(key) is None:
            raise LookupError(f"the cache of the bench has no {name}")

    return {f"{name}, miss": rounds(1, miss), f"{name}, hit": rounds(1, hit, 0.05)}
