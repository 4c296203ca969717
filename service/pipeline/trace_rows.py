"""Closed traces as rows of the trace index, column by column, without Python code per trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.storage.duck.arrow import traces_table
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    ERRORS,
    FIRST_SEEN,
    FLAGS,
    HI,
    LAST_SEEN,
    LO,
    MAX_END,
    MIN_START,
    NAME_BYTES,
    PARTIAL,
    POSITION_0,
    POSITION_COUNT,
    POSITIONS,
    ROOT_NAME_LEN,
    ROOT_SERVICE,
    ROOTED,
    SERVICES_1,
    SERVICES_2,
    SPANS,
)


def trace_table(due: DueTraces) -> pa.Table:
    """The rows of :data:`betrace.service.storage.duck.arrow.TRACES` for closed traces."""
    return trace_tables([due])


def trace_tables(parts: Sequence[DueTraces]) -> pa.Table:
    """The same for several parts of one tenant. Parts with the same rules and service numbers share
    a table, because a table costs 0.25 ms even with few rows."""
    groups: list[list[DueTraces]] = []
    for due in parts:
        last = groups[-1][-1] if groups else None
        if last is not None and last.rules is due.rules and last.services is due.services:
            groups[-1].append(due)
        else:
            groups.append([due])
    tables = [_table(group) for group in groups]
    return traces_table(pa.concat_tables(tables)) if len(tables) > 1 else tables[0]


def _table(parts: Sequence[DueTraces]) -> pa.Table:
    rows, texts = parts[0].rows, parts[0].names
    if len(parts) > 1:
        rows = np.concatenate([part.rows for part in parts])
        texts = np.concatenate([part.names for part in parts])
    names = pa.array(parts[0].services, pa.string())
    return traces_table(
        {
            "trace_hi": rows[:, HI],
            "trace_lo": rows[:, LO],
            "start_ns": rows[:, MIN_START],
            "end_ns": rows[:, MAX_END],
            "first_seen_ns": rows[:, FIRST_SEEN],
            "last_seen_ns": rows[:, LAST_SEEN],
            "spans": rows[:, SPANS],
            "errors": rows[:, ERRORS],
            "root_name": _root_names(rows, texts),
            "root_service": names.take(
                pa.array(rows[:, ROOT_SERVICE], mask=rows[:, ROOT_SERVICE] == 0)
            ),
            "services": _services(rows, names),
            "positions": _flat(
                rows[:, POSITION_0 : POSITION_0 + POSITIONS], rows[:, POSITION_COUNT]
            ),
            "partial": rows[:, FLAGS] & PARTIAL != 0,
            "rules_version": pa.repeat(pa.scalar(parts[0].rules.version, pa.string()), len(rows)),
        }
    )


def frame_columns(spilled: Rows) -> Mapping[str, Any]:
    """Columns of :data:`betrace.service.storage.duck.arrow.FRAMES` for spilled rows (hi, lo,
    positions)."""
    positions = spilled[:, 2:]
    return {
        "trace_hi": spilled[:, 0],
        "trace_lo": spilled[:, 1],
        "positions": _flat(positions, np.full(len(spilled), positions.shape[1])),
    }


def _flat(matrix: Rows, lengths: Rows) -> tuple[Rows, Rows]:
    """The first ``lengths[k]`` values of each row, concatenated, and the offset of each row."""
    keep = np.arange(matrix.shape[1]) < lengths[:, None]
    return matrix[keep], _offsets(lengths)


def _offsets(lengths: Rows) -> Rows:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _root_names(rows: Rows, texts: Bytes) -> pa.Array:
    lengths = rows[:, ROOT_NAME_LEN]
    data = texts[np.arange(NAME_BYTES) < lengths[:, None]]
    offsets = _offsets(lengths).astype(np.int32)
    rooted = np.packbits(rows[:, FLAGS] & ROOTED != 0, bitorder="little")
    buffers = [pa.py_buffer(part.tobytes()) for part in (rooted, offsets, data)]
    return pa.Array.from_buffers(pa.string(), len(lengths), buffers)


def _services(rows: Rows, names: pa.Array) -> pa.ListArray:
    packed = rows[:, [SERVICES_1, SERVICES_2], None] >> np.array([0, 16, 32, 48])
    numbers = (packed & 0xFFFF).reshape(len(rows), 8)
    used = numbers != 0
    offsets = pa.array(_offsets(used.sum(axis=1)), pa.int32())
    return pa.ListArray.from_arrays(offsets, names.take(pa.array(numbers[used])))
