"""Puts the spans of a batch into columns: each trace's spans once, in order, with their parents."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from betrace.service.otlp.columns import (
    END,
    FLAGS,
    HAS_PARENT,
    PARENT_ID,
    SPAN_ID,
    START,
    Rows,
    SpanBatch,
)
from betrace.service.rules.columns import Names, SpanColumns, TraceColumns, TraceId
from betrace.service.rules.read_kernels import find_parents, number_names, number_traces

_SECRET = np.array([secrets.randbits(63) | 1 for _ in range(2)], np.int64)


def columns_of(batch: SpanBatch, wanted: Sequence[TraceId]) -> TraceColumns:
    """The traces with these ids, numbered in this order. The spans of the batch are in order of
    arrival."""
    count = len(batch)
    numbers, rows, parents = (np.empty(count, np.int64) for _ in range(3))
    names = Names()
    with np.errstate(over="ignore"):  # hashes wrap around, which warns with the JIT off
        ids = np.array(wanted, np.int64).reshape(-1, 2)
        number_traces(batch.spans, ids, _SECRET, _table(len(wanted)), numbers)
        filled = find_parents(batch.spans, numbers, _SECRET, _table(count), rows, parents)
        rows = rows[:filled]
        chosen = batch.spans[rows]
        order = np.lexsort((chosen[:, SPAN_ID].view(np.uint64), chosen[:, START], numbers[rows]))
        rows, chosen = rows[order], chosen[order]
        name = _number_names(batch, rows, names)
    place = np.full(count + 1, -1)  # of each row; the last item is that of row -1
    place[rows] = np.arange(filled)
    spans = SpanColumns(
        of=numbers[rows],
        row=rows,
        name=name,
        start=chosen[:, START],
        end=chosen[:, END],
        id=chosen[:, SPAN_ID],
        parent_id=chosen[:, PARENT_ID],
        below=(chosen[:, FLAGS] & HAS_PARENT) // HAS_PARENT,
        parent=place[parents[rows]],
    )
    return TraceColumns(batch, names, np.array(spans), len(wanted))


def _number_names(batch: SpanBatch, rows: Rows, names: Names) -> Rows:
    out, firsts = (np.empty(len(rows), np.int64) for _ in range(2))
    table = _table(len(rows))
    found = number_names(batch.buf, batch.spans, rows, _SECRET, table, firsts, out)
    names.texts += [batch.name(row) for row in firsts[:found].tolist()]
    return out


def _table(entries: int) -> Rows:
    """An empty hash table."""
    return np.zeros(1 << max(1, 2 * entries).bit_length(), np.int64)
