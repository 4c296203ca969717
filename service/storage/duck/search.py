"""Pages of the trace index, searched from the newest trace backwards for a limited time.

A filter may match any fraction of the rows, and a single query over ten million rows is slow:
DuckDB would filter and sort far more than a page holds. So a page is searched in windows of start
times, newest first, until it is full; zone maps make such windows cheap. A search that takes too
long stops between two windows: it is exact down to there, and the cursor continues from there.

Within a window, the columns of the filters first determine where the page ends. Ids are slow to
read, so they are read only for the rows of the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from betrace.service.storage.duck.keys import id_key
from betrace.service.storage.duck.queries import (
    TRACE,
    TraceRow,
    Where,
    make_cursor,
    one,
    read_cursor,
    trace_row,
)
from betrace.service.storage.duck.schema import MAX_ROWS, Cursor

SEARCH_SECONDS = 0.05
"""Seconds after which no further window is begun."""
WINDOW_ROWS = 250_000
"""Approximate rows of the first window."""
_GROWTH = 4  # most times as many rows as in the previous window
_TOO_MANY = 2  # times the intended rows of a window
_FEW_ROWS = 20_000  # for which two queries are not worth it
_KIND = b"t"
_NO_ID = "00" * 16  # of a cursor between two times

After = tuple[int, bytes]
"""The last row of the previous page: its start time and id."""


class TracePage(NamedTuple):
    """Traces by start time, newest first, and the cursor of the next page, None after the last one.
    If the search stopped before the page was full, all traces that started at ``searched_to``
    (nanoseconds since 1970) or later were searched; otherwise ``searched_to`` is None."""

    rows: list[TraceRow]
    next: str | None
    searched_to: int | None


@dataclass(frozen=True, slots=True)
class TraceFilter:
    """Which traces are wanted: with a span of ``service``, with a root span called ``name``, at
    least ``min_duration`` nanoseconds long, with an active signal or without one, started at
    ``since`` or later and before ``until``."""

    service: str | None = None
    name: str | None = None
    min_duration: int | None = None
    has_signal: bool | None = None
    since: int | None = None
    until: int | None = None

    def within(self, start: int, end: int, joined: bool) -> Where:
        """Conditions for the wanted traces that started from ``start`` to before ``end``. They also
        match some others: with ``has_signal``, traces that share a key with one that has a signal;
        without signals, all traces, unless ``joined``, which is slower."""
        where = Where()
        where.add("start_ns >= ? AND start_ns < ?", start, end)
        where.add("end_ns - start_ns >= ?", self.min_duration)
        where.add("root_name = ?", self.name)
        where.add("list_contains(services, ?)", self.service)
        if self.has_signal:
            where.add("key IN (SELECT trace_key FROM signals WHERE status = 'active')")
        elif self.has_signal is False and joined:
            where.add("trace_id NOT IN (SELECT trace_id FROM signals WHERE status = 'active')")
        return where


def search(
    db: Cursor,
    wanted: TraceFilter,
    *,
    limit: int = 100,
    cursor: str | None = None,
    seconds: float = SEARCH_SECONDS,
    window_rows: int = WINDOW_ROWS,
    few_rows: int = _FEW_ROWS,
    clock: Callable[[], float] = time.perf_counter,
) -> TracePage:
    """A page of the wanted traces. Searches at least one window, and begins none after ``seconds``.
    In a window with up to ``few_rows`` rows, all columns are read in one query."""
    began = clock()
    after = read_cursor(limit, _KIND, cursor)
    span = one(db, "SELECT count(*), min(start_ns), max(start_ns) FROM traces")
    if span is None or not span[0]:
        return TracePage([], None, None)
    total, oldest, newest = span
    floor = oldest if wanted.since is None else max(oldest, wanted.since)
    end = newest + 1 if wanted.until is None else min(newest + 1, wanted.until)
    if after is not None:
        end = min(end, after[0] + any(after[1]))
    rows = window_rows
    width = (newest - oldest + 1) * rows // total + 1
    found = _Search(db, wanted, limit, end, after)
    while found.end > floor:
        window_began = clock()
        start, found.end, count, width = _window(db, floor, found.end, width, rows)
        while count and found.end > start:
            found.step(start, at_once=count <= few_rows)
            if len(found.rows) > limit:
                return found.full_page()
            if found.end > floor and clock() - began >= seconds:
                return found.page_so_far()
        found.end = start
        # As many rows as can be searched at this pace in the remaining time.
        now = clock()
        pace = count / max(now - window_began, 1e-6)
        grown = min(int(pace * (seconds - (now - began))), _GROWTH * rows)
        rows, before = max(window_rows, grown), rows
        width = max(1, width * rows // before)
    return TracePage(found.rows, None, None)


class _Search:
    """The traces found so far, in ``rows``: all that started at ``end`` or later, except those that
    started at the same time as ``after`` and come after it."""

    def __init__(
        self, db: Cursor, wanted: TraceFilter, limit: int, end: int, after: After | None
    ) -> None:
        self.rows: list[TraceRow] = []
        self.end = end
        self._db = db
        self._wanted = wanted
        self._limit = limit
        self._after = after
        self._joined = False

    def step(self, start: int, *, at_once: bool) -> None:
        """Add the next traces that started at ``start`` or later, some or all of them. ``at_once``
        skips the query for where the page ends."""
        count = self._limit + 1 - len(self.rows)
        if self._wanted.has_signal is False and not self._joined:
            count = 2 * count  # those with signals are removed afterwards
        count = min(count, MAX_ROWS)
        first = start if at_once else self._first(start, count)
        if first is None:
            self.end = start
            return
        where = self._wanted.within(first, self.end, self._joined)
        if self._after is not None and self.end > self._after[0]:
            where.add("(start_ns < ? OR trace_id < ?)", *self._after)
        rows = self._db.execute(
            f"SELECT {TRACE} FROM traces {where.sql} ORDER BY start_ns DESC, trace_id DESC LIMIT ?",
            [*where.parameters, count],
        ).fetchall()
        traces = [trace_row(row, []) for row in rows]
        self.rows += self._exact(traces)
        self._joined = True
        if len(traces) == count:
            self._after = traces[-1].start_ns, bytes.fromhex(traces[-1].trace_id)
            self.end = self._after[0] + 1
        else:
            self.end = first

    def _first(self, start: int, count: int) -> int | None:
        """When the last of the next ``count`` traces started; ``start`` if there are fewer, None
        without any."""
        where = self._wanted.within(start, self.end, self._joined)
        rows = self._db.execute(
            f"SELECT start_ns FROM traces {where.sql} ORDER BY start_ns DESC LIMIT ?",
            [*where.parameters, count],
        ).fetchall()
        return int(rows[-1][0]) if len(rows) == count else start if rows else None

    def _exact(self, traces: list[TraceRow]) -> list[TraceRow]:
        """The traces that satisfy ``has_signal``."""
        if self._wanted.has_signal is None or not traces:
            return traces
        ids = [bytes.fromhex(trace.trace_id) for trace in traces]
        rows = self._db.execute(
            "SELECT DISTINCT lower(hex(trace_id)) FROM signals WHERE status = 'active' "
            "AND trace_key IN (SELECT unnest(?::UBIGINT[])) AND trace_id IN (SELECT unnest(?))",
            [[id_key(each) for each in ids], ids],
        ).fetchall()
        signalled = {trace_id for (trace_id,) in rows}
        return [t for t in traces if (t.trace_id in signalled) == self._wanted.has_signal]

    def full_page(self) -> TracePage:
        """The page when more traces than the limit were found."""
        last = self.rows[self._limit - 1]
        following = make_cursor(_KIND, last.start_ns, last.trace_id)
        return TracePage(self.rows[: self._limit], following, None)

    def page_so_far(self) -> TracePage:
        """The page when the search stops early."""
        if self._after is not None and self.end > self._after[0]:
            following = make_cursor(_KIND, self._after[0], self._after[1].hex())
        else:
            following = make_cursor(_KIND, self.end, _NO_ID)
        return TracePage(self.rows, following, self.end)


def _window(db: Cursor, floor: int, end: int, width: int, rows: int) -> tuple[int, int, int, int]:
    """The next window: about ``rows`` of the newest traces that started from ``floor`` to before
    ``end``. Returns its start and end, how many traces it has (0 if none are left), and the
    ``width`` to pass for the next window."""
    while True:
        start = max(floor, end - width)
        ((count,),) = db.execute(
            "SELECT count(*) FROM traces WHERE start_ns >= ? AND start_ns < ?", [start, end]
        ).fetchall()
        if count > _TOO_MANY * rows and end - start > 1:
            width = max(1, (end - start) * rows // count)
        elif count or start == floor:
            return start, end, count, width
        else:  # a gap, for example because of a wrong clock
            ((newest,),) = db.execute(
                "SELECT max(start_ns) FROM traces WHERE start_ns >= ? AND start_ns < ?",
                [floor, start],
            ).fetchall()
            if newest is None:
                return floor, end, 0, width
            end = newest + 1
