"""How tenants share the query threads: one tenant may use half of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio


class TenantTurns:
    """Turns to use a thread. ``threads`` is how many there are; operators' calls (without a tenant)
    are not limited.

    A turn ends when its call returns, even if nobody waits for the result any more: a thread that
    was left behind still uses its tenant's share.
    """

    def __init__(self, threads: int) -> None:
        self._share = max(1, threads // 2)
        self._used: dict[str, trio.Semaphore] = {}
        self._token: trio.lowlevel.TrioToken | None = None

    async def take(self, tenant: str, timeout: float) -> Callable[[], None]:
        """Wait for a turn; returns a function that ends it, to be called from any thread.
        Raises :exc:`trio.TooSlowError` after ``timeout`` seconds."""
        if not tenant:
            return _nothing
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
        token = self._token
        turns = self._used.setdefault(tenant, trio.Semaphore(self._share))
        with trio.fail_after(timeout):
            await turns.acquire()

        ended: list[None] = []

        def end() -> None:
            if not ended:
                ended.append(None)
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(self._end, tenant, turns)

        return end

    def _end(self, tenant: str, turns: trio.Semaphore) -> None:
        turns.release()
        unused = turns.value == self._share and not turns.statistics().tasks_waiting
        if unused and self._used.get(tenant) is turns:
            del self._used[tenant]


def _nothing() -> None:
    return None
