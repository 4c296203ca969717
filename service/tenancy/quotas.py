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

    Processes that share the quotas each admit a part of them (:meth:`divide`).
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
        self._parts: Mapping[str, float] = {}
        self._other_part = 1.0
        self._demand: dict[str, int] | None = None
        self._usual: dict[str, int] = {}  # spans of the last request, while demand is measured
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

    def divide(self, parts: Mapping[str, float], others: float) -> None:
        """Admit these fractions of the tenants' quotas, and ``others`` for all other tenants. When
        a fraction falls, what the bucket has saved falls too, because another process now has it.
        Demand is measured from the first call on."""
        now = self._clock()
        for tenant in parts.keys() | self._parts.keys():
            if tenant in self._levels:
                before = self._parts.get(tenant, self._other_part)
                level = self._level(tenant, self.rate(tenant) * before, now)
                if level > 0:
                    level *= min(1.0, parts.get(tenant, others) / before)
                self._levels[tenant] = (level, now)
        self._parts, self._other_part = parts, others
        if self._demand is None:
            self._demand = {}

    def take_demand(self) -> dict[str, int]:
        """The spans that tenants with a quota have sent or tried to send since the last call;
        for a request refused by its head, as many as in the tenant's last one."""
        found, self._demand = self._demand or {}, {}
        self._usual = {tenant: spans for tenant, spans in self._usual.items() if tenant in found}
        return found

    def _note(self, tenant: str, spans: int) -> None:
        if self._demand is not None:
            self._demand[tenant] = max(0, self._demand.get(tenant, 0) + spans)

    def admit(self, tenant: str, spans: int) -> float | None:
        """Take ``spans`` from the tenant's bucket and return None; if the bucket is empty, take
        nothing and return the seconds until it no longer is. 0 spans only checks."""
        if self._unlimited:
            return None
        rate = self.rate(tenant)
        if not rate:
            return None
        now = self._clock()
        part = self._parts.get(tenant, self._other_part)
        level = self._level(tenant, rate * part, now)
        if level <= 0:
            self._note(tenant, spans or self._usual.get(tenant, 1))
            return -level / (rate * part)
        if spans:
            self._note(tenant, spans)
            if self._demand is not None:
                self._usual[tenant] = spans
            self._keep(tenant, level - spans, now)
        return None

    def settle(self, tenant: str, spans: int) -> None:
        """Correct an earlier estimate: take ``spans`` more; negative returns spans."""
        if self._unlimited or not spans:
            return
        rate: float = self.rate(tenant)
        if rate:
            self._note(tenant, spans)
            now = self._clock()
            rate *= self._parts.get(tenant, self._other_part)
            self._keep(tenant, self._level(tenant, rate, now) - spans, now)

    def _level(self, tenant: str, rate: float, now: float) -> float:
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
