"""Puts the spans of a batch into columns: each trace's spans once, in order, with their parents."""

from __future__ import annotations

from collections.abc import Sequence

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
from betrace.service.rules.columns import Names, Spans, TraceColumns, TraceId


def columns_of(batch: SpanBatch, wanted: Sequence[TraceId]) -> TraceColumns:
    """The traces with these ids, numbered in this order. The spans of the batch are in order of
    arrival."""
    traces = {each: number for number, each in enumerate(wanted)}
    pairs = batch.spans[:, [TRACE_HI, TRACE_LO]].tolist()
    of = np.array([traces.get((hi, lo), -1) for hi, lo in pairs], np.int64)
    row = np.flatnonzero(of >= 0)
    of, rows = of[row], batch.spans[row]
    ids, inverse = np.unique(
        np.concatenate((rows[:, SPAN_ID], rows[:, PARENT_ID])), return_inverse=True
    )
    own, above = (of * len(ids) + each for each in np.split(inverse, 2))
    own, first = np.unique(own, return_index=True)  # of copies the first
    order = np.lexsort((rows[first, SPAN_ID].view(np.uint64), rows[first, START], of[first]))
    chosen = first[order]
    row, of, rows, above = row[chosen], of[chosen], rows[chosen], above[chosen]
    place = np.empty(len(own), np.int64)
    place[order] = np.arange(len(own))
    at = np.searchsorted(own, above)
    at[at == len(own)] = 0
    below = rows[:, FLAGS] & HAS_PARENT != 0
    with_parent = below & (rows[:, PARENT_ID] != 0) & (rows[:, PARENT_ID] != rows[:, SPAN_ID])
    if len(own):
        parent = np.where(with_parent & (own[at] == above), place[at], -1)
    else:
        parent = np.zeros(0, np.int64)
    names = Names()
    return TraceColumns(
        batch,
        names,
        Spans(
            of,
            row,
            _number_names(batch, rows, names),
            rows[:, START],
            rows[:, END],
            rows[:, SPAN_ID],
            rows[:, PARENT_ID],
            below,
            parent,
        ),
        len(wanted),
    )


def _number_names(batch: SpanBatch, rows: Rows, names: Names) -> Rows:
    data = batch.buf.tobytes()
    known: dict[bytes, int] = {}
    numbers = []
    for at, length in rows[:, [NAME_OFF, NAME_LEN]].tolist():
        encoded = data[at : at + length]
        number = known.get(encoded)
        if number is None:
            number = known[encoded] = len(known)
            names.texts.append(encoded.decode())
        numbers.append(number)
    return np.array(numbers, np.int64)
