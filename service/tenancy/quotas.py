"""How many spans per second each tenant may send."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping


class SpanQuotas:
    """A token bucket of spans for each tenant.

    A bucket fills at the tenant's rate (spans per second), up to ``burst_seconds`` worth. A request
    is admitted while the bucket is not empty, and may take it below zero: a request larger than the
    burst still passes, and the next ones wait until the debt is paid. Buckets are kept for
    ``tracked`` tenants; the least recently used is dropped first, which can only forgive a debt. A
    rate of 0 means no limit.
    """

    def __init__(
        self,
        spans_per_second: int = 0,
        burst_seconds: float = 10,
        tenants: Mapping[str, int] | None = None,
        tracked: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._tracked = tracked
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # spans left, when
        self._set: dict[str, int] = {}
        self.configure(spans_per_second, burst_seconds, tenants or {})

    def configure(
        self, spans_per_second: int, burst_seconds: float, tenants: Mapping[str, int]
    ) -> None:
        """Change the configured rates; debts stay."""
        self._rate = spans_per_second
        self._burst_seconds = burst_seconds
        self._tenants = dict(tenants)
        self._update()

    def set(self, tenant: str, rate: int | None) -> None:
        """Give ``tenant`` a rate that overrides the configured one; None removes it."""
        if rate is None:
            self._set.pop(tenant, None)
        else:
            self._set[tenant] = rate
        self._update()

    def _update(self) -> None:
        rates = (self._rate, *self._tenants.values(), *self._set.values())
        self._unlimited = not any(rates)

    def rate(self, tenant: str) -> int:
        """Spans per second that ``tenant`` may send; 0 means no limit."""
        return self._set.get(tenant, self._tenants.get(tenant, self._rate))

    def admit(self, tenant: str, spans: int) -> float | None:
        """Take ``spans`` from the tenant's bucket and return None; if the bucket is empty, take
        nothing and return the seconds until it no longer is. 0 spans only checks."""
        if self._unlimited:
            return None
        rate = self.rate(tenant)
        if not rate:
            return None
        now = self._clock()
        level = self._level(tenant, rate, now)
        if level <= 0:
            return -level / rate
        if spans:
            self._keep(tenant, level - spans, now)
        return None

    def settle(self, tenant: str, spans: int) -> None:
        """Correct an earlier estimate: take ``spans`` more; negative returns spans."""
        if self._unlimited or not spans:
            return
        rate = self.rate(tenant)
        if rate:
            now = self._clock()
            self._keep(tenant, self._level(tenant, rate, now) - spans, now)

    def _level(self, tenant: str, rate: int, now: float) -> float:
        burst = rate * self._burst_seconds
        kept = self._levels.get(tenant)
        if kept is None:
            return burst
        return min(burst, kept[0] + (now - kept[1]) * rate)

    def _keep(self, tenant: str, level: float, now: float) -> None:
        self._levels[tenant] = (level, now)
        self._levels.move_to_end(tenant)
        if len(self._levels) > self._tracked:
            self._levels.popitem(last=False)
