"""The client of a ledger: one at a time, replaced when one of its calls hangs.

A call into a library cannot be cancelled. The caller gives up after a while and leaves the thread
behind with its client; the next call gets a new client. A client is closed exactly once, by the
thread whose call returns last, so never during a call.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from betrace.service.storage.ledger.base import ClientCounts, LedgerError

C = TypeVar("C")

_log = logging.getLogger("service.ledger")

MOST_LEFT_BEHIND = 8
"""Clients that may hang at the same time; with so many, calls fail immediately."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0


@dataclass(eq=False, slots=True)
class _ClientInUse(Generic[C]):
    client: C
    calls: int = 0
    retired: bool = False


@dataclass(eq=False)
class Clients(Generic[C]):
    """The client in use. Methods may be called from any thread; :meth:`replace` never waits.

    Args:
      make: makes a client.
      dispose: closes a client; called once for each, never during one of its calls.
      pause: seconds between a replacement and the next client; doubled for each consecutive
        replacement, up to a minute, and reset by a call that succeeds.
    """

    make: Callable[[], C]
    dispose: Callable[[C], None]
    pause: float = FIRST_PAUSE
    counts: ClientCounts = field(default_factory=ClientCounts)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._making = threading.Lock()
        self._current: _ClientInUse[C] | None = None
        self._closed = False
        self._in_a_row = 0
        self._not_before = 0.0
        self._given_up_at = -math.inf

    @contextmanager
    def use(self) -> Iterator[C]:
        """The client for one call. Raises :exc:`LedgerError` (permanent when closed, transient when
        too many clients hang or a new one must wait), and what ``make`` raises."""
        used = self._take()
        try:
            yield used.client
        finally:
            self._release(used)

    def left(self, client: C) -> bool:
        """Whether ``client`` was given up, so that nobody waits for its calls."""
        with self._changed:
            return self._current is None or self._current.client is not client

    def succeeded(self) -> None:
        """Note that a call succeeded: resets the pause before the next replacement."""
        self._in_a_row = 0

    def replace(self, since: float) -> None:
        """Give up the client of a call that began at ``since`` (``time.monotonic``) or soon after
        and was left behind. Does nothing if a client was given up since then (it was that one), or
        if the client has no call."""
        with self._changed:
            used = self._current
            if used is not None and used.calls and self._given_up_at <= since:
                self._retire(used)

    def discard(self, client: C) -> None:
        """Give up ``client``, which is dead; the next call gets a new one."""
        with self._changed:
            used = self._current
            if used is not None and used.client is client:
                self._retire(used)

    def close(self, seconds: float) -> bool:
        """Refuse new calls, wait up to ``seconds`` for running ones, and close the client in a
        thread of its own, for up to ``seconds`` more. Returns whether it was closed; a client that
        hangs is left to its thread. Idempotent."""
        with self._changed:
            self._closed = True
            used = self._current
            if used is None:
                return True
            self._changed.wait_for(lambda: used.calls == 0, seconds)
            if self._current is not used:  # another thread closes it, or it was given up
                return used.calls == 0
            self._current = None
            if used.calls:
                used.retired = True
                self.counts.left_behind += 1
                return False
        thread = threading.Thread(target=self.dispose, args=(used.client,), daemon=True)
        thread.start()
        thread.join(seconds)
        return not thread.is_alive()

    def _take(self) -> _ClientInUse[C]:
        with self._changed:
            if (used := self._usable()) is not None:
                used.calls += 1
                return used
        with self._making:  # making a client may take a while; replace() must not wait for it
            with self._changed:
                if (used := self._usable()) is not None:
                    used.calls += 1
                    return used
                if self.counts.left_behind >= MOST_LEFT_BEHIND:
                    raise LedgerError(
                        f"{self.counts.left_behind} clients hang; the ledger works again when one "
                        "of their calls returns: check the server and the disk",
                        transient=True,
                    )
                wait = self._not_before - time.monotonic()
            if wait > 0:
                raise LedgerError(
                    f"the client was given up; a new one is made in {wait:.1f} s", transient=True
                )
            used = _ClientInUse(self.make(), calls=1)
            with self._changed:
                if not self._closed:
                    self._current = used
                    return used
        self.dispose(used.client)
        raise _closed()

    def _usable(self) -> _ClientInUse[C] | None:
        if self._closed:
            raise _closed()
        return self._current

    def _release(self, used: _ClientInUse[C]) -> None:
        with self._changed:
            used.calls -= 1
            self._changed.notify_all()
            if used.calls or not used.retired:
                return
            self.counts.left_behind -= 1
        try:
            self.dispose(used.client)
        except Exception as error:  # it is given up, so nobody waits for it
            _log.warning("a client that was given up could not be closed: %s", error)

    def _retire(self, used: _ClientInUse[C]) -> None:
        """Give up the client; the caller holds the lock."""
        used.retired = True
        self._current = None
        self.counts.replaced += 1
        self.counts.left_behind += 1
        pause = min(self.pause * 2.0**self._in_a_row, LONGEST_PAUSE)
        self._in_a_row = min(self._in_a_row + 1, 30)
        self._given_up_at = time.monotonic()
        self._not_before = self._given_up_at + pause


def _closed() -> LedgerError:
    return LedgerError("the ledger is closed", transient=False)
