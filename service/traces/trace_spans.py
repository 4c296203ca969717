"""Spans of whole traces from scanned batches, for relational rules."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from betrace.service.otlp.columns import NAME_LEN, NAME_OFF, TRACE_HI, TRACE_LO, SpanBatch
from betrace.service.rules.trace_tree import TraceSpan

TraceId = tuple[int, int]
"""The halves of a trace id, as rows contain them."""


def trace_spans(
    batch: SpanBatch, wanted: Collection[TraceId]
) -> Iterator[tuple[TraceId, TraceSpan]]:
    """The spans of the wanted traces in a batch, in order of arrival. They keep the batch in
    memory."""
    if not len(batch):
        return
    rows = np.flatnonzero(np.isin(batch.spans[:, TRACE_LO], [lo for _, lo in wanted]))
    buf = batch.buf.tobytes()
    for row, values in zip(rows.tolist(), batch.spans[rows].tolist(), strict=True):
        trace = (values[TRACE_HI], values[TRACE_LO])
        if trace in wanted:
            start = values[NAME_OFF]
            name = buf[start : start + values[NAME_LEN]].decode()
            yield trace, TraceSpan(batch, row, values, name)
