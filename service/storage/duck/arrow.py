"""Rows of the trace index as Arrow tables, which DuckDB reads without copying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

# One row per trace. Times are nanoseconds since 1970: start and end of the spans, and when the
# first and last frame were received. ``positions`` are the log positions of the trace's frames,
# except those spilled earlier; ``partial`` says that some of its spans were not counted.
TRACES = pa.schema(
    [
        ("trace_id", pa.binary(16)),
        ("start_ns", pa.int64()),
        ("end_ns", pa.int64()),
        ("first_seen_ns", pa.int64()),
        ("last_seen_ns", pa.int64()),
        ("spans", pa.int64()),
        ("errors", pa.int64()),
        ("root_name", pa.string()),
        ("root_service", pa.string()),
        ("services", pa.list_(pa.string())),
        ("positions", pa.list_(pa.int64())),
        ("partial", pa.bool_()),
        ("rules_version", pa.string()),
    ]
)

# One row per chunk of a long trace's positions, spilled while the trace is open.
FRAMES = pa.schema([("trace_id", pa.binary(16)), ("positions", pa.list_(pa.int64()))])

MOST_POSITIONS = 4096
"""The most positions in a merged row of the trace index. A trace that is reopened again and again
keeps the newest."""

Columns: TypeAlias = pa.Table | Mapping[str, Any]


def trace_id_array(hi: npt.NDArray[np.int64], lo: npt.NDArray[np.int64]) -> pa.Array:
    """Trace ids as 16-byte values, from the two halves in span rows."""
    both = np.empty((len(hi), 2), ">i8")
    both[:, 0] = hi
    both[:, 1] = lo
    return pa.Array.from_buffers(pa.binary(16), len(hi), [None, pa.py_buffer(both.tobytes())])


def trace_id_halves(ids: pa.Array) -> npt.NDArray[np.int64]:
    """An (n, 2) array of the high and low halves of ``ids``, 16 bytes each; the inverse of
    :func:`trace_id_array`."""
    fixed = ids.cast(pa.binary(16))
    data = np.frombuffer(fixed.buffers()[1], ">i8", 2 * len(fixed), 16 * fixed.offset)
    return data.reshape(-1, 2).astype(np.int64)


def trace_ids(ids: pa.Array | pa.ChunkedArray) -> list[bytes]:
    """Trace ids as bytes, ten times as fast as Arrow's ``to_pylist``."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if not len(ids):
        return []
    fixed = ids.cast(pa.binary(16))
    data = np.frombuffer(fixed.buffers()[1], "V16", len(fixed), 16 * fixed.offset)
    return list(data.tolist())


def traces_table(columns: Columns) -> pa.Table:
    """A table of :data:`TRACES` with one row per trace. Of several rows for a trace, it has the one
    last seen, with the positions of all of them.

    ``columns`` is such a table, or maps column names to arrays or sequences of equal length.
    ``trace_hi`` and ``trace_lo`` may replace ``trace_id``; a list column may be a pair (values,
    offsets) of arrays. Raises :exc:`ValueError` if a column is missing or has the wrong type.
    """
    return _table(columns, TRACES, unique=True)


def frames_table(columns: Columns) -> pa.Table:
    """A table of :data:`FRAMES`, from columns as for :func:`traces_table`. Chunks without positions
    are omitted."""
    table = _table(columns, FRAMES, unique=False)
    return table.filter(pc.greater(pc.list_value_length(table["positions"]), 0))


def _table(columns: Columns, schema: pa.Schema, unique: bool) -> pa.Table:
    try:
        if isinstance(columns, pa.Table):
            table = columns.select(schema.names).cast(schema)
        else:
            table = pa.Table.from_arrays(
                [_array(columns, field) for field in schema], schema=schema
            )
    except KeyError as error:
        raise ValueError(f"column {error} is missing") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"columns do not match {schema.names}: {error}") from error
    return _unique(table) if unique else table


def _unique(table: pa.Table) -> pa.Table:
    ids = trace_ids(table["trace_id"])
    if len(set(ids)) == len(ids):
        return table
    last: dict[bytes, int] = {}
    seen = table["last_seen_ns"].to_pylist()
    for row, each in enumerate(ids):
        if each not in last or seen[row] >= seen[last[each]]:
            last[each] = row
    positions: dict[bytes, set[int]] = {}
    for each, some in zip(ids, table["positions"].to_pylist(), strict=True):
        positions.setdefault(each, set()).update(some)
    rows = sorted(last.values())
    newest = [sorted(positions[ids[row]])[-MOST_POSITIONS:] for row in rows]
    merged = pa.array(newest, pa.list_(pa.int64()))
    at = table.schema.get_field_index("positions")
    return table.take(rows).set_column(at, table.schema.field(at), merged)


def _array(columns: Mapping[str, Any], field: pa.Field) -> pa.Array:
    if field.name == "trace_id" and "trace_id" not in columns:
        return trace_id_array(columns["trace_hi"], columns["trace_lo"])
    values: Sequence[Any] | pa.Array | tuple[Any, Any] = columns[field.name]
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.cast(field.type)
    if isinstance(values, tuple) and pa.types.is_list(field.type):
        items, offsets = values
        return pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(items, field.type.value_type)
        )
    return pa.array(values, field.type)
