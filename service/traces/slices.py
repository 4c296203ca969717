"""Slices of CPU time: how long a fold may run before other tenants have their turn."""

from __future__ import annotations

import time


class SliceOver(Exception):  # noqa: N818
    """The slice is used up. The fold stopped where it was, and can continue later."""


class CpuSlice:
    """CPU seconds of the calling thread, from its creation on.

    A slice that is not ``certain`` allows no step that may exceed it. A ``certain`` one allows one
    such step, so that each slice makes some progress.
    """

    __slots__ = ("_certain", "_started", "_until")

    def __init__(self, seconds: float, *, certain: bool = False) -> None:
        self._certain = certain
        self._started = time.thread_time()
        self._until = self._started + seconds

    @property
    def used(self) -> float:
        """CPU seconds used so far."""
        return time.thread_time() - self._started

    def pay(self, seconds: float = 0.0) -> None:
        """Call this before a step that may take ``seconds``. Raises :exc:`SliceOver`."""
        if time.thread_time() + seconds > self._until:
            if not self._certain:
                raise SliceOver
            self._certain = False
