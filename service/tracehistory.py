"""What is known of a trace that was closed and forgotten: its row of the index, its frames in the
log. Late spans reopen it from there."""

from __future__ import annotations

import logging

import numpy as np

from service.otlp.columns import TRACE_HI, TRACE_LO, Rows
from service.recovery import read_frames
from service.storage.duck import DuckStore, PoolTimeout, StoreError
from service.storage.spanlog import Frame, SpanLog
from service.traces.tenant import Recalled

_log = logging.getLogger("service.history")

_MASK = 2**64 - 1

# Read for the late spans of one batch at most; traces beyond it are reopened as partial.
MAX_TRACES = 256
MAX_FRAMES = 1024
MAX_SPANS = 50_000


class TraceHistory:
    """Reads closed traces back. Called in the thread that folds; it blocks, so it is bounded."""

    def __init__(self, store: DuckStore, log: SpanLog, max_body_bytes: int) -> None:
        self._store = store
        self._log = log
        self._max_body = max_body_bytes
        self.recalled = 0
        """Traces that were reopened from the log."""
        self.partial = 0
        """Of them those not all of whose spans could be read."""
        self.unknown = 0
        """Traces asked for that the index does not have: new ones, mostly."""

    def load(self, tenant: str, ids: Rows) -> Recalled | None:
        """The traces (rows of hi, lo) that the index has, None if none.

        A trace counts as whole when all the spans that its row counts were read.
        """
        names = [f"{hi & _MASK:016x}{lo & _MASK:016x}" for hi, lo in ids[:MAX_TRACES].tolist()]
        try:
            found = self._store.find_traces(tenant, names)
        except (StoreError, PoolTimeout) as error:
            _log.warning("late spans of %s are judged without what came before: %s", tenant, error)
            found = {}
        known = [k for k, name in enumerate(names) if name in found]
        self.unknown += len(ids) - len(known)
        if not known:
            return None
        positions: dict[int, None] = {}
        for k in known:
            positions.update(dict.fromkeys(found[names[k]].positions))
        frames: list[Frame] = []
        read: list[int] = []
        spans = 0
        for position, frame in zip(
            list(positions)[:MAX_FRAMES],
            self._log.read_many(tenant, list(positions)[:MAX_FRAMES]),
            strict=True,
        ):
            if isinstance(frame, Frame) and spans + frame.spans <= MAX_SPANS:
                spans += frame.spans
                frames.append(frame)
                read.append(position)
        if not frames:
            return None
        batch = read_frames(tenant, read, frames, self._max_body)
        of = batch.spans[:, [TRACE_HI, TRACE_LO]]
        whole = []
        for k in known:
            row = found[names[k]]
            mine = int(np.count_nonzero((of == ids[k]).all(axis=1)))
            whole.append(not row.partial and mine >= row.spans)
        self.recalled += len(known)
        self.partial += whole.count(False)
        return Recalled(ids[known], whole, batch)
