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
EARLY_BURST_NS = 100_000_000
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
        burst_ns: int = EARLY_BURST_NS,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        remembered: int = REMEMBERED,
    ) -> None:
        self._share = share
        self._burst_ns = burst_ns
        self._clock_ns = clock_ns
        self._remembered = remembered
        self._left_ns = burst_ns  # whole numbers, so that looking more often changes nothing
        self._since_ns = clock_ns()
        self._known: dict[TraceKey, tuple[int, frozenset[int]]] = {}  # oldest first
        self._lock = threading.Lock()

    def chosen(self, due: DueTraces, wanted: Mapping[int, list[int]]) -> dict[int, list[int]]:
        """The rules to be judged now, by trace. The same again until :meth:`note`."""
        with self._lock:
            now = self._clock_ns()
            earned = int(self._share * (now - self._since_ns))
            self._left_ns = min(self._burst_ns, self._left_ns + earned)
            self._since_ns = now
            left = self._left_ns
            found: dict[int, list[int]] = {}
            for k, numbers in wanted.items():
                if left <= 0:
                    break
                spans = int(due.rows[k, SPANS])
                before, broken = self._known.get(_key(due, k), (0, frozenset()))
                rest = [number for number in numbers if number not in broken]
                if rest and spans >= before + max(1, before // 8 if before > LONG else 1):
                    found[k] = rest
                    left -= self._expected_ns(due, k)
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
            self._left_ns -= self._cost_ns(due, read, seconds)
            for k, rules in new.items():
                key = _key(due, k)
                _, broken = self._known.pop(key, (0, frozenset()))
                self._known[key] = int(due.rows[k, SPANS]), broken | rules
            while len(self._known) > self._remembered:
                del self._known[next(iter(self._known))]

    def _expected_ns(self, due: DueTraces, k: int) -> int:
        """What reading a trace will cost by the clock; 0 if only the time it took tells."""
        return 0

    def _cost_ns(self, due: DueTraces, read: Iterable[int], seconds: float) -> int:
        """What reading traces has cost by the clock."""
        return int(1e9 * seconds)

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
