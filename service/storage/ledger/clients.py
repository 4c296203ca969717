"""The client of a ledger in use: one at a time, replaced when a call of it hangs.

A call into a library cannot be taken back. Who waits for one gives up after a while, and the thread
is left behind; its client is left to it, and the next call gets a new one. A client is closed once:
by the thread whose call is the last to return from it, so never while a call is on its way.
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

from betrace.service.storage.ledger.base import LedgerError

C = TypeVar("C")

_log = logging.getLogger("service.ledger")

MOST_LEFT_BEHIND = 8
"""Clients that hang at a time; while there are so many, calls fail at once."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0


@dataclass(eq=False, slots=True)
class _Held(Generic[C]):
    client: C
    calls: int = 0
    retired: bool = False


@dataclass(slots=True)
class ClientCounts:
    """What became of the clients of a ledger."""

    replaced: int = 0
    """Clients given up since the start."""
    left_behind: int = 0
    """Those whose call has not returned yet."""


@dataclass(eq=False)
class Clients(Generic[C]):
    """The client in use. Methods may be called from any thread; :meth:`replace` never waits.

    Args:
      make: a new client.
      dispose: closes one; never called twice for one, nor while a call of it runs.
      pause: seconds after a replacement until the next one is made; doubled for each in a row,
        up to a minute, and back to this by a call that succeeds.
    """

    make: Callable[[], C]
    dispose: Callable[[C], None]
    pause: float = FIRST_PAUSE
    counts: ClientCounts = field(default_factory=ClientCounts)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._making = threading.Lock()
        self._held: _Held[C] | None = None
        self._closed = False
        self._in_a_row = 0
        self._not_before = 0.0
        self._given_up_at = -math.inf

    @contextmanager
    def use(self) -> Iterator[C]:
        """The client for one call. Raises :exc:`LedgerError`, permanent when closed, transient when
        too many clients hang or a new one must wait, and what ``make`` raises."""
        held = self._take()
        try:
            yield held.client
        finally:
            self._give_back(held)

    def left(self, client: C) -> bool:
        """Whether ``client`` was given up: nobody waits for what its calls return."""
        with self._changed:
            return self._held is None or self._held.client is not client

    def succeeded(self) -> None:
        """A call did what it should: the next replacement need not wait long."""
        self._in_a_row = 0

    def replace(self, since: float) -> None:
        """A call that began at ``since`` (``time.monotonic``) or soon after was left behind: give
        its client up. If one was given up since then it was that, and one without a call does not
        hang."""
        with self._changed:
            held = self._held
            if held is not None and held.calls and self._given_up_at <= since:
                self._retire(held)

    def discard(self, client: C) -> None:
        """``client`` is dead: the next call gets a new one."""
        with self._changed:
            held = self._held
            if held is not None and held.client is client:
                self._retire(held)

    def close(self, seconds: float) -> bool:
        """Let no call begin, wait up to ``seconds`` for the one that runs, and close the client in
        a thread of its own, for up to as long again. Whether it was closed; a client that hangs is
        left to its thread. Twice does no harm."""
        with self._changed:
            self._closed = True
            held = self._held
            if held is None:
                return True
            self._changed.wait_for(lambda: held.calls == 0, seconds)
            if self._held is not held:  # another closes it, or it was given up
                return held.calls == 0
            self._held = None
            if held.calls:
                held.retired = True
                self.counts.left_behind += 1
                return False
        thread = threading.Thread(target=self.dispose, args=(held.client,), daemon=True)
        thread.start()
        thread.join(seconds)
        return not thread.is_alive()

    def _take(self) -> _Held[C]:
        with self._changed:
            if (held := self._current()) is not None:
                held.calls += 1
                return held
        with self._making:  # it may take a while, and replace() must not wait for it
            with self._changed:
                if (held := self._current()) is not None:
                    held.calls += 1
                    return held
                if self.counts.left_behind >= MOST_LEFT_BEHIND:
                    raise LedgerError(
                        f"{self.counts.left_behind} clients hang; the ledger works again when one "
                        "of their calls returns: check the server or the disk",
                        transient=True,
                    )
                wait = self._not_before - time.monotonic()
            if wait > 0:
                raise LedgerError(
                    f"the client was given up; another is made in {wait:.1f} s", transient=True
                )
            held = _Held(self.make(), calls=1)
            with self._changed:
                if not self._closed:
                    self._held = held
                    return held
        self.dispose(held.client)
        raise _closed()

    def _current(self) -> _Held[C] | None:
        if self._closed:
            raise _closed()
        return self._held

    def _give_back(self, held: _Held[C]) -> None:
        with self._changed:
            held.calls -= 1
            self._changed.notify_all()
            if held.calls or not held.retired:
                return
            self.counts.left_behind -= 1
        try:
            self.dispose(held.client)
        except Exception as error:  # it is given up: nobody can do anything about it
            _log.warning("a client that was given up could not be closed: %s", error)

    def _retire(self, held: _Held[C]) -> None:
        """Under the lock."""
        held.retired = True
        self._held = None
        self.counts.replaced += 1
        self.counts.left_behind += 1
        pause = min(self.pause * 2.0**self._in_a_row, LONGEST_PAUSE)
        self._in_a_row = min(self._in_a_row + 1, 30)
        self._given_up_at = time.monotonic()
        self._not_before = self._given_up_at + pause


def _closed() -> LedgerError:
    return LedgerError("the ledger is closed", transient=False)
