"""What ``OUT_p`` has beyond a snapshot, while a successor applies the log again.

The steps that ``OUT_p`` has are decided once more, with the same results, and these are not passed
on again. If the results differ anyway (another version of the program, frames that are no
longer in the log), then signals that ``OUT_p`` does not have are passed on, and those that were not
made again are given to the traces, which retract them unless they hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from betrace.service.cluster.output import Output
from betrace.service.signals import Signal
from betrace.service.traces.verdicts import Decided


class KnownOutput:
    """The signals and steps in ``OUT_p``. Not thread-safe."""

    def __init__(self) -> None:
        self.step = 0
        """The last step whose results ``OUT_p`` has completely."""
        self.upto = 0
        """The sequence of ``SPANS_p`` that was applied by then, when the owner took over."""
        self._until = 0  # the last step of which it has any result
        self._signals: dict[str, Signal] = {}  # not made again yet, by id
        self._unstored: deque[tuple[int, list[str]]] = deque()
        self._made: set[str] = set()  # before, and in ``OUT_p`` beyond the last snapshot's sequence

    def note(self, output: Output, step: int) -> list[Signal]:
        """Note an output; ``step`` is the last one of the state. Returns the signals that are still
        to be made."""
        if output.step <= step:
            return []
        self._until = max(self._until, output.step)
        if output.complete and output.step >= self.step:
            self.step, self.upto = output.step, output.upto
        found = [
            signal
            for decided in output.decided
            for signal in decided.signals
            if signal.id not in self._made
        ]
        self._signals.update((signal.id, signal) for signal in found)
        return found

    def is_ahead(self, step: int) -> bool:
        """Whether ``OUT_p`` has results of steps after this one."""
        return self._until > step

    def stored(self, step: int) -> None:
        """Note that the outputs up to a step are stored."""
        self.step = max(self.step, step)
        while self._unstored and self._unstored[0][0] <= step:
            self._unstored.popleft()

    def new(self, step: int, decided: Iterable[Decided]) -> list[Decided]:
        """What ``OUT_p`` does not have of the results of a step."""
        known = step <= self.step
        found = []
        for each in decided:
            signals = [signal for signal in each.signals if not self._is_known(signal)]
            if known:
                each = replace(each, signals=signals, closed=None, spilled=None)
            elif len(signals) < len(each.signals):
                each = replace(each, signals=signals)
            if each.signals or each.closed is not None or each.spilled is not None:
                found.append(each)
        ids = [signal.id for each in found for signal in each.signals]
        if ids:
            self._unstored.append((step, ids))
        return found

    def _is_known(self, signal: Signal) -> bool:
        known = self._signals.pop(signal.id, None) is not None
        if known:
            self._made.add(signal.id)
        return known

    def left_over(self, step: int) -> list[Signal] | None:
        """After the last step of which ``OUT_p`` has any result: the signals that were not made
        again. None after other steps."""
        if not self._until or step < self._until:
            return None
        left = list(self._signals.values())
        self._signals.clear()
        self._made.clear()
        self._until = 0
        return left

    def saved(self) -> list[str]:
        """The ids of signals that were made and may be among those noted after a snapshot."""
        return [*self._made, *(each for _, ids in self._unstored for each in ids)]

    def restore(self, saved: list[str], step: int) -> None:
        """Continue from what :meth:`saved` returned in a snapshot at ``step``."""
        self.step = step
        self._made = set(saved)
