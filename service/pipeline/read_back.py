"""Reads whole traces from the log, for the rules that relate spans to each other."""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cachetools import LRUCache

from betrace.service.otlp.columns import Rows, SpanBatch
from betrace.service.otlp.subset import spans_of, wanted_traces
from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.columns import TraceId
from betrace.service.rules.read_columns import columns_of
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.partition_log import PartitionLog
from betrace.service.storage.spanlog.decode import frame_bodies
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    FLAGS,
    HI,
    LARGE_RING,
    LO,
    PARTIAL,
    POSITION_0,
    POSITION_COUNT,
    SPANS,
    SPILLED,
)
from betrace.service.traces.signal_history import SignalHistory, rule_signals
from betrace.service.traces.whole_trace import WholeTrace

_log = logging.getLogger("service.read_back")

SPANS_MAX = 50_000
ROUND_SPANS = 20_000  # of candidates that are in memory at the same time, and at least one trace
ROUND_TRACES = 2000
CHUNK_FRAMES = 4  # decoded at the same time
SPILLS_REMEMBERED = 100_000  # traces


class ReadBack:
    """Reads candidates by frame: those that close together share frames.

    ``store`` has the positions of long traces from before a restart; traces of more than
    ``max_spans`` spans are not read.
    """

    def __init__(
        self,
        log: PartitionLog,
        max_body_bytes: int,
        store: DuckStore | None = None,
        max_spans: int = SPANS_MAX,
    ) -> None:
        self._log = log
        self._store = store
        self._max_body = max_body_bytes
        self._max_spans = max_spans
        self._lock = threading.Lock()
        self._spilled: LRUCache[tuple[str, int, int], array[int]] = LRUCache(SPILLS_REMEMBERED)
        self.read = 0
        """Traces read."""

    def note(self, tenant: str, spilled: Rows | None) -> None:
        """Remember positions that traces no longer carry themselves: rows (hi, lo, positions)."""
        for hi, lo, *positions in spilled.tolist() if spilled is not None else ():
            key = (tenant, hi, lo)
            with self._lock:
                known = self._spilled.setdefault(key, array("q"))
                if len(known) <= self._max_spans:  # longer traces are not read back
                    known.extend(positions)

    def saved(self) -> list[list[Any]]:
        """What was noted, as JSON, for a snapshot: rows (tenant, hi, lo, positions)."""
        with self._lock:
            return [[*at, list(positions)] for at, positions in self._spilled.items()]

    def restore(self, saved: Iterable[Sequence[Any]]) -> None:
        """Add what :meth:`saved` returned."""
        with self._lock:
            for tenant, hi, lo, positions in saved:
                self._spilled[tenant, hi, lo] = array("q", positions)

    def signals_of(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, SignalHistory] | None:
        """The stored signals of traces; None if the store cannot be asked."""
        if self._store is None:
            return {}
        try:
            found = self._store.raised_of(tenant, trace_ids)
        except (StoreError, PoolTimeout) as error:
            _log.warning("the signals of late traces of %s cannot be read: %s", tenant, error)
            return None
        return {
            trace_id: {(each[0], each[1]): rule_signals(*each[2:]) for each in rows}
            for trace_id, rows in found.items()
        }

    def traces(
        self, due: DueTraces, numbers: Sequence[int]
    ) -> Iterator[list[tuple[int, WholeTrace | str]]]:
        """The traces with these numbers, in rounds that bound memory; in place of one that cannot
        be read whole, the reason."""
        round_: list[int] = []
        spans = 0
        for k in numbers:
            size = int(due.rows[k, SPANS])
            if size > self._max_spans:
                reason = f"the trace has {size} spans; at most {self._max_spans} are read back"
                yield [(k, reason)]
                continue
            if round_ and (spans + size > ROUND_SPANS or len(round_) >= ROUND_TRACES):
                yield self._round(due, round_)
                round_, spans = [], 0
            round_.append(k)
            spans += size
        if round_:
            yield self._round(due, round_)

    def _round(self, due: DueTraces, numbers: list[int]) -> list[tuple[int, WholeTrace | str]]:
        positions: set[int] = set()
        for k in numbers:
            positions |= self._positions(due, k)
        wanted = [(hi, lo) for hi, lo in due.rows[numbers][:, [HI, LO]].tolist()]
        columns = columns_of(self._spans(due.tenant, sorted(positions), wanted), wanted)
        self.read += len(numbers)
        found: list[tuple[int, WholeTrace | str]] = []
        for number, k in enumerate(numbers):
            spans = int(due.rows[k, SPANS])
            missing = columns.size(number) < spans and _counted(columns.ids(number)) < spans
            if due.rows[k, FLAGS] & PARTIAL or missing:
                found.append((k, "some of its spans can no longer be read"))
            else:
                found.append((k, WholeTrace(columns, number)))
        return found

    def _positions(self, due: DueTraces, k: int) -> set[int]:
        row = due.rows[k]
        positions = set(row[POSITION_0 : POSITION_0 + row[POSITION_COUNT]].tolist())
        if row[FLAGS] & SPILLED:
            key = (due.tenant, int(row[HI]), int(row[LO]))
            with self._lock:
                positions.update(self._spilled.get(key, ()))
            if self._store is not None:
                try:
                    positions.update(self._store.spilled(due.tenant, due.trace_id(k)))
                except (StoreError, PoolTimeout) as error:  # then perhaps not all are read
                    _log.warning("the frames of %s cannot be found: %s", due.trace_id(k), error)
        return positions

    def _spans(self, tenant: str, positions: list[int], wanted: Sequence[TraceId]) -> SpanBatch:
        """The spans of the wanted traces, and perhaps of a few others, in order of arrival."""
        chosen = wanted_traces(lo for _, lo in wanted)
        parts: list[bytes] = []
        for at in range(0, len(positions), CHUNK_FRAMES):
            chunk = positions[at : at + CHUNK_FRAMES]
            frames = [
                frame for frame in self._log.read_many(tenant, chunk) if isinstance(frame, Frame)
            ]
            bodies = frame_bodies(tenant, frames, self._max_body)
            parts += [spans_of(body, chosen) for body in bodies]
        return scan_bodies(tenant, parts)


def _counted(ids: Sequence[int]) -> int:
    """How many of the spans with these ids, in order of arrival, the fold counts: a copy counts
    again if so many others came in between that the fold does not know it any more."""
    latest: dict[int, int] = {}
    counted = 0
    for span_id in ids:
        last = latest.get(span_id)
        if last is None or counted - last > LARGE_RING:
            counted += 1
            latest[span_id] = counted
    return counted
