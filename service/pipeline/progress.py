"""How far the work has come, which a checkpoint must know to lose nothing.

*Before* the traces: which frames of the log are not folded yet (:class:`LogProgress`). *After* the
traces: which due traces are not stored yet (:class:`InFlight`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio


class TenantClosed(Exception):  # noqa: N818
    """The tenant is being deleted; nothing more is appended for it."""


@dataclass(slots=True)
class _Tenant:
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while appending
    closed: bool = False
    last: int = 0
    pending: dict[int, None] = field(default_factory=dict)


class LogProgress:
    """For each tenant: the last appended frame, and the frames up to it that are not folded.

    Frames are registered in the order of their positions, under the tenant's lock, so every frame
    up to ``last`` is either pending or folded. All methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: dict[str, _Tenant] = {}

    def append(self, tenant: str, write: Callable[[], list[int]]) -> list[int]:
        """Append frames by calling ``write``, which returns their positions, and register them.
        Raises :exc:`TenantClosed`."""
        state = self._tenant(tenant)
        with state.lock:
            if state.closed:
                raise TenantClosed(tenant)
            positions = write()
            self._register(state, positions)
        return positions

    def register(self, tenant: str, positions: Iterable[int]) -> None:
        """Note frames as appended and not folded."""
        self._register(self._tenant(tenant), positions)

    def _register(self, state: _Tenant, positions: Iterable[int]) -> None:
        with self._lock:
            for position in positions:
                state.pending[position] = None
                state.last = max(state.last, position)

    def folded(self, tenant: str, positions: Iterable[int]) -> None:
        """Note frames as folded, or as kept elsewhere (a dead letter)."""
        state = self._tenant(tenant)
        with self._lock:
            for position in positions:
                state.pending.pop(position, None)

    def any_pending(self, tenant: str, positions: Iterable[int]) -> bool:
        """Whether at least one of the frames is appended but not folded."""
        state = self._tenant(tenant)
        with self._lock:
            return any(position in state.pending for position in positions)

    def restore(self, tenant: str, last: int, pending: Iterable[int]) -> None:
        """Set the state saved in a checkpoint."""
        state = self._tenant(tenant)
        with self._lock:
            state.last = last
            state.pending = dict.fromkeys(pending)

    def snapshot(self) -> dict[str, tuple[int, list[int]]]:
        """``(last, pending)`` by tenant."""
        with self._lock:
            return {
                tenant: (state.last, list(state.pending))
                for tenant, state in self._tenants.items()
                if state.last
            }

    def close(self, tenant: str) -> None:
        """Stop appending frames for a tenant. Blocks while one is being appended."""
        state = self._tenant(tenant)
        with state.lock:
            state.closed = True

    def reopen(self, tenant: str) -> None:
        """Allow appending frames for a tenant again."""
        self._tenant(tenant).closed = False

    def waiting(self, tenant: str) -> int:
        """How many of the tenant's frames are appended but not folded."""
        state = self._tenant(tenant)
        with self._lock:
            return len(state.pending)

    def forget(self, tenant: str) -> None:
        """Forget a deleted tenant, except that it is closed."""
        state = self._tenant(tenant)
        with self._lock:
            state.last = 0
            state.pending.clear()
            if not state.closed:
                del self._tenants[tenant]

    def _tenant(self, tenant: str) -> _Tenant:
        state = self._tenants.get(tenant)
        if state is None:
            with self._lock:
                state = self._tenants.setdefault(tenant, _Tenant())
        return state


class InFlight:
    """Work that left the traces and is not stored yet, by ticket. ``left`` is called with each
    returned ticket."""

    def __init__(self, left: Callable[[int], object] = lambda ticket: None) -> None:
        self.left = left
        self._lock = threading.Lock()
        self._next = 1
        self._open: dict[int, int] = {}  # ascending; value: time of entry
        self._left = trio.lowlevel.ParkingLot()

    def enter(self) -> int:
        """A new ticket for a piece of work. May be called from any thread."""
        with self._lock:
            ticket = self._next
            self._next += 1
            self._open[ticket] = time.monotonic_ns()
            return ticket

    def leave(self, ticket: int) -> None:
        """Return a ticket: its work is stored, or kept as a dead letter. Idempotent; call it on the
        Trio thread."""
        with self._lock:
            known = ticket in self._open
            self._open.pop(ticket, None)
        if known:
            self.left(ticket)
            self._left.unpark_all()

    def mark(self) -> int:
        """A number larger than all tickets so far."""
        with self._lock:
            return self._next

    async def wait(self, mark: int) -> None:
        """Return when all work with a ticket below ``mark`` is done."""
        while (oldest := self._oldest()) is not None and oldest < mark:
            await self._left.park()
        await trio.lowlevel.checkpoint()

    def oldest_ns(self) -> int:
        """Age of the oldest piece of work in nanoseconds, 0 without any."""
        with self._lock:
            entered = next(iter(self._open.values()), None)
        return 0 if entered is None else time.monotonic_ns() - entered

    def _oldest(self) -> int | None:
        with self._lock:
            return next(iter(self._open), None)

    def __len__(self) -> int:
        return len(self._open)
