"""Pages of the trace index: searched from the newest trace back, for a limited time.

A filter may pass any part of the rows, and of ten million no plan for all of them at once ends
soon: DuckDB would filter and sort much that a page has no room for. So a page is searched in
windows of start times, which zone maps make cheap, the newest first, until it is full. A search
that takes too long stops between two windows: down to there it is exact, and the cursor goes on.

Within a window the columns of the filters say first where the page ends. Ids, which are slow to
read, are read of the rows after that only.
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
"""After which no further window is begun."""
WINDOW_ROWS = 250_000
"""Of the first window, about."""
_GROWTH = 4  # of a window over the one before
_TOO_MANY = 2  # times the rows that a window should have
_FEW_ROWS = 20_000  # not worth two queries
_KIND = b"t"
_NO_ID = "00" * 16  # the page before ended between two times

After = tuple[int, bytes]
"""The last row of the page before: when it started, and its id."""


class TracePage(NamedTuple):
    """Traces by when they started, newest first; the cursor of the next page, None after the last.
    ``searched_to`` is None but where the search stopped before the page was full: then all traces
    that started at this time (nanoseconds since 1970) or later were searched."""

    rows: list[TraceRow]
    next: str | None
    searched_to: int | None


@dataclass(frozen=True, slots=True)
class TraceFilter:
    """Which traces are wanted, but for when they started: with a span of a service, with a root
    span of a name, at least so many nanoseconds long, with an active signal or without one."""

    service: str | None = None
    name: str | None = None
    min_duration: int | None = None
    has_signal: bool | None = None

    def within(self, start: int, end: int, joined: bool) -> Where:
        """All of them that started from ``start`` to before ``end``, and a few others: of traces
        with signals those with the key of one, of those without any all, unless ``joined``, which
        is slower."""
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
    since: int | None = None,
    until: int | None = None,
    limit: int = 100,
    cursor: str | None = None,
    seconds: float = SEARCH_SECONDS,
    window_rows: int = WINDOW_ROWS,
    few_rows: int = _FEW_ROWS,
    clock: Callable[[], float] = time.perf_counter,
) -> TracePage:
    """A page of the traces that started at ``since`` or later and before ``until``. At least one
    window is searched, and none is begun after ``seconds``; of ``few_rows`` in a window all
    columns are read at once."""
    began = clock()
    after = read_cursor(limit, _KIND, cursor)
    span = one(db, "SELECT count(*), min(start_ns), max(start_ns) FROM traces")
    if span is None or not span[0]:
        return TracePage([], None, None)
    count, oldest, newest = span
    floor = oldest if since is None else max(oldest, since)
    end = newest + 1 if until is None else min(newest + 1, until)
    if after is not None:
        end = min(end, after[0] + any(after[1]))
    rows = window_rows
    width = (newest - oldest + 1) * rows // count + 1
    found = _Search(db, wanted, limit, end, after)
    while found.end > floor:
        window_began = clock()
        start, found.end, held, width = _window(db, floor, found.end, width, rows)
        while held and found.end > start:
            found.step(start, at_once=held <= few_rows)
            if len(found.rows) > limit:
                return found.full_page()
            if found.end > floor and clock() - began >= seconds:
                return found.page_so_far()
        found.end = start
        # As many rows as at this pace can be searched in the time that is left.
        now = clock()
        pace = held / max(now - window_began, 1e-6)
        grown = min(int(pace * (seconds - (now - began))), _GROWTH * rows)
        rows, before = max(window_rows, grown), rows
        width = max(1, width * rows // before)
    return TracePage(found.rows, None, None)


class _Search:
    """What was found so far, in ``rows``: traces that started at ``end`` or later, but for those
    that started when ``after`` did and come after it."""

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
        """Look at the next of those that started at ``start`` or later, some or all: ``at_once``
        without asking first where they end."""
        count = self._limit + 1 - len(self.rows)
        if self._wanted.has_signal is False and not self._joined:
            count = 2 * count  # most traces have no signals
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
        self.rows += self._really(traces)
        self._joined = True
        if len(traces) == count:
            self._after = traces[-1].start_ns, bytes.fromhex(traces[-1].trace_id)
            self.end = self._after[0] + 1
        else:
            self.end = first

    def _first(self, start: int, count: int) -> int | None:
        """When the last of the next ``count`` started; of fewer ``start``, of none None."""
        where = self._wanted.within(start, self.end, self._joined)
        rows = self._db.execute(
            f"SELECT start_ns FROM traces {where.sql} ORDER BY start_ns DESC LIMIT ?",
            [*where.parameters, count],
        ).fetchall()
        return int(rows[-1][0]) if len(rows) == count else start if rows else None

    def _really(self, traces: list[TraceRow]) -> list[TraceRow]:
        """Those of the traces that have a signal, or none, as is wanted."""
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
        """When more than the limit were found."""
        last = self.rows[self._limit - 1]
        following = make_cursor(_KIND, last.start_ns, last.trace_id)
        return TracePage(self.rows[: self._limit], following, None)

    def page_so_far(self) -> TracePage:
        """When the search stops."""
        if self._after is not None and self.end > self._after[0]:
            following = make_cursor(_KIND, self._after[0], self._after[1].hex())
        else:
            following = make_cursor(_KIND, self.end, _NO_ID)
        return TracePage(self.rows, following, self.end)


def _window(db: Cursor, floor: int, end: int, width: int, rows: int) -> tuple[int, int, int, int]:
    """From when to when traces started of which there are about ``rows``, the newest before
    ``end``; how many there are, 0 where there are none from ``floor`` on; and the width, which
    is to be given the next time."""
    while True:
        start = max(floor, end - width)
        ((held,),) = db.execute(
            "SELECT count(*) FROM traces WHERE start_ns >= ? AND start_ns < ?", [start, end]
        ).fetchall()
        if held > _TOO_MANY * rows and end - start > 1:
            width = max(1, (end - start) * rows // held)
        elif held or start == floor:
            return start, end, held, width
        else:  # few clocks are that wrong, but one is enough
            ((newest,),) = db.execute(
                "SELECT max(start_ns) FROM traces WHERE start_ns >= ? AND start_ns < ?",
                [floor, start],
            ).fetchall()
            if newest is None:
                return floor, end, 0, width
            end = newest + 1
