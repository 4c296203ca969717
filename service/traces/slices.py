"""Slices of CPU time: how long a fold may run before other tenants have their turn."""

from __future__ import annotations

import math
import time

from betrace.service.rules.patterns import SearchStopped

_SHORT = 0.001


class SliceOver(SearchStopped):
    """The slice is used up. The fold stopped where it was, and can continue later. If it stopped
    before a long search, ``work`` does this search and remembers its result; it may be called in
    another thread while nobody folds for this tenant."""


class CpuSlice:
    """CPU seconds of the calling thread, from its creation on.

    A slice that is not ``certain`` allows no step that may exceed it. A ``certain`` one allows one
    such step, so that each slice makes some progress; but none that may take longer than
    ``longest`` seconds.
    """

    __slots__ = ("_began", "_certain", "_longest", "_seconds", "_started")

    def __init__(self, seconds: float, *, certain: bool = False, longest: float = math.inf) -> None:
        self._certain = certain
        self._longest = longest
        self._seconds = seconds
        # The CPU time is at most the time that has passed, and reading it costs fifteen times as
        # much, because it is a system call.
        self._began = time.perf_counter()
        self._started = time.thread_time()

    @property
    def used(self) -> float:
        """CPU seconds used so far; a time below a millisecond is an upper bound."""
        passed = time.perf_counter() - self._began
        return passed if passed < _SHORT else time.thread_time() - self._started

    def pay(self, seconds: float = 0.0) -> None:
        """Call this before a step that may take ``seconds``. Raises :exc:`SliceOver`."""
        if time.perf_counter() - self._began + seconds <= self._seconds:
            return
        if time.thread_time() - self._started + seconds > self._seconds:
            if not self._certain or seconds > self._longest:
                raise SliceOver
            self._certain = False
