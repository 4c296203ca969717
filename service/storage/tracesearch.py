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

from service.storage.duckqueries import TRACE, TraceRow, Where, make_cursor, one, read_cursor, trace_row
from service.storage.duckschema import Cursor

SEARCH_SECONDS = 0.05
"""After which no further window is begun."""
WINDOW_ROWS = 250_000
"""Of the first window, about."""
_GROWTH = 4  # of a window over the one before
_TOO_MANY = 2  # times the rows that a window should have
_FEW_ROWS = 20_000  # not worth two queries
_KIND = b"t"
_NO_ID = "00" * 16  # before all others

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

    def of_traces(self, start: int, end: int) -> Where:
        """Those that started from ``start`` to before ``end``, with a signal or not."""
        where = Where()
        where.add("start_ns >= ? AND start_ns < ?", start, end)
        where.add("end_ns - start_ns >= ?", self.min_duration)
        where.add("root_name = ?", self.name)
        where.add("list_contains(services, ?)", self.service)
        return where

    def by_key(self, start: int, end: int) -> Where:
        """As :meth:`exactly` and cheaper, but for traces that have a key in common."""
        where = self.of_traces(start, end)
        if self.has_signal is not None:
            where.add(f"key {self._in} (SELECT trace_key FROM signals WHERE status = 'active')")
        return where

    def exactly(self, start: int, end: int) -> Where:
        """Those that are wanted, of this time."""
        where = self.of_traces(start, end)
        if self.has_signal is not None:
            candidates = self.of_traces(start, end)
            where.add(
                f"trace_id {self._in} (SELECT trace_id FROM signals WHERE status = 'active' "
                f"AND trace_key IN (SELECT key FROM traces {candidates.sql}))",
                *candidates.parameters,
            )
        return where

    @property
    def _in(self) -> str:
        return "IN" if self.has_signal else "NOT IN"


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
    window is searched, and none is begun after ``seconds``."""
    began = clock()
    after = read_cursor(limit, _KIND, cursor)
    span = one(db, "SELECT count(*), min(start_ns), max(start_ns) FROM traces")
    if span is None or not span[0]:
        return TracePage([], None, None)
    count, oldest, newest = span
    floor = oldest if since is None else max(oldest, since)
    end = newest + 1 if until is None else min(newest + 1, until)
    if after is not None:
        end = min(end, after[0] + 1)
    rows = window_rows
    width = (newest - oldest + 1) * rows // count + 1
    found: list[TraceRow] = []
    while end > floor:
        window_began = clock()
        start, end, held, width = _window(db, floor, end, width, rows)
        while held and end > start and len(found) <= limit:
            missing = limit + 1 - len(found)
            first = start if held <= few_rows else _page_start(db, wanted, start, end, missing)
            if first is None:
                break
            found += _rows(db, wanted, first, end, after, missing)
            end = first
        if len(found) > limit:
            last = found[limit - 1]
            following = make_cursor(_KIND, last.start_ns, last.trace_id)
            return TracePage(found[:limit], following, None)
        end, now = start, clock()
        if end > floor and now - began >= seconds:
            return TracePage(found, make_cursor(_KIND, end, _NO_ID), end)
        # As many rows as at this pace can be searched in the time that is left.
        pace = held / max(now - window_began, 1e-6)
        grown = min(int(pace * (seconds - (now - began))), _GROWTH * rows)
        rows, before = max(window_rows, grown), rows
        width = max(1, width * rows // before)
    return TracePage(found, None, None)


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


def _page_start(db: Cursor, wanted: TraceFilter, start: int, end: int, count: int) -> int | None:
    """From when on to look for the ``count`` newest traces that are wanted: there may be fewer
    after it, and then others before. None where there is none."""
    where = wanted.by_key(start, end)
    rows = db.execute(
        f"SELECT start_ns FROM traces {where.sql} ORDER BY start_ns DESC LIMIT ?",
        [*where.parameters, count],
    ).fetchall()
    if len(rows) == count or (rows and wanted.has_signal is not False):
        return int(rows[-1][0])
    if wanted.has_signal is not False:
        return None
    # One whose key is that of a trace with a signal is not among them.
    where = wanted.of_traces(start, end)
    there = one(db, f"SELECT 1 FROM traces {where.sql} LIMIT 1", where.parameters)
    return start if there else None


def _rows(
    db: Cursor, wanted: TraceFilter, start: int, end: int, after: After | None, count: int
) -> list[TraceRow]:
    where = wanted.exactly(start, end)
    if after is not None and end > after[0]:
        where.add("(start_ns < ? OR trace_id < ?)", *after)
    rows = db.execute(
        f"SELECT {TRACE} FROM traces {where.sql} ORDER BY start_ns DESC, trace_id DESC LIMIT ?",
        [*where.parameters, count],
    ).fetchall()
    return [trace_row(row, []) for row in rows]
