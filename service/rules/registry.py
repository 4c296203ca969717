"""The compiled rules of each tenant, in a bounded cache; they are compiled again after changes."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from betrace.service.caches import LoadingCache
from betrace.service.config.base import MIB
from betrace.service.rules.compile import CompiledRules, compile_definitions, compile_rules
from betrace.service.rules.definition import ALERT, JUDGE, Rule
from betrace.service.rules.store import ALL_TENANTS, RuleStore

_RULE_BYTES = 4096
_LATEST_SECONDS = 1.0
_USUAL = (ALERT, JUDGE)


def rules_version(rules: tuple[Rule, ...]) -> str:
    """A hash of the enabled rules: of their conditions, and of what their signals contain."""
    contents = [
        [
            rule.id,
            rule.version,
            rule.severity,
            rule.name,
            sorted(rule.labels.items()),
            *([rule.mode, rule.incomplete] if (rule.mode, rule.incomplete) != _USUAL else []),
        ]
        for rule in rules
        if rule.enabled
    ]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def weight(rules: CompiledRules) -> int:
    """The approximate size of compiled rules in bytes: their arrays, and a fixed amount for the
    objects of each rule."""
    names = sum(array.nbytes for array in rules.names.arrays)
    programs = (rules.predicates, rules.code, rules.leaves, rules.text, rules.programs)
    return names + sum(array.nbytes for array in programs) + _RULE_BYTES * (1 + len(rules.rules))


class RuleRegistry:
    """Compiled rules by tenant. All methods may be called from any thread and may block.

    Rules that leave the cache while they are still in use, for example by open traces, are not
    compiled again: a version of a tenant's rules is always one object.
    """

    def __init__(
        self,
        store: RuleStore,
        size: int,
        ttl_seconds: float = 1800,
        max_bytes: int = 512 * MIB,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.cache: LoadingCache[str, CompiledRules] = LoadingCache(
            "ruleContainers",
            self._compile,
            maxsize=size,
            ttl_seconds=ttl_seconds,
            expire_after="access",
            max_bytes=max_bytes,
            weigher=weight,
            clock=clock,
        )
        self._in_use: WeakValueDictionary[tuple[str, str], CompiledRules] = WeakValueDictionary()
        # The latest rules of tenants that were looked up in the cache since ``_since``: a request
        # must not cost 2 µs for its rules.
        self._latest: WeakValueDictionary[str, CompiledRules] = WeakValueDictionary()
        self._since = clock()
        self._clock = clock
        self._changes = 0
        self._lock = threading.Lock()

    def ready(self, tenant: str) -> bool:
        """Whether :meth:`compiled` does not block now."""
        return tenant in self._latest or tenant in self.cache

    def compiled(self, tenant: str) -> CompiledRules:
        """The tenant's enabled rules, compiled now if they are not in the cache."""
        now = self._clock()
        if now - self._since >= _LATEST_SECONDS:
            self._since = now
            self._latest = WeakValueDictionary()
        found = self._latest.get(tenant)
        if found is not None:
            self.cache.count_hit()
            return found
        changes = self._changes
        found = self.cache.get(tenant)
        assert found is not None  # a tenant without rules has an empty set
        with self._lock:
            if changes == self._changes:  # otherwise they may be old
                self._latest[tenant] = found
        return found

    def version(
        self, tenant: str, version: str, definitions: Callable[[], bytes | None]
    ) -> CompiledRules | None:
        """A version of the tenant's rules, which may be a former one: then it is compiled from
        its ``definitions``, which are asked for only if they are needed. None if the
        definitions are not known. Raises
        :exc:`~betrace.service.rules.definition.RuleFileError`."""
        latest = self.compiled(tenant)
        if latest.version == version:
            return latest
        with self._lock:
            found = self._in_use.get((tenant, version))
            if found is None and (text := definitions()) is not None:
                found = self._in_use[tenant, version] = compile_definitions(text, version)
            return found

    def refresh(self) -> set[str]:
        """Check the rule files. Returns the tenants whose rules changed, or
        :data:`~betrace.service.rules.store.ALL_TENANTS` among them; these rules are compiled again
        at the next use. Open traces keep the rules they were opened under."""
        changed = self.store.poll()
        if ALL_TENANTS in changed:
            self.cache.invalidate_where(lambda _: True)
            with self._lock:
                self._changes += 1
                self._latest.clear()
        for tenant in changed:
            self.forget(tenant)
        return changed

    def forget(self, tenant: str) -> None:
        """Load the tenant's rules again at the next use."""
        self.cache.invalidate(tenant)
        with self._lock:
            self._changes += 1
            self._latest.pop(tenant, None)

    def statistics(self) -> dict[str, Any]:
        """The cache's statistics for the API."""
        return self.cache.statistics().to_json()

    def _compile(self, tenant: str) -> CompiledRules:
        self.store.follow(tenant)
        rules = self.store.rules(tenant)
        version = rules_version(rules)
        found = self._in_use.get((tenant, version))
        if found is None:
            found = self._in_use[tenant, version] = compile_rules(rules, version)
        return found
