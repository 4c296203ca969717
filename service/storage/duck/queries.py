"""Queries on a tenant's DuckDB file: rows as values, pages, and their cursors.

Every function takes a connection whose default database is the tenant's. Values are bound as
parameters; the text of a query depends only on which filters are present.

A cursor is URL-safe base64 of 25 bytes, big-endian: the list's kind (one byte), then the time (i64)
and the id (16 bytes) of the last row of the page.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from betrace.service.signals import Kind, Signal
from betrace.service.storage.duck.keys import id_key
from betrace.service.storage.duck.schema import MAX_ROWS, Cursor, transaction

MAX_LIMIT = MAX_ROWS - 1
MAX_BUCKETS = 10_000
_CURSOR = struct.Struct(">cq16s")


class BadQuery(ValueError):  # noqa: N818
    """The query is invalid; the message says what to ask instead."""


@dataclass(frozen=True, slots=True)
class StoredSignal:
    """A signal with its current status: ``retracted`` for retractions and for raised signals that
    were retracted. ``seq`` grows in the order in which signals were stored."""

    signal: Signal
    status: Literal["active", "retracted"]
    seq: int


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """The number of signals of a rule raised within a time bucket, and how many of those were
    retracted since."""

    bucket_ns: int
    rule_id: str
    severity: str
    raised: int
    retracted: int


@dataclass(frozen=True, slots=True)
class TraceRow:
    """A row of the trace index; see :data:`betrace.service.storage.duck.arrow.TRACES`."""

    trace_id: str
    start_ns: int
    end_ns: int
    first_seen_ns: int
    last_seen_ns: int
    spans: int
    errors: int
    root_name: str | None
    root_service: str | None
    services: list[str]
    partial: bool
    rules_version: str
    positions: list[int]
    """The log positions of all its frames, in order; empty in lists of traces."""


_SIGNAL = (
    "lower(hex(id)), rule_id, rule_version, severity, kind, clause, lower(hex(trace_id)), "
    "detected_at, early, counts, evidence, message, labels, reason, context, status, seq"
)
TRACE = (
    "lower(hex(trace_id)), start_ns, end_ns, first_seen_ns, last_seen_ns, spans, errors, "
    "root_name, root_service, services, partial, rules_version"
)


def id_bytes(text: str, what: str) -> bytes:
    """The 16 bytes of an id of 32 hex digits. Raises :exc:`BadQuery` for anything else."""
    if len(text) == 32:
        try:
            return bytes.fromhex(text)
        except ValueError:
            pass
    raise BadQuery(f"{what} {text!r} is not 32 hexadecimal digits")


def one(db: Cursor, sql: str, parameters: Any = ()) -> tuple[Any, ...] | None:
    """The first row of a query's result. Reads the result to its end, because a connection with a
    pending result accepts no other query."""
    rows = db.execute(sql, parameters).fetchall()
    return rows[0] if rows else None


class Where:
    """The conditions of a query and their parameters."""

    def __init__(self) -> None:
        self.conditions: list[str] = []
        self.parameters: list[Any] = []

    def add(self, condition: str, *values: Any) -> None:
        """Add ``condition``, with a ``?`` for each value, unless the first value is None."""
        if not values or values[0] is not None:
            self.conditions.append(condition)
            self.parameters.extend(values)

    @property
    def sql(self) -> str:
        return f"WHERE {' AND '.join(self.conditions)}" if self.conditions else ""


def read_cursor(limit: int, kind: bytes, cursor: str | None) -> tuple[int, bytes] | None:
    """Check the limit and decode a cursor: the time and id of the previous page's last row."""
    if not 1 <= limit <= MAX_LIMIT:
        raise BadQuery(f"limit must be 1 to {MAX_LIMIT}, not {limit}")
    if cursor is None:
        return None
    try:
        data = base64.b64decode(cursor.encode("ascii"), b"-_", validate=True)
        found, time, key = _CURSOR.unpack(data)
    except (binascii.Error, struct.error, ValueError):
        found = b""
    if found != kind:
        raise BadQuery("the cursor does not belong to this list: pass 'next' of the previous page")
    return time, key


def make_cursor(kind: bytes, time: int, key: str) -> str:
    """The cursor for the page after the row with this time and id, in a list of this kind."""
    data = _CURSOR.pack(kind, time, bytes.fromhex(key))
    return base64.urlsafe_b64encode(data).decode()


def _stored(tenant: str, row: tuple[Any, ...]) -> StoredSignal:
    (key, rule, version, severity, kind, clause, trace, at, early) = row[:9]
    (counts, evidence, message, labels, reason, context, status, seq) = row[9:]
    signal = Signal(
        id=key,
        tenant=tenant,
        rule_id=rule,
        rule_version=version,
        severity=severity,
        kind=Kind(kind),
        clause=clause,
        trace_id=trace,
        detected_at=at,
        early=early,
        counts=orjson.loads(counts),
        evidence=orjson.loads(evidence),
        message=message,
        labels=orjson.loads(labels),
        reason=reason,
        context=None if context is None else orjson.loads(context),
    )
    return StoredSignal(signal, status, seq)


def trace_row(row: tuple[Any, ...], positions: list[int]) -> TraceRow:
    """The trace in a row with the columns ``TRACE``."""
    return TraceRow(*(*row, positions))


@dataclass(frozen=True, slots=True)
class SignalFilter:
    """Which signals are wanted: of a rule, severity, trace, status (``active`` or ``retracted``),
    mode (``alert`` or ``shadow``) or service, detected at ``since`` or later and before
    ``until``."""

    rule: str | None = None
    severity: str | None = None
    trace_id: str | None = None
    status: str | None = None
    mode: str | None = None
    service: str | None = None
    since: int | None = None
    until: int | None = None


def signals(
    db: Cursor, tenant: str, wanted: SignalFilter, limit: int, cursor: str | None
) -> tuple[list[StoredSignal], str | None]:
    """See :meth:`betrace.service.storage.duck.store.DuckStore.signals`."""
    after = read_cursor(limit, b"s", cursor)
    where = Where()
    where.add("rule_id = ?", wanted.rule)
    where.add("severity = ?", wanted.severity)
    where.add("status = ?", wanted.status)
    where.add("coalesce(json_extract_string(context, '$.mode'), 'alert') = ?", wanted.mode)
    where.add("json_extract_string(context, '$.service') = ?", wanted.service)
    where.add("detected_at >= ?", wanted.since)
    where.add("detected_at < ?", wanted.until)
    if wanted.trace_id is not None:
        key = id_bytes(wanted.trace_id, "trace_id")
        where.add("trace_key = ? AND trace_id = ?", id_key(key), key)
    if after is not None:
        where.add("(detected_at < ? OR (detected_at = ? AND id < ?))", after[0], *after)
    rows = db.execute(
        f"SELECT {_SIGNAL} FROM signals {where.sql} ORDER BY detected_at DESC, id DESC LIMIT ?",
        [*where.parameters, limit + 1],
    ).fetchall()
    found = [_stored(tenant, row) for row in rows[:limit]]
    last = found[-1].signal if len(rows) > limit else None
    return found, make_cursor(b"s", last.detected_at, last.id) if last else None


def signal(db: Cursor, tenant: str, signal_id: str) -> StoredSignal | None:
    """See :meth:`betrace.service.storage.duck.store.DuckStore.signal`."""
    key = id_bytes(signal_id, "signal id")
    query = f"SELECT {_SIGNAL} FROM signals WHERE key = ? AND id = ?"
    row = one(db, query, [id_key(key), key])
    return _stored(tenant, row) if row else None


def signals_after(db: Cursor, tenant: str, seq: int, limit: int) -> list[StoredSignal]:
    """See :meth:`betrace.service.storage.duck.store.DuckStore.signals_after`."""
    rows = db.execute(
        f"SELECT {_SIGNAL} FROM signals WHERE seq > ? ORDER BY seq LIMIT ?", [seq, limit]
    ).fetchall()
    return [_stored(tenant, row) for row in rows]


def summary(db: Cursor, since: int, until: int, bucket: int) -> list[SummaryRow]:
    """See :meth:`betrace.service.storage.duck.store.DuckStore.summary`."""
    rows = db.execute(
        "SELECT detected_at // $bucket * $bucket AS bucket_ns, rule_id, severity, count(*), "
        "count(*) FILTER (status = 'retracted') FROM signals WHERE kind = 'raised' "
        "AND detected_at >= $since AND detected_at < $until "
        "GROUP BY ALL ORDER BY bucket_ns, rule_id, severity",
        {"bucket": bucket, "since": since, "until": until},
    ).fetchall()
    return [SummaryRow(*row) for row in rows]


def check_summary(since: int, until: int, bucket: int) -> None:
    """Raise :exc:`BadQuery` for a summary of too many buckets."""
    if bucket < 1 or until - since > bucket * MAX_BUCKETS:
        raise BadQuery(f"at most {MAX_BUCKETS} buckets: choose a larger bucket or a shorter time")


def find_traces(db: Cursor, trace_ids: Sequence[str]) -> dict[str, TraceRow]:
    """See :meth:`betrace.service.storage.duck.store.DuckStore.find_traces`."""
    wanted = {each.lower(): id_key(id_bytes(each, "trace_id")) for each in trace_ids}
    keys = [list(wanted.values())]
    found: dict[str, TraceRow] = {}
    with transaction(db):  # row numbers are stable within one
        rows = db.execute(
            "SELECT rowid FROM traces WHERE key IN (SELECT unnest(?::UBIGINT[]))", keys
        ).fetchall()
        if not rows:
            return found
        spilled: dict[str, set[int]] = {}
        for key, positions in db.execute(
            "SELECT lower(hex(trace_id)), positions FROM trace_frames "
            "WHERE key IN (SELECT unnest(?::UBIGINT[]))",
            keys,
        ).fetchall():
            spilled.setdefault(key, set()).update(positions)
        # The rows' other columns afterwards: a tenth of the time of one query for both.
        numbers = ",".join(str(int(number)) for (number,) in rows)
        for row in db.execute(
            f"SELECT {TRACE}, positions FROM traces WHERE rowid IN ({numbers})"
        ).fetchall():
            key, positions = row[0], row[-1]
            if key in wanted:
                found[key] = trace_row(row[:-1], sorted(spilled.get(key, set()).union(positions)))
    return found


def raised_of(
    db: Cursor, trace_ids: Sequence[str]
) -> dict[str, list[tuple[str, str, int, int, str]]]:
    """See :meth:`betrace.service.storage.duck.store.DuckStore.raised_of`."""
    ids = [id_bytes(each, "trace_id") for each in trace_ids]
    found: dict[str, list[tuple[str, str, int, int, str]]] = {}
    for trace_id, *row in db.execute(
        "SELECT lower(hex(trace_id)), rule_id, rule_version, count(*) FILTER (kind = 'raised'), "
        "count(*) FILTER (kind = 'retracted'), arg_max(clause, seq) FROM signals "
        "WHERE trace_key IN (SELECT unnest(?::UBIGINT[])) AND trace_id IN (SELECT unnest(?)) "
        "GROUP BY 1, 2, 3",
        [[id_key(each) for each in ids], ids],
    ).fetchall():
        found.setdefault(trace_id, []).append(tuple(row))
    return found


def spilled(db: Cursor, trace_id: str) -> list[int]:
    """See :meth:`betrace.service.storage.duck.store.DuckStore.spilled`."""
    key = id_bytes(trace_id, "trace_id")
    rows = db.execute(
        "SELECT positions FROM trace_frames WHERE key = ? AND trace_id = ?", [id_key(key), key]
    ).fetchall()
    return sorted({position for (chunk,) in rows for position in chunk})
