"""Frames of the log that are only partly in the traces, because a fold stopped in the middle.

A fold rarely stops (memory ran out, or a bug), but what it has done cannot be undone, and its batch
is delivered again: by the stage a moment later, from a dead letter hours later, or from the log
after a crash, perhaps together with other frames. The remainder is therefore kept by frame and by
row of the frame, next to the traces and in the same checkpoint: whichever delivery brings the
frame, exactly its remainder is folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from betrace.service.otlp.columns import BODY, Bytes, Rows, SpanBatch

MOST_FRAMES = 100_000
"""Of a tenant; beyond them the oldest are forgotten. Frames whose remainder was discarded with its
dead letter stay until then."""

Ask = tuple[int, str | None]
"""A row, and a check whose predicate Python has yet to evaluate for it; None: all checks with a
pattern."""


class Remainder(NamedTuple):
    """What is left of one frame, by row of the frame. It is noted after each slice of a fold, so
    the rows of a large frame are an array."""

    rows: Rows
    """Spans that are in no trace, ascending."""
    asks: list[Ask]
    """Comparisons that are missing for spans that are in a trace."""


class TenantPartialFolds:
    """One tenant's partly folded frames, by position in the log."""

    def __init__(self) -> None:
        self._frames: dict[int, Remainder] = {}

    def __len__(self) -> int:
        return len(self._frames)

    def remainder(self, batch: SpanBatch) -> tuple[Bytes, list[Ask]]:
        """What is left of a batch: 1 for each row that is already in a trace, and the missing
        comparisons."""
        skip = np.zeros(len(batch), np.uint8)
        asks: list[Ask] = []
        for position, first, end in _frames(batch) if self._frames else ():
            left = self._frames.get(position)
            if left is not None:
                skip[first:end] = 1
                skip[left.rows + first] = 0
                asks += [(first + row, check) for row, check in left.asks]
        return skip, asks

    def stopped(self, batch: SpanBatch, skip: Bytes, asks: list[Ask]) -> None:
        """Note that a fold of a batch stopped; ``skip`` and ``asks`` say what is left, as in
        :meth:`remainder`. Frames without a position cannot be noted."""
        bodies: dict[int, list[Ask]] = {}
        for row, check in asks:
            bodies.setdefault(int(batch.spans[row, BODY]), []).append((row, check))
        for position, first, end in _frames(batch):
            rows = np.flatnonzero(skip[first:end] == 0)
            of_frame = bodies.get(int(batch.spans[first, BODY]), []) if first < end else []
            own = [(row - first, check) for row, check in of_frame]
            if len(rows) < end - first or own:
                self._frames[position] = Remainder(rows, own)
            else:
                self._frames.pop(position, None)
        for position in sorted(self._frames)[: max(0, len(self._frames) - MOST_FRAMES)]:
            del self._frames[position]

    def folded(self, batch: SpanBatch, taken: npt.NDArray[np.bool_]) -> None:
        """Note that these rows of a batch are in their traces, with all comparisons made."""
        for position, first, _ in _frames(batch) if self._frames else ():
            left = self._frames.get(position)
            if left is not None:
                rows = left.rows[~taken[left.rows + first]]
                asks = [ask for ask in left.asks if not taken[first + ask[0]]]
                self._frames[position] = Remainder(rows, asks)

    def done(self, batch: SpanBatch) -> None:
        """Note that a whole batch is in the traces."""
        for position, _, _ in _frames(batch) if self._frames else ():
            self._frames.pop(position, None)

    def saved(self) -> list[list[Any]]:
        """All frames as JSON: rows (position, rows, asks)."""
        return [
            [position, left.rows.tolist(), left.asks] for position, left in self._frames.items()
        ]

    def restore(self, saved: list[list[Any]]) -> None:
        """Add what :meth:`saved` returned."""
        for position, rows, asks in saved:
            left = [(row, check) for row, check in asks]
            self._frames[position] = Remainder(np.array(rows, np.int64), left)


class PartialFolds:
    """The partly folded frames of all tenants. Not thread-safe: use one thread at a time."""

    def __init__(self) -> None:
        self._tenants: dict[str, TenantPartialFolds] = {}

    def of(self, tenant: str) -> TenantPartialFolds:
        """Those of a tenant; always the same object."""
        return self._tenants.setdefault(tenant, TenantPartialFolds())

    def forget(self, tenant: str) -> None:
        """Forget a tenant."""
        self._tenants.pop(tenant, None)

    def saved(self) -> dict[str, Any]:
        """All of them as JSON, for a checkpoint."""
        return {tenant: frames.saved() for tenant, frames in self._tenants.items() if len(frames)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Add what :meth:`saved` returned."""
        for tenant, frames in saved.items():
            self.of(tenant).restore(frames)


def _frames(batch: SpanBatch) -> Iterator[tuple[int, int, int]]:
    """Position, first row, and row after the last of each frame; rows are in the frames' order."""
    numbers = np.arange(len(batch.positions) + 1)
    bounds = np.searchsorted(batch.spans[:, BODY], numbers).tolist()
    for number, position in enumerate(batch.positions.tolist()):
        if position > 0:
            yield position, bounds[number], bounds[number + 1]
