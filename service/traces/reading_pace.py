"""Which open traces are read to judge relational rules early, so that it costs little."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from betrace.service.traces.decide import Breach
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import HI, LO, SPANS

REMEMBERED = 100_000  # open traces that were read
EARLY_SHARE = 0.02  # of a core, for reading open traces
EARLY_BURST = 0.1  # seconds
LONG = 1000  # spans

TraceKey = tuple[str, int, int]
"""The tenant and the halves of the trace id."""


class ReadingPace:
    """Chooses which open traces are read, so that reading them takes a small share of the time.

    A trace is read again when it has grown, a long one when it has grown by an eighth. A rule that
    it broke before is not judged again.
    """

    def __init__(
        self,
        share: float = EARLY_SHARE,
        burst: float = EARLY_BURST,
        clock: Callable[[], float] = time.monotonic,
        remembered: int = REMEMBERED,
    ) -> None:
        self._share = share
        self._burst = burst
        self._clock = clock
        self._remembered = remembered
        self._left = burst
        self._since = clock()
        self._known: dict[TraceKey, tuple[int, frozenset[int]]] = {}  # oldest first
        self._lock = threading.Lock()

    def chosen(self, due: DueTraces, wanted: Mapping[int, list[int]]) -> dict[int, list[int]]:
        """The rules to be judged now, by trace. The same again until :meth:`note`."""
        with self._lock:
            now = self._clock()
            self._left = min(self._burst, self._left + self._share * (now - self._since))
            self._since = now
            left = self._left
            found: dict[int, list[int]] = {}
            for k, numbers in wanted.items():
                if left <= 0:
                    break
                spans = int(due.rows[k, SPANS])
                before, broken = self._known.get(_key(due, k), (0, frozenset()))
                rest = [number for number in numbers if number not in broken]
                if rest and spans >= before + max(1, before // 8 if before > LONG else 1):
                    found[k] = rest
                    left -= self._expected(due, k)
            return found

    def note(
        self,
        due: DueTraces,
        read: Mapping[int, Sequence[int]],
        breaches: Iterable[Breach],
        seconds: float,
    ) -> None:
        """Note the traces that were read, the rules that they broke, and the CPU time it took."""
        new: dict[int, set[int]] = {k: set() for k in read}
        for each in breaches:
            new.setdefault(each.trace, set()).add(each.rule)
        with self._lock:
            self._left -= sum(self._expected(due, k) for k in read) or seconds
            for k, rules in new.items():
                key = _key(due, k)
                _, broken = self._known.pop(key, (0, frozenset()))
                self._known[key] = int(due.rows[k, SPANS]), broken | rules
            while len(self._known) > self._remembered:
                del self._known[next(iter(self._known))]

    def _expected(self, due: DueTraces, k: int) -> float:
        """What reading a trace costs, in the clock's seconds; 0 if only the time it took tells."""
        return 0.0

    def closed(self, due: DueTraces, traces: Iterable[int]) -> None:
        """Forget traces that are closed."""
        with self._lock:
            if self._known:
                for k in traces:
                    self._known.pop(_key(due, k), None)

    def forget(self, tenant: str) -> None:
        """Forget a tenant."""
        with self._lock:
            for key in [key for key in self._known if key[0] == tenant]:
                self._known.pop(key, None)


def _key(due: DueTraces, k: int) -> TraceKey:
    return due.tenant, int(due.rows[k, HI]), int(due.rows[k, LO])
