"""Marks the signals of incomplete traces: those whose spans name a parent that never came.

Traces that were read to judge them are known. Of the others, only those with new signals are looked
at, because that means reading them back from the log. Reading takes a limited share of time; beyond
it, signals are passed on without the mark. Rules that skip incomplete traces do not depend on this:
:mod:`betrace.service.traces.relational` decides them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from betrace.channels import ThreadRunner, ThreadTimeout
from betrace.service.pipeline.read_back import ReadBack
from betrace.service.signals import Kind, Signal
from betrace.service.traces.layout import LO
from betrace.service.traces.verdicts import Decided, marked_incomplete

_log = logging.getLogger("service.incomplete")

SHARE = 0.05  # of the time that passes
BURST_SECONDS = 1.0
TIMEOUT_SECONDS = 5.0


class IncompleteTraces:
    """Looks for missing parents. ``clock`` is in seconds."""

    def __init__(
        self,
        threads: ThreadRunner,
        read_back: ReadBack,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threads = threads
        self._read_back = read_back
        self._clock = clock
        self._left = BURST_SECONDS
        self._since = clock()
        self.unmarked = 0
        """Traces with signals for which there was no time to look."""

    async def mark(self, found: Sequence[Decided]) -> None:
        """Mark the raised signals of closed traces, in place."""
        for decided in found:
            numbers = _mark_known(decided)
            if not numbers:
                continue
            if not self._time_left():
                self.unmarked += len(numbers)
                continue
            began = self._clock()
            try:
                missing = await self._threads.run(
                    _missing,
                    decided,
                    numbers,
                    self._read_back,
                    timeout=TIMEOUT_SECONDS,
                    abandon_on_cancel=True,
                )
            except (ThreadTimeout, OSError) as error:
                self.unmarked += len(numbers)
                _log.warning("signals are not marked as incomplete: %s", error)
            else:
                _mark(decided, missing)
            finally:
                self._left -= self._clock() - began

    def _time_left(self) -> bool:
        now = self._clock()
        self._left = min(BURST_SECONDS, self._left + SHARE * (now - self._since))
        self._since = now
        return self._left > 0


def mark_now(decided: Decided, read_back: ReadBack) -> None:
    """Mark the raised signals of closed traces, in place. Blocks, for as long as it takes."""
    if numbers := _mark_known(decided):
        _mark(decided, _missing(decided, numbers, read_back))


def _mark_known(decided: Decided) -> list[int]:
    """Mark the signals of traces that were read to judge them. Returns the numbers of the others
    that have new signals."""
    numbers, closed = _numbers(decided), decided.closed
    if closed is None or not decided.missing:
        return numbers
    known = [k for k in numbers if k in decided.missing]
    _mark(decided, {closed.trace_id(k): n for k in known if (n := decided.missing[k])})
    return [k for k in numbers if k not in decided.missing]


def _numbers(decided: Decided) -> list[int]:
    """The numbers of the closed traces that have new signals."""
    wanted = {each.trace_id for each in decided.signals if _new_at_close(each)}
    closed = decided.closed
    if closed is None or not wanted:
        return []
    halves = np.array([int(trace_id[16:], 16) for trace_id in wanted], np.uint64)
    near = np.flatnonzero(np.isin(closed.rows[:, LO], halves.view(np.int64))).tolist()
    return [k for k in near if closed.trace_id(k) in wanted]


def _missing(decided: Decided, numbers: list[int], read_back: ReadBack) -> dict[str, int]:
    """How many parents are missing, by trace id, of incomplete traces that can be read."""
    closed = decided.closed
    assert closed is not None
    return {
        closed.trace_id(k): whole.missing_parents
        for round_ in read_back.traces(closed, numbers)
        for k, whole in round_
        if not isinstance(whole, str) and whole.missing_parents
    }


def _mark(decided: Decided, missing: dict[str, int]) -> None:
    if missing:
        decided.signals = [
            marked_incomplete(each, missing[each.trace_id])
            if each.trace_id in missing and _new_at_close(each)
            else each
            for each in decided.signals
        ]


def _new_at_close(signal: Signal) -> bool:
    return signal.kind is Kind.RAISED and not signal.early
