"""Kernels that put the spans of a batch into columns (:mod:`betrace.service.rules.read_columns`).

Their hash tables have linear probing and a power of two as their length, at least twice the number
of entries. An entry is a number + 1; 0 is empty. ``secret`` is two random odd numbers, so that
nobody can choose ids that collide.
"""

from __future__ import annotations

from betrace.service.jit import lean_kernel
from betrace.service.otlp.columns import (
    FLAGS,
    HAS_PARENT,
    NAME_HASH,
    NAME_LEN,
    NAME_OFF,
    PARENT_ID,
    SPAN_ID,
    TRACE_HI,
    TRACE_LO,
    Bytes,
    Rows,
)
from betrace.service.otlp.primitives import same_bytes


@lean_kernel
def _place(secret: Rows, one: int, other: int, table: Rows) -> int:
    mixed = one * secret[0] + (other ^ (other >> 32)) * secret[1]
    place: int = ((mixed ^ (mixed >> 29)) * secret[0] >> 32) & (len(table) - 1)
    return place


@lean_kernel
def number_traces(spans: Rows, wanted: Rows, secret: Rows, table: Rows, out: Rows) -> None:
    """``out`` is the number of each span's trace, whose ids are the rows of ``wanted``, -1 for
    other traces."""
    for number in range(len(wanted)):
        i = _place(secret, wanted[number, 0], wanted[number, 1], table)
        while table[i] != 0:
            i = (i + 1) & (len(table) - 1)
        table[i] = number + 1
    for r in range(len(spans)):
        hi = spans[r, TRACE_HI]
        lo = spans[r, TRACE_LO]
        i = _place(secret, hi, lo, table)
        out[r] = -1
        while table[i] != 0:
            number = table[i] - 1
            if wanted[number, 0] == hi and wanted[number, 1] == lo:
                out[r] = number
                break
            i = (i + 1) & (len(table) - 1)


@lean_kernel
def _find_span(spans: Rows, of: Rows, trace: int, id: int, secret: Rows, table: Rows) -> int:
    """The place of a span in the table, or the empty one where it belongs."""
    i = _place(secret, id, trace, table)
    while table[i] != 0:
        row = table[i] - 1
        if of[row] == trace and spans[row, SPAN_ID] == id:
            break
        i = (i + 1) & (len(table) - 1)
    return i


@lean_kernel
def find_parents(
    spans: Rows, of: Rows, secret: Rows, table: Rows, rows: Rows, parents: Rows
) -> int:
    """Fill ``rows`` with the rows of the wanted spans (``of`` not -1), each once, and ``parents``
    with the row of the parent of each row, -1 without one. Returns the number of rows."""
    filled = 0
    for r in range(len(spans)):
        if of[r] >= 0:
            i = _find_span(spans, of, of[r], spans[r, SPAN_ID], secret, table)
            if table[i] == 0:
                table[i] = r + 1
                rows[filled] = r
                filled += 1
    for k in range(filled):
        r = rows[k]
        parents[r] = -1
        parent = spans[r, PARENT_ID]
        if spans[r, FLAGS] & HAS_PARENT and parent != 0 and parent != spans[r, SPAN_ID]:
            i = _find_span(spans, of, of[r], parent, secret, table)
            parents[r] = table[i] - 1
    return filled


@lean_kernel
def number_names(
    buf: Bytes, spans: Rows, rows: Rows, secret: Rows, table: Rows, firsts: Rows, out: Rows
) -> int:
    """``out[k]`` is the number of the name of the span in ``rows[k]``, and ``firsts`` has a row
    with each name. Returns the number of names."""
    names = 0
    for k in range(len(rows)):
        span = spans[rows[k]]
        i = _place(secret, span[NAME_HASH], span[NAME_LEN], table)
        while table[i] != 0:
            known = spans[firsts[table[i] - 1]]
            if (
                known[NAME_HASH] == span[NAME_HASH]
                and known[NAME_LEN] == span[NAME_LEN]
                and same_bytes(buf, known[NAME_OFF], buf, span[NAME_OFF], span[NAME_LEN])
            ):
                break
            i = (i + 1) & (len(table) - 1)
        if table[i] == 0:
            firsts[names] = rows[k]
            names += 1
            table[i] = names
        out[k] = table[i] - 1
    return names
