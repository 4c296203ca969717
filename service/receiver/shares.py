"""How tenants share the scarce resources of the receiver: the channel and the memory for bodies.

Max-min fairness with a reserve. While less than half of the capacity is taken, everyone is
admitted. Above half, a tenant that has an equal share or more is refused. The last part is reserved
for tenants that have nothing. So a single tenant may take all but the reserve, many tenants get
equal shares, and a tenant that sends little is admitted whatever the others do, without a list of
tenants, weights or rates (compare the dynamic thresholds of Choudhury and Hahne, 1998, for packets
in a shared memory).
"""

from __future__ import annotations

_CONTESTED = 0.5


class Shares:
    """What each tenant has taken of ``capacity``. A tenant that has nothing costs no memory."""

    __slots__ = ("_contested", "_open", "_taken", "capacity", "total")

    def __init__(self, capacity: int, open_to_all: float) -> None:
        """Above the fraction ``open_to_all`` only tenants that have nothing are admitted."""
        self.capacity = capacity
        self.total = 0
        self._taken: dict[str, int] = {}
        self._contested = int(capacity * _CONTESTED)
        self._open = int(capacity * open_to_all)

    def __len__(self) -> int:
        """How many tenants have something."""
        return len(self._taken)

    def taken(self, tenant: str) -> int:
        """What ``tenant`` has."""
        return self._taken.get(tenant, 0)

    def admits(self, tenant: str, amount: int = 0, total: int | None = None) -> bool:
        """Whether ``tenant`` may take ``amount`` more. ``total`` is what all tenants have, if the
        caller knows it better than this object."""
        total = (self.total if total is None else total) + amount
        if total <= self._contested:
            return True
        taken = self._taken.get(tenant, 0)
        if not taken:
            return total <= self.capacity
        return total <= self._open and taken + amount <= self._open // len(self._taken)

    def take(self, tenant: str, amount: int) -> None:
        """Note that ``tenant`` took ``amount``."""
        self.total += amount
        self._taken[tenant] = self._taken.get(tenant, 0) + amount

    def release(self, tenant: str, amount: int) -> None:
        """Note that ``tenant`` returned ``amount``."""
        self.total -= amount
        left = self._taken[tenant] - amount
        if left:
            self._taken[tenant] = left
        else:
            del self._taken[tenant]
