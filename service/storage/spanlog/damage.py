"""Places of the span log that cannot be read, each counted once however often it is met."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from betrace.service.times import write_time

TORN = "torn frame, cut off"
"""The reason of a write that a crash interrupted. It was not answered, so nothing is lost."""
FILE_HEADER = "damaged file header"
"""The reason of a segment whose header is damaged; its frames can still be read."""
_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Skipped:
    """Bytes of a segment that hold no valid frame, and why.

    The lost requests were received between ``since_ns`` and ``until_ns``. ``spans`` is the number
    of their spans if the headers of all frames in it can still be read (``whole``); otherwise at
    least that many are lost.
    """

    tenant: str
    segment: int
    offset: int
    bytes: int
    reason: str
    spans: int = 0
    since_ns: int | None = None
    until_ns: int | None = None
    whole: bool = False

    @property
    def torn(self) -> bool:
        """Whether this is only the rest of an interrupted write."""
        return self.reason == TORN

    @property
    def lost(self) -> str:
        """What was lost, in words."""
        if self.torn or self.reason == FILE_HEADER:
            return "no spans"
        what = f"{self.spans} spans" if self.whole else "requests"
        if self.spans and not self.whole:
            what = f"at least {self.spans} spans"
        if self.since_ns is None or self.until_ns is None:
            return what
        since, until = sorted((self.since_ns, self.until_ns))
        return f"{what} received between {write_time(since)} and {write_time(until)}"


class Damage:
    """The damaged places that were found since the log was opened. Thread-safe."""

    def __init__(self) -> None:
        self.skipped: deque[Skipped] = deque(maxlen=_KEPT)
        """The last places, interrupted writes included."""
        self.places = 0
        self.bytes = 0
        self.spans = 0
        """At least so many spans are lost."""
        self._tenants: set[str] = set()
        self._lock = threading.Lock()

    @property
    def tenants(self) -> int:
        """How many tenants are affected."""
        return len(self._tenants)

    def add(self, found: Skipped) -> bool:
        """Count a place; returns whether it is new."""
        with self._lock:
            if any(_within(found, known) for known in self.skipped):
                return False
            self.skipped.append(found)
            if not found.torn:
                self.places += 1
                self.bytes += found.bytes
                self.spans += found.spans
                self._tenants.add(found.tenant)
        return True


def _within(found: Skipped, known: Skipped) -> bool:
    return (
        (found.tenant, found.segment) == (known.tenant, known.segment)
        and known.offset <= found.offset
        and found.offset + found.bytes <= known.offset + known.bytes
    )
