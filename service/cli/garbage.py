"""Garbage collection without long pauses.

A full collection visits every object while nothing else runs: 0.35 s with the rules of 500 tenants
(700 000 objects). But nearly all of them live long. Objects that survive a full collection are
frozen here (``gc.freeze``), so the next one visits only what has become old since. Frozen cycles
that die are never found, so once the number of frozen objects has doubled, the next full
collection visits everything.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GROWTH = 2
LEAST = 200_000
"""Below this many frozen objects, visiting everything is not worthwhile."""


class _Freezer:
    """Freezes the survivors of full collections, up to a number that makes it visit them again."""

    def __init__(self) -> None:
        self._most = LEAST
        self._thorough = True  # whether the next full collection visits everything

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        """Called by the collector before and after each collection."""
        if phase != "stop" or info["generation"] != 2:
            return
        gc.freeze()
        count = gc.get_freeze_count()
        if self._thorough:
            self._most = max(LEAST, GROWTH * count)
            self._thorough = False
        elif count > self._most:
            gc.unfreeze()
            self._thorough = True


@contextmanager
def short_pauses() -> Iterator[None]:
    """Keep most full collections of this process short."""
    freezer = _Freezer()
    gc.callbacks.append(freezer)
    try:
        yield
    finally:
        gc.callbacks.remove(freezer)
        gc.unfreeze()
