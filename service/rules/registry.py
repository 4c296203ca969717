"""The compiled rules of each tenant, kept in a bounded cache and compiled again on change."""

from __future__ import annotations

import hashlib
import json
import threading

from cachetools import LRUCache

from service.rules.compile import CompiledRules, compile_rules
from service.rules.files import Rule, RuleStore


def rules_version(rules: tuple[Rule, ...]) -> str:
    """A hash of the enabled rules: what they decide by, and what their signals say of them."""
    said = [
        [rule.id, rule.version, rule.severity, rule.name, sorted(rule.labels.items())]
        for rule in rules
        if rule.enabled
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


class RuleRegistry:
    """Compiled rules by tenant. All methods may be called from any thread and may block."""

    def __init__(self, store: RuleStore, size: int) -> None:
        self.store = store
        self._cache: LRUCache[str, CompiledRules] = LRUCache(size)
        self._lock = threading.Lock()
        self._hits = self._loads = 0

    def compiled(self, tenant: str) -> CompiledRules:
        """The tenant's enabled rules, compiled now if they are not in the cache."""
        with self._lock:
            found = self._cache.get(tenant)
            if found is not None:
                self._hits += 1
            else:
                self._loads += 1
                rules = self.store.rules(tenant)
                found = self._cache[tenant] = compile_rules(rules, rules_version(rules))
            return found

    def refresh(self) -> set[str]:
        """Look at the rule files; the tenants whose rules changed are compiled again when next
        used. Traces that are open keep the rules they were opened under."""
        changed = self.store.poll()
        with self._lock:
            for tenant in changed:
                self._cache.pop(tenant, None)
        return changed

    def forget(self, tenant: str) -> None:
        """Compile the tenant's rules again when next used."""
        with self._lock:
            self._cache.pop(tenant, None)

    def statistics(self) -> dict[str, float]:
        """Hits, misses and size of the cache."""
        # Without the lock, which is held while rules are compiled: this never waits.
        hits, loads = self._hits, self._loads
        return {
            "hitCount": hits,
            "missCount": loads,
            "hitRate": hits / (hits + loads) if hits + loads else 0.0,
            "size": len(self._cache),
            "maxSize": int(self._cache.maxsize),
        }
