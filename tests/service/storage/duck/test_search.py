"""Pages of traces are the same however the search goes on, and say where it stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from betrace.service.storage.duck import search as tracesearch
from betrace.service.storage.duck.queries import TRACE, trace_row
from betrace.service.storage.duck.schema import SCHEMA
from betrace.service.storage.duck.search import TraceFilter, search
from betrace.service.storage.duck.store import DuckStore
from tests.service.storage.duck.test_store import columns, make
from tests.support.examples import examples

MAX = 2**63 - 1


@pytest.fixture(scope="module")
def db() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(":memory:") as connection:
        connection.execute(SCHEMA)
        yield connection


def put(db: Any, rows: list[tuple[int, int, int, int, bool]]) -> None:
    """Rows of (start, duration, service, key that several ids have or 0, whether with a signal)."""
    db.execute("DELETE FROM traces")
    db.execute("DELETE FROM signals")
    for number, (start, duration, service, shared, signalled) in enumerate(rows):
        key = shared or 1000 + number
        trace_id = (number << 64 | (number ^ key)).to_bytes(16, "big")
        db.execute(
            "INSERT INTO traces VALUES (?, ?, ?, ?, 0, 0, 1, 0, ?, NULL, ?, [], false, 'v')",
            [trace_id, key, start, start + duration, f"n{service}", [f"s{service}", "all"]],
        )
        if signalled:
            db.execute(
                "INSERT INTO signals BY NAME SELECT * FROM (SELECT ?::BLOB AS id, 1 AS key, "
                "1 AS seq, 'r' AS rule_id, 'v' AS rule_version, 'high' AS severity, "
                "'raised' AS kind, ? AS status, 'never' AS clause, ?::BLOB AS trace_id, "
                "?::UBIGINT AS trace_key, 0 AS detected_at, false AS early, '{}' AS counts, "
                "'[]' AS evidence, '{}' AS labels, '' AS message)",
                [trace_id, "active" if number % 5 else "retracted", trace_id, key],
            )


def expected(db: Any, wanted: TraceFilter) -> list[Any]:
    since, until = wanted.since, wanted.until
    conditions = ["start_ns >= ?", "start_ns < ?"]
    values: list[Any] = [-MAX if since is None else since, MAX if until is None else until]
    if wanted.service is not None:
        conditions.append("list_contains(services, ?)")
        values.append(wanted.service)
    if wanted.name is not None:
        conditions.append("root_name = ?")
        values.append(wanted.name)
    if wanted.min_duration is not None:
        conditions.append("end_ns - start_ns >= ?")
        values.append(wanted.min_duration)
    if wanted.has_signal is not None:
        no = "" if wanted.has_signal else "NOT"
        conditions.append(
            f"trace_id {no} IN (SELECT trace_id FROM signals WHERE status = 'active')"
        )
    found = db.execute(
        f"SELECT {TRACE} FROM traces WHERE {' AND '.join(conditions)} "
        "ORDER BY start_ns DESC, trace_id DESC",
        values,
    ).fetchall()
    return [trace_row(row, []) for row in found]


STARTS = st.one_of(st.integers(0, 30), st.integers(1000, 1005), st.sampled_from([-5, 10**18]))
ROWS = st.lists(
    st.tuples(STARTS, st.integers(0, 9), st.integers(0, 2), st.integers(0, 3), st.booleans()),
    max_size=25,
)
FILTERS = st.builds(
    TraceFilter,
    st.sampled_from([None, "all", "s1", "none"]),
    st.sampled_from([None, "n0", "none"]),
    st.sampled_from([None, 0, 7, 100]),
    st.sampled_from([None, True, False]),
    st.none() | st.integers(-10, 1010),
    st.none() | st.integers(-10, 1010),
)


@example(
    [(0, 0, 0, 0, False), (-5, 0, 0, 0, False)], TraceFilter(since=0), 1, 1, 0.0, 0
)  # a trace from before 1970 is not wanted since 1970
@settings(max_examples=examples(100), deadline=None)
@given(
    ROWS,
    FILTERS,
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from([0.0, 3.5, 1e9]),
    st.sampled_from([0, 3, 100]),
)
def test_any_pages_together_are_all_that_is_wanted(db, rows, wanted, limit, window, seconds, few):
    put(db, rows)
    found: list[Any] = []
    cursor = None
    for _ in range(200):
        page = search(
            db,
            wanted,
            limit=limit,
            cursor=cursor,
            seconds=seconds,
            window_rows=window,
            few_rows=few,
            clock=itertools.count().__next__,
        )
        found += page.rows
        assert len(page.rows) <= limit
        everything = expected(db, wanted)
        if page.searched_to is None:
            assert page.next is None or len(page.rows) == limit
        else:  # exact down to there
            newer = [row for row in everything if row.start_ns >= page.searched_to]
            assert found[: len(newer)] == newer
            assert page.next is not None
        cursor = page.next
        if cursor is None:
            break
    assert cursor is None
    assert found == everything


def test_a_search_that_takes_long_stops_and_says_how_far_it_got(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tracesearch, "_FEW_ROWS", 0)
    with DuckStore(tmp_path) as store:
        store.write("shop", traces=columns(*range(1, 101)), signals=[make(3)])
        with store._files.use("shop") as db:
            nobody = TraceFilter(service="nobody")
            page = search(db, nobody, seconds=0, window_rows=10)
            assert (page.rows, page.next is None) == ([], False)
            assert page.searched_to is not None
            pages = 1
            while page.next:
                before = page.searched_to
                page = search(db, nobody, seconds=0, window_rows=10, cursor=page.next)
                assert page.searched_to is None or page.searched_to < before
                pages += 1
            assert 5 <= pages <= 12
            assert page == ([], None, None)
            # With time enough it is one page.
            assert search(db, nobody, seconds=60, window_rows=10) == ([], None, None)


def test_one_wrong_clock_does_not_make_one_large_window(tmp_path: Path):
    asked: list[int] = []

    class Counting:
        def __init__(self, db: Any) -> None:
            self.db = db

        def execute(self, query: str, values: Any = ()) -> Any:
            if "list_contains" in query:
                count = "SELECT count(*) FROM traces WHERE start_ns >= ? AND start_ns < ?"
                asked.append(self.db.execute(count, values[:2]).fetchall()[0][0])
            return self.db.execute(query, values)

    with DuckStore(tmp_path) as store:
        start = np.arange(1000, dtype=np.int64) + 1_700_000_000 * 10**9
        start[500], start[501] = 5, 4_000_000_000 * 10**9
        store.write_traces("shop", columns(*range(1000), start_ns=start, end_ns=start + 5))
        with store._files.use("shop") as db:
            nobody = TraceFilter(service="nobody")
            page = search(Counting(db), nobody, seconds=60, window_rows=100, few_rows=0)
    assert page == ([], None, None)
    assert sum(asked) == 1000
    assert len(asked) >= 3
    assert max(asked) <= 800  # the second window may be four times the first
