"""Writing rows into a tenant's DuckDB file, each id exactly once.

The tables have no primary keys: DuckDB's index made inserts into three million rows three times as
slow, and ``ON CONFLICT`` scanned the table (``docs/decisions/0010``). :class:`Known` knows which
rows exist; the few that may exist are looked up.

Every function takes a connection whose default database is the tenant's, in the tenant's only
writing transaction. Keys are noted before the commit: an extra key costs a look-up, a missing one
would cause a duplicate row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from betrace.service.signals import Kind, Signal, signal_id
from betrace.service.storage.duck.arrow import TRACES, trace_id_halves, traces_table
from betrace.service.storage.duck.keys import KeyArray, KeyBudget, Keys, frame_keys, id_key, id_keys
from betrace.service.storage.duck.queries import id_bytes, one
from betrace.service.storage.duck.schema import Cursor

# Explicit, because to infer the type of Python values Arrow searches all of sys.path for a module
# (dateutil), which takes 50 µs per column.
_SIGNALS = pa.schema(
    [
        ("id", pa.binary()),
        ("key", pa.uint64()),
        ("seq", pa.int64()),
        ("trace_id", pa.binary()),
        ("trace_key", pa.uint64()),
        ("kind", pa.string()),
        ("status", pa.string()),
        ("counts", pa.string()),
        ("evidence", pa.string()),
        ("labels", pa.string()),
        ("context", pa.string()),
        ("reason", pa.string()),
        ("rule_id", pa.string()),
        ("rule_version", pa.string()),
        ("severity", pa.string()),
        ("clause", pa.string()),
        ("detected_at", pa.int64()),
        ("early", pa.bool_()),
        ("message", pa.string()),
    ]
)
_PLAIN = ("rule_id", "rule_version", "severity", "clause", "detected_at", "early", "message")
_TRACE_COLUMNS = ", ".join(TRACES.names)


class Known:
    """What is known about a file's tables without a query. For one thread at a time."""

    def __init__(self, budget: KeyBudget) -> None:
        self.signals = Keys(budget)
        self.retracted = Keys(budget)
        """The keys of traces that have a retraction."""
        self.traces = Keys(budget)
        self.frames = Keys(budget)
        self.last_seq = 0

    def load(self, db: Cursor) -> None:
        """Read everything from the file."""
        self.signals.add(_column(db, "SELECT key FROM signals"))
        self.retracted.add(_column(db, "SELECT trace_key FROM signals WHERE kind = 'retracted'"))
        self.traces.add(_column(db, "SELECT key FROM traces"))
        found = db.execute('SELECT key, "first" FROM trace_frames').fetchnumpy()
        self.frames.add(frame_keys(_plain(found["key"]), _plain(found["first"])))
        row = one(db, "SELECT coalesce(max(seq), 0) FROM signals")
        assert row is not None
        self.last_seq = row[0]

    def clear(self) -> None:
        """Free the memory."""
        for keys in (self.signals, self.retracted, self.traces, self.frames):
            keys.clear()


def _column(db: Cursor, query: str) -> KeyArray:
    (values,) = db.execute(query).fetchnumpy().values()
    return _plain(values)


def _plain(values: Any) -> npt.NDArray[Any]:
    return np.asarray(values)


def write_traces(db: Cursor, known: Known, rows: pa.Table) -> None:
    """Insert traces; an existing trace is merged with its row."""
    keys = _trace_keys(rows)
    maybe = known.traces.maybe(keys)
    known.traces.add(keys[~maybe])
    if maybe.any():
        there = _take_traces(db, keys[maybe], rows["trace_id"].filter(pa.array(maybe)))
        if len(there):
            rows = traces_table(pa.concat_tables([there, rows]))
            keys = _trace_keys(rows)
    _insert(db, "traces", rows.append_column("key", pa.array(keys)))


def _take_traces(db: Cursor, keys: KeyArray, trace_ids: pa.ChunkedArray) -> pa.Table:
    """Remove from the table those of the traces that exist, and return their rows."""
    db.register("asked", pa.table({"key": keys}))
    found = db.execute("SELECT rowid FROM traces WHERE key IN (SELECT key FROM asked)").fetchall()
    db.unregister("asked")
    if not found:
        return TRACES.empty_table()
    # By row number, which is stable in a transaction: DuckDB reads only the rows' groups.
    numbers = ",".join(str(int(number)) for (number,) in found)
    rows: pa.Table = db.sql(
        f"SELECT rowid AS number, {_TRACE_COLUMNS} FROM traces WHERE rowid IN ({numbers})"
    ).to_arrow_table()
    rows = rows.filter(pc.is_in(rows["trace_id"].cast(pa.binary(16)), trace_ids.combine_chunks()))
    if len(rows):
        numbers = ",".join(str(number) for number in rows["number"].to_pylist())
        db.execute(f"DELETE FROM traces WHERE rowid IN ({numbers})").fetchall()
    return rows.select(TRACES.names).cast(TRACES)


def write_frames(db: Cursor, known: Known, rows: pa.Table) -> None:
    """Insert chunks of positions; a chunk replaces one that begins alike in the same trace."""
    first = pc.list_element(rows["positions"], 0)
    keys = _trace_keys(rows)
    rows = rows.append_column("key", pa.array(keys)).append_column("first", first)
    both = frame_keys(keys, first.to_numpy())
    maybe = known.frames.maybe(both)
    known.frames.add(both[~maybe])
    if maybe.any():
        db.register("asked", rows.filter(pa.array(maybe)))
        db.execute(
            "DELETE FROM trace_frames USING asked WHERE trace_frames.key = asked.key AND "
            'trace_frames."first" = asked."first" AND trace_frames.trace_id = asked.trace_id'
        ).fetchall()
        db.unregister("asked")
    _insert(db, "trace_frames", rows)


def write_signals(db: Cursor, known: Known, signals: Sequence[Signal]) -> int:
    """Insert the missing signals and mark what retractions retract; returns how many were
    inserted."""
    first: dict[bytes, Signal] = {}
    for signal in signals:
        first.setdefault(id_bytes(signal.id, "signal id"), signal)
    ids = list(first)
    keys = id_keys(ids)
    maybe = known.signals.maybe(keys)
    if maybe.any():
        there = _there(db, [ids[k] for k in np.flatnonzero(maybe).tolist()])
        new = np.array([key not in there for key in ids], np.bool_)
        ids, keys, maybe = [key for key in ids if key not in there], keys[new], maybe[new]
    if not ids:
        return 0
    known.signals.add(keys[~maybe])
    fresh = [first[key] for key in ids]
    traces = [id_bytes(signal.trace_id, "trace_id") for signal in fresh]
    trace_keys = id_keys(traces)
    back = {_other(signal) for signal in fresh if signal.kind is Kind.RETRACTED}
    before = _retracted_before(db, known, fresh, trace_keys)
    if back:
        of = np.array([signal.kind is Kind.RETRACTED for signal in fresh], np.bool_)
        known.retracted.add(trace_keys[of])
    rows = {
        "id": ids,
        "key": keys,
        "seq": np.arange(known.last_seq + 1, known.last_seq + 1 + len(fresh)),
        "trace_id": traces,
        "trace_key": trace_keys,
        "kind": [str(signal.kind) for signal in fresh],
        "status": [
            "retracted" if s.kind is Kind.RETRACTED or key in back or key in before else "active"
            for key, s in zip(ids, fresh, strict=True)
        ],
        "counts": [orjson.dumps(s.counts) for s in fresh],
        "evidence": [orjson.dumps(s.evidence) for s in fresh],
        "labels": [orjson.dumps(s.labels) for s in fresh],
        "context": [None if s.context is None else orjson.dumps(s.context) for s in fresh],
        "reason": [s.reason for s in fresh],
    } | {name: [getattr(signal, name) for signal in fresh] for name in _PLAIN}
    _insert(db, "signals", pa.table(rows, _SIGNALS))
    known.last_seq += len(fresh)
    earlier = sorted(back.difference(ids))
    if earlier:
        db.execute(
            "UPDATE signals SET status = 'retracted' WHERE status = 'active' "
            "AND key IN (SELECT unnest(?)) AND id IN (SELECT unnest(?))",
            [[id_key(key) for key in earlier], earlier],
        ).fetchall()
    return len(fresh)


def _there(db: Cursor, ids: Sequence[bytes]) -> set[bytes]:
    """Those of the signals' ids that exist in the table."""
    rows = db.execute(
        "SELECT id FROM signals WHERE key IN (SELECT unnest(?)) AND id IN (SELECT unnest(?))",
        [[id_key(key) for key in ids], list(ids)],
    )
    return {key for (key,) in rows.fetchall()}


def missing(db: Cursor, ids: Sequence[bytes]) -> set[bytes]:
    """Those of the signals' ids that do not exist in the table."""
    return set(ids) - _there(db, ids)


def _retracted_before(
    db: Cursor, known: Known, signals: Sequence[Signal], trace_keys: KeyArray
) -> set[bytes]:
    """The ids of the raised signals whose retraction is already in the table."""
    maybe: npt.NDArray[np.bool_] = known.retracted.maybe(trace_keys)
    raised = [signals[k] for k in np.flatnonzero(maybe).tolist() if signals[k].kind is Kind.RAISED]
    if not raised:
        return set()
    retractions = {_other(signal): signal for signal in raised}
    there = _there(db, list(retractions))
    return {bytes.fromhex(retractions[key].id) for key in there}


def _other(signal: Signal) -> bytes:
    """The id of a raised signal's retraction, or of the signal that a retraction retracts."""
    kind = Kind.RETRACTED if signal.kind is Kind.RAISED else Kind.RAISED
    rule, version = signal.rule_id, signal.rule_version
    return bytes.fromhex(
        signal_id(signal.tenant, rule, version, signal.trace_id, kind, signal.episode)
    )


def _trace_keys(rows: pa.Table) -> KeyArray:
    halves = trace_id_halves(rows["trace_id"].combine_chunks())
    return (halves[:, 0] ^ halves[:, 1]).view(np.uint64)


def _insert(db: Cursor, table: str, arriving: pa.Table) -> None:
    # DuckDB finds the variable by name; registering it as a view takes a third of a commit.
    db.execute(f"INSERT INTO {table} BY NAME SELECT * FROM arriving").fetchall()
