"""How tenants share what is scarce at the edge: room in the channel, memory for bodies.

Max-min fairness with a reserve: while little is held everyone is admitted; above half a tenant that
holds an equal share or more is refused; and the last part is for tenants that hold nothing. So one
tenant alone may hold all but the reserve, many hold equal shares, and one that sends little is
admitted whatever the others do, without any list of tenants, weights or rates (compare the dynamic
thresholds of Choudhury and Hahne, 1998, for packets in a shared memory).
"""

from __future__ import annotations

_CONTESTED = 0.5


class Shares:
    """What each tenant holds of ``capacity``. A tenant that holds nothing takes no room here."""

    __slots__ = ("_contested", "_held", "_open", "capacity", "total")

    def __init__(self, capacity: int, open_to_all: float) -> None:
        """``open_to_all`` is the fraction beyond which only those who hold nothing are admitted."""
        self.capacity = capacity
        self.total = 0
        self._held: dict[str, int] = {}
        self._contested = int(capacity * _CONTESTED)
        self._open = int(capacity * open_to_all)

    def __len__(self) -> int:
        """How many tenants hold something."""
        return len(self._held)

    def held(self, tenant: str) -> int:
        """What ``tenant`` holds."""
        return self._held.get(tenant, 0)

    def admits(self, tenant: str, amount: int = 0, total: int | None = None) -> bool:
        """Whether ``tenant`` may take ``amount`` more, where ``total`` is held by all, which may be
        known better than by what was told here."""
        total = (self.total if total is None else total) + amount
        if total <= self._contested:
            return True
        held = self._held.get(tenant, 0)
        if not held:
            return total <= self.capacity
        return total <= self._open and held + amount <= self._open // len(self._held)

    def take(self, tenant: str, amount: int) -> None:
        """Note that ``tenant`` holds ``amount`` more."""
        self.total += amount
        self._held[tenant] = self._held.get(tenant, 0) + amount

    def give_back(self, tenant: str, amount: int) -> None:
        """Note that it holds ``amount`` less."""
        self.total -= amount
        left = self._held[tenant] - amount
        if left:
            self._held[tenant] = left
        else:
            del self._held[tenant]
