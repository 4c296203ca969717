"""Frames of the log of which only a part is in the traces: a fold stopped in the middle of them.

What stops a fold is rare (memory that is short, a bug), what it has done cannot be taken back, and
its batch is delivered again: by the stage a moment later, from a dead letter hours later, or from
the log after a crash, then perhaps together with other frames. So what is left is known by frame
and by row of the frame, beside the traces and in the same checkpoint: whoever brings the frame,
exactly the rest of it is folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from betrace.service.otlp.columns import BODY, Bytes, SpanBatch

MOST_FRAMES = 100_000
"""Of a tenant; beyond them the oldest are forgotten. Frames whose rest was discarded with its dead
letter stay until then."""

Ask = tuple[int, str | None]
"""A row and a check whose predicate is yet to be compared with it; None: all that have patterns."""


class Rest(NamedTuple):
    """Of one frame, by row in it: the spans that are in no trace, and of those that are, what is
    yet to be compared."""

    rows: list[int]
    asks: list[Ask]


class UnfinishedFrames:
    """Those of one tenant, by position in the log."""

    def __init__(self) -> None:
        self._frames: dict[int, Rest] = {}

    def __len__(self) -> int:
        return len(self._frames)

    def rest(self, batch: SpanBatch) -> tuple[Bytes, list[Ask]]:
        """What is left of a batch: 1 for each row that is in a trace already, and what is to be
        compared."""
        skip = np.zeros(len(batch), np.uint8)
        asks: list[Ask] = []
        for position, first, end in _frames(batch) if self._frames else ():
            rest = self._frames.get(position)
            if rest is not None:
                skip[first:end] = 1
                skip[[first + row for row in rest.rows]] = 0
                asks += [(first + row, check) for row, check in rest.asks]
        return skip, asks

    def note(self, batch: SpanBatch, skip: Bytes, asks: list[Ask]) -> None:
        """A fold of a batch stopped: ``skip`` and ``asks`` say what is left, as :meth:`rest` does.
        Frames without a position cannot be noted."""
        for position, first, end in _frames(batch):
            rows = np.flatnonzero(skip[first:end] == 0).tolist()
            own = [(row - first, check) for row, check in asks if first <= row < end]
            if len(rows) < end - first or own:
                self._frames[position] = Rest(rows, own)
            else:
                self._frames.pop(position, None)
        for position in sorted(self._frames)[: max(0, len(self._frames) - MOST_FRAMES)]:
            del self._frames[position]

    def took(self, batch: SpanBatch, taken: npt.NDArray[np.bool_]) -> None:
        """Rows of a batch are in their traces, with all that was to be compared."""
        for position, first, _ in _frames(batch) if self._frames else ():
            rest = self._frames.get(position)
            if rest is not None:
                rows = [row for row in rest.rows if not taken[first + row]]
                asks = [ask for ask in rest.asks if not taken[first + ask[0]]]
                self._frames[position] = Rest(rows, asks)

    def done(self, batch: SpanBatch) -> None:
        """All of a batch is in the traces."""
        for position, _, _ in _frames(batch) if self._frames else ():
            self._frames.pop(position, None)

    def saved(self) -> list[list[Any]]:
        """All of it as JSON."""
        return [[position, *rest] for position, rest in self._frames.items()]

    def restore(self, saved: list[list[Any]]) -> None:
        """Take in what :meth:`saved` gave."""
        for position, rows, asks in saved:
            self._frames[position] = Rest(list(rows), [(row, check) for row, check in asks])


class Unfinished:
    """Those of all tenants. Not thread-safe: one thread at a time."""

    def __init__(self) -> None:
        self._tenants: dict[str, UnfinishedFrames] = {}

    def of(self, tenant: str) -> UnfinishedFrames:
        """Those of a tenant; always the same object."""
        return self._tenants.setdefault(tenant, UnfinishedFrames())

    def forget(self, tenant: str) -> None:
        """Forget a tenant."""
        self._tenants.pop(tenant, None)

    def saved(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {tenant: frames.saved() for tenant, frames in self._tenants.items() if len(frames)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take in what :meth:`saved` gave."""
        for tenant, frames in saved.items():
            self.of(tenant).restore(frames)


def _frames(batch: SpanBatch) -> Iterator[tuple[int, int, int]]:
    """Position, first row and row after the last of each frame; rows are in the frames' order."""
    numbers = np.arange(len(batch.positions) + 1)
    bounds = np.searchsorted(batch.spans[:, BODY], numbers).tolist()
    for number, position in enumerate(batch.positions.tolist()):
        if position > 0:
            yield position, bounds[number], bounds[number + 1]
