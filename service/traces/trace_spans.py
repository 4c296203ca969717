"""Spans of whole traces from scanned batches, for relational rules."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from betrace.service.otlp.columns import (
    END,
    FLAGS,
    HAS_PARENT,
    NAME_LEN,
    NAME_OFF,
    PARENT_ID,
    SPAN_ID,
    START,
    TRACE_HI,
    TRACE_LO,
    Rows,
    SpanBatch,
)
from betrace.service.rules.trace_tree import TraceSpan, span_message

TraceId = tuple[int, int]
"""The halves of a trace id, as rows contain them."""

_OTHER_LENGTH = "0" * 16  # of a parent id that is not 8 bytes long


def trace_spans(
    batch: SpanBatch, wanted: Collection[TraceId]
) -> Iterator[tuple[TraceId, TraceSpan]]:
    """The spans of the wanted traces in a batch, in order of arrival. They keep the batch in
    memory."""
    if not len(batch):
        return
    rows = np.flatnonzero(np.isin(batch.spans[:, TRACE_LO], [lo for _, lo in wanted]))
    found = batch.spans[rows]
    ids, parents = _hex(found[:, SPAN_ID]), _hex(found[:, PARENT_ID])
    buf = batch.buf.tobytes()
    names: dict[bytes, str] = {}
    columns = found[:, [TRACE_HI, TRACE_LO, FLAGS, NAME_OFF, NAME_LEN, START, END]].tolist()
    for k, (hi, lo, flags, at, length, start, end) in enumerate(columns):
        trace = (hi, lo)
        if trace not in wanted:
            continue
        encoded = buf[at : at + length]
        name = names.get(encoded)
        if name is None:
            name = names[encoded] = encoded.decode()
        row = int(rows[k])
        parent = ""
        if flags & HAS_PARENT:
            parent = parents[16 * k : 16 * k + 16]
            if parent == _OTHER_LENGTH:
                parent = span_message(batch, row).parent_span_id.hex()
        yield trace, TraceSpan(batch, row, ids[16 * k : 16 * k + 16], parent, name, start, end)


def _hex(ids: Rows) -> str:
    """Span ids as 16 hex digits each, one after another."""
    return ids.astype(">i8").tobytes().hex()
