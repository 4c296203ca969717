"""Log lines for requests that clients must change, so that the operator sees them too."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from betrace.service.telemetry import events

# Statuses that need a change at the client. Other refusals have events of their own.
STATUSES: Final = frozenset({400, 401, 403, 404, 405, 415, 505})

_QUIET_SECONDS: Final = 60.0
_REMEMBERED: Final = 1000
_LINES: Final = 60  # in _QUIET_SECONDS, of all peers together


class ClientErrors:
    """Logs an error at most once a minute for each kind and peer, with the number of repetitions
    since the last line. It remembers the last 1000 kinds and peers, and writes at most 60 lines a
    minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        self._window = clock()
        self._lines = 0

    def __len__(self) -> int:
        """How many kinds and peers are remembered."""
        return len(self._seen)

    def note(self, kind: str, peer: str, message: str) -> None:
        """Log that ``peer`` made an error of ``kind``; ``message`` says what to do."""
        now = self._clock()
        last, more = self._seen.pop((kind, peer), (-_QUIET_SECONDS, 0))
        if now - last < _QUIET_SECONDS or not self._may_write(now):
            self._seen[kind, peer] = (last, more + 1)
        else:
            self._seen[kind, peer] = (now, 0)
            if not message.isprintable():  # parts of it are the client's: no line breaks in the log
                message = "".join(c if c.isprintable() else "?" for c in message)
            again = f" ({more} more since the last line)" if more else ""
            events.CLIENT_ERROR(peer=peer, kind=kind, message=message, again=again)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def _may_write(self, now: float) -> bool:
        if now - self._window >= _QUIET_SECONDS:
            self._window = now
            self._lines = 0
        self._lines += 1
        return self._lines <= _LINES
