"""The query store: what is written can be asked for, and damage is told, not passed on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.service.config.stores import DuckDb
from betrace.service.signals import Kind, Signal, signal_id
from betrace.service.storage.duck import instance as duckinstance
from betrace.service.storage.duck import memory as duckmemory
from betrace.service.storage.duck.arrow import (
    MOST_POSITIONS,
    frames_table,
    trace_id_array,
    trace_id_halves,
    trace_ids,
    traces_table,
)
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.queries import (
    BadQuery,
    SignalFilter,
    StoredSignal,
    SummaryRow,
)
from betrace.service.storage.duck.schema import StoreCorrupt, StoreError
from betrace.service.storage.duck.search import TraceFilter
from betrace.service.storage.duck.store import DuckStore, RowCounts
from tests.support.examples import examples

SECOND = 10**9


def make(
    number: int, rule: str = "r1", kind: Kind = Kind.RAISED, tenant: str = "shop", **changes: Any
) -> Signal:
    trace = f"{number:032x}"
    values: dict[str, Any] = {
        "severity": "high",
        "clause": "never",
        "detected_at": number * SECOND,
        "early": number % 2 == 0,
        "counts": {"pay": 2**40, "ship.*": 0},
        "evidence": {"pay": ["00f067aa0ba902b7"]},
        "message": "paid twice – größer ' \"",
        "labels": {"team": "checkout"},
        "reason": None if kind is Kind.RAISED else "late spans",
    }
    return Signal(
        id=signal_id(tenant, rule, "v1", trace, kind),
        tenant=tenant,
        rule_id=rule,
        rule_version="v1",
        kind=kind,
        trace_id=trace,
        **values | changes,
    )


def columns(*numbers: int, **changes: Any) -> dict[str, Any]:
    n = len(numbers)
    at = np.array(numbers, np.int64) * SECOND
    return {
        "trace_hi": np.zeros(n, np.int64),
        "trace_lo": np.array(numbers, np.int64),
        "start_ns": at,
        "end_ns": at + np.array(numbers, np.int64),
        "first_seen_ns": at,
        "last_seen_ns": at,
        "spans": np.full(n, 10),
        "errors": np.zeros(n, np.int64),
        "root_name": ["GET /" if i % 2 else None for i in numbers],
        "root_service": ["web"] * n,
        "services": [["web", f"s{i % 3}"] for i in numbers],
        "positions": [[i, i + 1] for i in numbers],
        "partial": np.zeros(n, np.bool_),
        "rules_version": ["v1"] * n,
    } | changes


def trace_id(number: int) -> str:
    return f"{number:032x}"


def limits(**changes: Any) -> DuckDb:
    """The default limits with changes, which may be outside the allowed ranges."""
    return DuckDb.model_construct(**(dict(DuckDb()) | changes))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DuckStore]:
    with DuckStore(tmp_path, limits(pool_timeout_seconds=0.2)) as store:
        yield store


def ids(found: tuple[list[StoredSignal], str | None]) -> list[int]:
    return [int(each.signal.trace_id, 16) for each in found[0]]


class TestSignals:
    def test_a_signal_comes_back_whole(self, store: DuckStore) -> None:
        one, two = make(1), make(2, labels={}, counts={}, evidence={})
        assert store.write_signals("shop", [one, two]) == 2
        assert store.signal("shop", one.id) == StoredSignal(one, "active", 1)
        assert store.signal("shop", two.id) == StoredSignal(two, "active", 2)
        assert store.signal("shop", "0" * 32) is None

    def test_a_repeat_changes_nothing(self, store: DuckStore) -> None:
        assert store.write_signals("shop", [make(1), make(2), make(1)]) == 2
        again = make(1, message="told differently")
        assert store.write_signals("shop", [again, make(3)]) == 1
        assert store.signal("shop", again.id) == StoredSignal(make(1), "active", 1)
        assert store.write_signals("shop", []) == 0

    def test_the_first_of_two_in_one_batch_stays(self, store: DuckStore) -> None:
        store.write_signals("shop", [make(1), make(1, message="second")])
        found = store.signal("shop", make(1).id)
        assert found is not None
        assert found.signal == make(1)

    @pytest.mark.parametrize("order", ["before", "after", "together", "together, turned"])
    def test_a_retraction_marks_what_it_retracts(self, store: DuckStore, order: str) -> None:
        raised, retracted = make(1), make(1, kind=Kind.RETRACTED)
        batches = {
            "before": [[retracted], [raised]],
            "after": [[raised], [retracted]],
            "together": [[raised, retracted]],
            "together, turned": [[retracted, raised]],
        }[order]
        store.write_signals("shop", [make(2)])
        assert sum(store.write_signals("shop", batch) for batch in batches) == 2
        for each in (raised, retracted):
            found = store.signal("shop", each.id)
            assert found is not None
            assert (found.signal, found.status) == (each, "retracted")
        assert store.write_signals("shop", [raised]) == 0
        assert ids(store.signals("shop", SignalFilter(status="active"))) == [2]
        assert ids(store.signals("shop", SignalFilter(status="retracted"))) == [1, 1]

    def test_filters(self, store: DuckStore) -> None:
        store.write_signals(
            "shop",
            [make(i, f"r{i % 3}", severity="low" if i % 2 else "high") for i in range(10)],
        )
        assert ids(store.signals("shop")) == list(range(9, -1, -1))
        assert ids(store.signals("shop", SignalFilter(rule="r1"))) == [7, 4, 1]
        assert ids(store.signals("shop", SignalFilter(rule="r1", severity="low"))) == [7, 1]
        assert ids(store.signals("shop", SignalFilter(trace_id=trace_id(4)))) == [4]
        assert ids(store.signals("shop", SignalFilter(since=3 * SECOND, until=6 * SECOND))) == [
            5,
            4,
            3,
        ]
        assert ids(store.signals("shop", SignalFilter(rule="' OR 1=1 --"))) == []
        assert ids(store.signals("other")) == []

    def test_pages(self, store: DuckStore) -> None:
        """Many signals of the same time, and others stored while the pages are read."""
        at: dict[str, Any] = {"detected_at": 5 * SECOND}
        store.write_signals("shop", [make(i, **at) for i in range(7)] + [make(9), make(3, "r2")])
        everything, none = store.signals("shop")
        assert none is None
        seen: list[StoredSignal] = []
        cursor = None
        for _ in range(5):
            page, cursor = store.signals("shop", limit=2, cursor=cursor)
            seen += page
            store.write_signals("shop", [make(100 + len(seen))])
        assert seen == everything
        assert cursor is None

    @settings(max_examples=examples(30), deadline=None)
    @given(cursor=st.text(max_size=40) | st.binary(max_size=30).map(lambda b: b.hex()))
    def test_a_forged_cursor_is_refused(self, cursor: str) -> None:
        store = self.forged
        with pytest.raises(BadQuery, match="cursor"):
            store.signals("shop", cursor=cursor)

    @pytest.fixture(autouse=True, scope="class")
    def _shared(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[None]:
        with DuckStore(tmp_path_factory.mktemp("forged")) as store:
            store.write_signals("shop", [make(1)])
            request.cls.forged = store
            yield

    forged: DuckStore

    def test_a_cursor_of_another_list_is_refused(self, store: DuckStore) -> None:
        store.write("shop", signals=[make(1), make(2)], traces=columns(1, 2))
        _, cursor = store.signals("shop", limit=1)
        with pytest.raises(BadQuery, match="does not belong to this list"):
            store.traces("shop", cursor=cursor)

    def test_invalid_queries(self, store: DuckStore) -> None:
        store.write_signals("shop", [make(1)])
        for limit in (0, -1, 1001):
            with pytest.raises(BadQuery, match="limit must be 1 to 1000"):
                store.signals("shop", limit=limit)
        for bad in ("", "x" * 32, "12", "é" * 32):
            with pytest.raises(BadQuery, match="32 hexadecimal digits"):
                store.signal("shop", bad)
            with pytest.raises(BadQuery, match="trace_id"):
                store.signals("shop", SignalFilter(trace_id=bad))
        with pytest.raises(BadQuery, match="buckets"):
            store.summary("shop", 0, 10_001, 1)
        with pytest.raises(BadQuery, match="buckets"):
            store.summary("shop", 0, 1, 0)

    def test_signals_after(self, store: DuckStore) -> None:
        store.write_signals("shop", [make(5), make(1)])
        store.write_signals("shop", [make(1), make(3)])
        found = store.signals_after("shop", 0)
        assert [int(each.signal.trace_id, 16) for each in found] == [5, 1, 3]
        assert store.signals_after("shop", found[0].seq, limit=1) == found[1:2]
        assert store.signals_after("shop", found[-1].seq) == []
        assert store.signals_after("other", 0) == []

    def test_summary(self, store: DuckStore) -> None:
        store.write_signals("shop", [make(i, severity="low") for i in range(12)])
        store.write_signals("shop", [make(11, "r2"), make(10, kind=Kind.RETRACTED)])
        assert store.summary("shop", 2 * SECOND, 12 * SECOND, 10 * SECOND) == [
            SummaryRow(0, "r1", "low", 8, 0),
            SummaryRow(10 * SECOND, "r1", "low", 2, 1),
            SummaryRow(10 * SECOND, "r2", "high", 1, 0),
        ]
        assert store.summary("other", 0, SECOND, SECOND) == []


class TestTraces:
    def test_a_trace_comes_back(self, store: DuckStore) -> None:
        assert store.write_traces("shop", columns(7, 8)) == 2
        found = store.trace("shop", trace_id(7).upper())
        assert found is not None
        assert (found.trace_id, found.start_ns, found.end_ns) == (
            trace_id(7),
            7 * SECOND,
            7 * SECOND + 7,
        )
        assert (found.root_name, found.root_service) == ("GET /", "web")
        assert (found.services, found.positions) == (["web", "s1"], [7, 8])
        assert (found.spans, found.errors, found.partial) == (10, 0, False)
        assert store.trace("shop", trace_id(99)) is None
        assert store.trace("other", trace_id(7)) is None

    def test_a_trace_is_replaced(self, store: DuckStore) -> None:
        store.write_traces("shop", columns(1, 2))
        store.write_traces("shop", columns(2, 3, spans=[77, 78], partial=[True, False]))
        assert store.counts("shop") == RowCounts(signals=0, traces=3, frames=0)
        found = store.find_traces("shop", [trace_id(2), trace_id(1), trace_id(9), trace_id(2)])
        assert {key: row.spans for key, row in found.items()} == {trace_id(1): 10, trace_id(2): 77}
        assert found[trace_id(2)].partial

    def test_a_trace_closed_again_keeps_its_earlier_frames(self, store: DuckStore) -> None:
        store.write_traces("shop", columns(1, 2))
        store.write_traces("shop", columns(1, positions=[[9, 2, 1]]))
        row = store.trace("shop", trace_id(1))
        assert row is not None
        assert row.positions == [1, 2, 9]
        for first in range(0, 2 * MOST_POSITIONS, 1000):
            positions = [list(range(first, first + 1000))]
            store.write_traces("shop", columns(2, positions=positions))
        row = store.trace("shop", trace_id(2))
        assert row is not None
        assert (len(row.positions), row.positions[-1]) == (MOST_POSITIONS, 8999)

    def test_the_last_of_two_in_one_batch_stays(self, store: DuckStore) -> None:
        store.write_traces(
            "shop", columns(1, 2, 1, spans=[5, 6, 7], positions=[[8, 9], [3], [1, 8]])
        )
        found = store.find_traces("shop", [trace_id(1), trace_id(2)])
        assert [found[trace_id(i)].spans for i in (1, 2)] == [7, 6]
        assert [found[trace_id(i)].positions for i in (1, 2)] == [[1, 8, 9], [3]]

    def test_a_late_row_does_not_hide_a_newer_one(self, store: DuckStore) -> None:
        """A dead letter is written after what came of the trace since."""
        newer = columns(1, 2, last_seen_ns=np.array([50, 60]), spans=[9, 9])
        older = columns(1, last_seen_ns=np.array([40]), spans=[4], positions=[[0]])
        store.write_traces("shop", newer)
        store.write_traces("shop", older)
        row = store.trace("shop", trace_id(1))
        assert row is not None
        assert (row.spans, row.positions) == (9, [0, 1, 2])
        both = columns(3, 3, last_seen_ns=np.array([60, 50]), spans=[8, 7], positions=[[4], [3]])
        store.write_traces("shop", both)
        row = store.trace("shop", trace_id(3))
        assert row is not None
        assert (row.spans, row.positions) == (8, [3, 4])

    def test_spilled_positions_are_put_together(self, store: DuckStore) -> None:
        store.write_traces("shop", columns(1, 2, positions=[[30, 31], [5]]))
        ids_ = trace_id_array(np.zeros(3, np.int64), np.array([1, 1, 2]))
        chunks = {"trace_id": ids_, "positions": [[20, 21], [10, 11, 20], []]}
        assert store.write_frames("shop", chunks) == 2
        store.write_frames("shop", chunks)
        found = store.find_traces("shop", [trace_id(1), trace_id(2)])
        assert found[trace_id(1)].positions == [10, 11, 20, 21, 30, 31]
        assert found[trace_id(2)].positions == [5]
        assert store.counts("shop").frames == 2
        assert store.spilled("shop", trace_id(1)) == [10, 11, 20, 21]
        assert store.spilled("shop", trace_id(2)) == store.spilled("other", trace_id(1)) == []

    def test_many_traces_at_once(self, store: DuckStore) -> None:
        store.write_traces("shop", columns(*range(1000)))
        found = store.find_traces("shop", [trace_id(i) for i in range(500, 1500)])
        assert sorted(found) == [trace_id(i) for i in range(500, 1000)]

    def test_filters(self, store: DuckStore) -> None:
        store.write("shop", traces=columns(*range(1, 10)), signals=[make(3), make(4)])
        store.write_signals("shop", [make(4, kind=Kind.RETRACTED)])

        def found(**filters: Any) -> list[int]:
            rows, _, _ = store.traces("shop", TraceFilter(**filters))
            assert all(row.positions == [] for row in rows)
            return [int(row.trace_id, 16) for row in rows]

        assert found() == [9, 8, 7, 6, 5, 4, 3, 2, 1]
        assert found(service="s0") == [9, 6, 3]
        assert found(name="GET /", since=2 * SECOND, until=8 * SECOND) == [7, 5, 3]
        assert found(min_duration=8) == [9, 8]
        assert found(has_signal=True) == [3]
        assert found(has_signal=False, until=5 * SECOND) == [4, 2, 1]
        assert store.traces("other") == ([], None, None)

    def test_pages(self, store: DuckStore) -> None:
        same = np.full(7, 5 * SECOND)
        store.write_traces("shop", columns(*range(7), start_ns=same))
        seen, cursor, _ = store.traces("shop", limit=3)
        while cursor:
            page, cursor, _ = store.traces("shop", limit=3, cursor=cursor)
            seen += page
        assert seen == store.traces("shop")[0]
        assert len(seen) == 7

    def test_trace_ids(self, store: DuckStore) -> None:
        hi = np.array([-1, 2**63 - 1, 0, -(2**63)], np.int64)
        lo = np.array([-(2**63), 0, -5, 1], np.int64)
        store.write_traces("shop", columns(1, 2, 3, 4, trace_hi=hi, trace_lo=lo))
        found = store.trace_ids("shop")
        assert sorted(map(tuple, found.tolist())) == sorted(
            zip(hi.tolist(), lo.tolist(), strict=True)
        )
        assert len(store.trace_ids("shop", since=3 * SECOND)) == 2
        assert store.trace_ids("other").shape == (0, 2)

    def test_signals_that_are_missing_are_added(self, store: DuckStore) -> None:
        taken_back = make(1, kind=Kind.RETRACTED)
        assert store.add_missing("shop", [make(2), taken_back]) == 2
        assert store.add_missing("shop", [make(1), make(2), taken_back, make(3)]) == 2
        assert store.add_missing("shop", [make(1), make(3)]) == 0
        found = {(s.signal.trace_id, s.signal.kind): s.status for s in store.signals("shop")[0]}
        assert found == {
            (trace_id(1), Kind.RAISED): "retracted",
            (trace_id(1), Kind.RETRACTED): "retracted",
            (trace_id(2), Kind.RAISED): "active",
            (trace_id(3), Kind.RAISED): "active",
        }

    def test_trace_ids_with_frames_up_to_a_position(self, store: DuckStore) -> None:
        spilled = {
            "trace_id": trace_id_array(np.zeros(1, np.int64), np.array([9])),
            "positions": [[2]],
        }
        store.write("shop", traces=columns(1, 5, 9), frames=spilled)

        def found(upto: int) -> list[int]:
            return sorted(lo for _, lo in store.trace_ids("shop", 0, upto).tolist())

        assert found(0) == []
        assert found(1) == [1]
        assert found(4) == [1, 9]
        assert found(5) == [1, 5, 9]

    def test_expiry(self, store: DuckStore) -> None:
        store.write(
            "shop",
            traces=columns(1, 2, 3),
            signals=[make(1)],
            frames={
                "trace_id": trace_id_array(np.zeros(3, np.int64), np.array([1, 3, 77])),
                "positions": [[1], [3], [7]],
            },
        )
        assert store.expire("shop", 3 * SECOND) == 2
        # kept: the frames of a trace that is still open, and all signals
        assert store.counts("shop") == RowCounts(signals=1, traces=1, frames=2)
        assert store.expire("other", 3 * SECOND) == 0

    def test_known_and_new_rows_in_one_write(self, store: DuckStore) -> None:
        frames = {"trace_id": [bytes(16)], "positions": [[1, 2]]}
        for spans in (5, 6):
            new = store.write(
                "shop",
                traces=columns(1, spans, spans=[spans, 1]),
                signals=[make(1), make(spans)],
                frames=frames,
            )
            assert new == (2 if spans == 5 else 1)
        assert store.counts("shop") == RowCounts(signals=3, traces=3, frames=1)
        found = store.trace("shop", trace_id(1))
        assert found is not None
        assert found.spans == 6

    def test_a_missing_value_is_an_error(self, store: DuckStore) -> None:
        with pytest.raises(StoreError, match="NOT NULL") as caught:
            store.write_traces("shop", columns(1, rules_version=[None]))
        assert not caught.value.transient

    def test_all_or_nothing(self, store: DuckStore) -> None:
        store.write_traces("shop", columns(1))
        bad = make(1, detected_at=2**70)
        with pytest.raises((OverflowError, pa.ArrowInvalid)):
            store.write("shop", traces=columns(2), signals=[bad])
        assert store.counts("shop") == RowCounts(0, 1, 0)


class TestTables:
    def test_columns_in_their_forms_are_equal(self) -> None:
        given_ = columns(1, 2, positions=[[1], [2, 3]])
        lists = traces_table(given_)
        pairs = traces_table(
            given_
            | {
                "positions": (np.array([1, 2, 3]), np.array([0, 1, 3])),
                "services": (["web", "s1", "web", "s2"], [0, 2, 4]),
            }
        )
        assert pairs == lists
        assert traces_table(lists.select(lists.schema.names[::-1])) == lists

    def test_halves_of_ids(self) -> None:
        halves = np.array([[1, -1], [-(2**63), 2**63 - 1], [5, 6]], np.int64)
        array = trace_id_array(halves[:, 0], halves[:, 1])
        assert array[0].as_py().hex() == "0000000000000001ffffffffffffffff"
        assert trace_id_halves(array).tolist() == halves.tolist()
        assert trace_id_halves(array[1:]).tolist() == halves[1:].tolist()

    def test_ids_as_bytes(self) -> None:
        halves = np.array([[256, 0], [-1, 1 << 60], [5, 6]], np.int64)  # zero bytes at the ends
        array = trace_id_array(halves[:, 0], halves[:, 1])
        assert trace_ids(array) == array.to_pylist()
        assert trace_ids(array[1:]) == array[1:].to_pylist()
        assert trace_ids(pa.chunked_array([array, array[2:]])) == [
            *trace_ids(array),
            array[2].as_py(),
        ]
        assert trace_ids(array[:0]) == []

    def test_a_column_of_the_wrong_type_is_named(self) -> None:
        given_ = columns(1)
        del given_["spans"]
        with pytest.raises(ValueError, match="'spans' is missing"):
            traces_table(given_)
        with pytest.raises(ValueError, match="do not match"):
            traces_table(columns(1, spans=["many"]))
        with pytest.raises(ValueError, match="missing"):
            frames_table(pa.table({"trace_id": [b"1" * 16]}))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestFiles:
    def test_layout_and_restart(self, tmp_path: Path) -> None:
        with DuckStore(tmp_path / "it's") as store:
            store.write("shop", signals=[make(1)], traces=columns(1))
            assert (tmp_path / "it's/shop/betrace.duckdb").is_file()
        store.close()
        with DuckStore(tmp_path / "it's") as store:
            assert store.tenants() == ["shop"]
            assert store.counts("shop") == RowCounts(1, 1, 0)
        with pytest.raises(StoreError, match="closed"):
            store.counts("shop")

    @pytest.mark.parametrize(
        "tenant", ["main", "temp", "system", "memory", "0-0", "select", "a" * 63]
    )
    def test_any_tenant_name(self, store: DuckStore, tenant: str) -> None:
        store.write_signals(tenant, [make(1)])
        assert ids(store.signals(tenant)) == [1]

    @pytest.mark.parametrize("tenant", ["", "..", 'a"b', "a/b", "A", "a;b"])
    def test_a_bad_tenant_name_is_refused(self, store: DuckStore, tenant: str) -> None:
        with pytest.raises(ValueError, match="bad tenant name"):
            store.write_signals(tenant, [make(1)])
        with pytest.raises(ValueError, match="bad tenant name"):
            store.signals(tenant)

    def test_closing_interrupts_what_does_not_end(self, tmp_path: Path) -> None:
        """A thread that was left behind does not keep the store from closing."""
        begun, errors = threading.Semaphore(0), []
        store = DuckStore(tmp_path, limits(pool_timeout_seconds=0.5))
        store.write_signals("a", [make(1)])

        def work(write: bool) -> None:
            def ask() -> None:
                with store._files.use("a", write=write) as db:
                    begun.release()
                    db.execute("SELECT count(*) FROM range(10_000_000_000) WHERE hash(range) = 1")

            with pytest.raises(StoreError, match="Interrupted") as caught:
                ask()
            errors.append(caught.value.transient)

        threads = [threading.Thread(target=work, args=(write,)) for write in (False, True)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=60)
        store.close()
        for thread in threads:
            thread.join(60)
        assert errors == [True, True]
        with pytest.raises(StoreError, match="closed"):
            store.counts("a")
        with DuckStore(tmp_path) as store:
            assert store.counts("a").signals == 1

    def test_closing_waits_for_what_ends(self, tmp_path: Path) -> None:
        store = DuckStore(tmp_path, limits(pool_timeout_seconds=60))
        begun = threading.Event()

        def work() -> None:
            with store._files.use("a", write=True) as db:
                begun.set()
                time.sleep(0.1)
                db.execute("INSERT INTO meta VALUES (2, 3)").fetchall()

        thread = threading.Thread(target=work)
        thread.start()
        begun.wait(60)
        store.close()
        thread.join(60)
        with duckdb.connect(str(tmp_path / "a/betrace.duckdb")) as db:
            assert db.execute("SELECT count(*) FROM meta").fetchall() == [(2,)]

    def test_queries_create_no_files(self, store: DuckStore, tmp_path: Path) -> None:
        assert store.signals("nobody") == ([], None)
        assert store.signal("nobody", "0" * 32) is None
        assert store.counts("nobody") == RowCounts(0, 0, 0)
        assert not (tmp_path / "nobody").exists()

    def test_idle_files_are_closed_and_opened_again(self, tmp_path: Path) -> None:
        clock = Clock()
        with DuckStore(tmp_path, limits(idle_close_seconds=60), clock=clock) as store:
            store.write_signals("a", [make(1)])
            clock.now = 30
            store.write_signals("b", [make(1)])
            assert store.connections() == {"a": 1, "b": 1}
            clock.now = 60
            assert store.sweep() == 1
            assert store.connections() == {"b": 1}
            assert ids(store.signals("a")) == [1]
            assert store.attached == 2

    def test_the_number_of_open_files_is_bounded(self, tmp_path: Path) -> None:
        clock = Clock()
        with DuckStore(tmp_path, attached_max=3, clock=clock) as store:
            for i in range(8):
                clock.now = i
                store.write_signals(f"t{i}", [make(i)])
            assert set(store.connections()) == {"t5", "t6", "t7"}
            assert [ids(store.signals(f"t{i}")) for i in range(8)] == [[i] for i in range(8)]

    def test_rows_that_only_memory_holds_are_bounded(self, tmp_path: Path) -> None:
        """Each tenant's first rows cost DuckDB memory until its file is checkpointed."""
        clock = Clock()
        with DuckStore(tmp_path, limits(memory_bytes=20 << 20), clock=clock) as store:
            for i in range(30):
                clock.now = i
                store.write(f"t{i:02}", signals=[make(i)], traces=columns(i))
            logs = sorted(path.parent.name for path in tmp_path.glob("t*/*.wal"))
            assert 10 <= len(logs) <= 20
            assert logs[-1] == "t29"  # those written longest ago are saved
            assert "t00" not in logs
            assert [store.counts(f"t{i:02}") for i in range(30)] == [RowCounts(1, 1, 0)] * 30

    @pytest.mark.slow
    @pytest.mark.parametrize("by", ["the store", "DuckDB"])
    def test_pages_of_files_are_dropped_after_a_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
    ) -> None:
        if by == "the store":
            monkeypatch.setattr(duckmemory, "_SAVED_BYTES", 1)
            monkeypatch.setattr(duckmemory, "_SAVED_SECONDS", (0.0, 0.0))
        else:
            monkeypatch.setattr(duckinstance, "_CHECKPOINT_SIZE", "4MB")
        clock = Clock()
        with DuckStore(tmp_path, limits(memory_bytes=64 << 20), clock=clock) as store:

            def held() -> dict[str, int]:
                with store._files.use("shop") as db:
                    limit = db.execute("SELECT current_setting('memory_limit')").fetchall()
                    assert limit == [("64.0 MiB",)]
                    return duckmemory.used(db)

            most = 0
            for clock.now in range(12):
                first = 10_000 * clock.now
                store.write_signals("shop", [make(first + i) for i in range(10_000)])
                most = max(most, held()["BASE_TABLE"])
            assert 0 < most <= 3 << 20  # a thirty-second part of 64 MiB, and what is open
            file = tmp_path / "shop/betrace.duckdb"
            assert file.stat().st_size > 6 << 20
            assert store.counts("shop").signals == 120_000
            assert len(store.signals("shop", limit=1000)[0]) == 1000

    def test_a_long_log_is_checkpointed_within_a_minute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(duckmemory, "_SAVED_BYTES", 1)
        monkeypatch.setattr(duckmemory, "_SAVED_SECONDS", (60.0, 60.0))
        clock, log = Clock(), tmp_path / "shop/betrace.duckdb.wal"
        with DuckStore(tmp_path, clock=clock) as store:
            for clock.now in (100, 159, 160):  # the file is new at 100
                store.write_signals("shop", [make(clock.now)])
                assert log.stat().st_size
            clock.now = 161
            store.write_signals("shop", [make(161)])
            assert not log.exists()
            clock.now = 200
            store.write_signals("shop", [make(200)])
            assert log.stat().st_size  # a minute from 161 on
            assert store.counts("shop").signals == 5

    def test_a_file_that_is_being_written_is_not_checkpointed(self, tmp_path: Path) -> None:
        with DuckStore(tmp_path, limits(memory_bytes=20 << 20)) as store:
            store.write_signals("busy", [make(1)])
            with store._files.use("busy", write=True) as db:
                db.execute("DELETE FROM signals").fetchall()
                for i in range(22):
                    store.write_signals(f"t{i}", [make(i)])
                assert (tmp_path / "busy/betrace.duckdb.wal").exists()
            assert store.counts("busy").signals == 0

    def test_connections_are_bounded(self, tmp_path: Path) -> None:
        with DuckStore(tmp_path, limits(pool_max=2, pool_timeout_seconds=0.05)) as store:
            store.write_signals("a", [make(1)])
            with store._files.use("a"), store._files.use("a"):
                assert store.connections() == {"a": 2}
                with pytest.raises(PoolTimeout, match="tenant a: all 2 connections"):
                    store.signals("a")
                assert store.signals("b") == ([], None)
            assert store.connections() == {"a": 1}

    def test_a_second_writer_waits_then_gets_an_error(self, store: DuckStore) -> None:
        with (
            store._files.use("a", write=True),
            pytest.raises(PoolTimeout, match="another write"),
        ):
            store.write_signals("a", [make(1)])
        assert store.write_signals("a", [make(1)]) == 1

    def test_many_threads(self, tmp_path: Path) -> None:
        failures: list[BaseException] = []
        with DuckStore(tmp_path, limits(pool_timeout_seconds=30), attached_max=2) as store:

            def work(number: int) -> None:
                try:
                    for i in range(8):
                        tenant = f"t{(number + i) % 3}"
                        numbers = range(i, i + 20)
                        store.write(
                            tenant,
                            signals=[make(n, tenant=tenant) for n in numbers],
                            traces=columns(*numbers),
                        )
                        assert store.signals(tenant)[0]
                        store.sweep()
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            assert [store.counts(f"t{i}") for i in range(3)] == [RowCounts(27, 27, 0)] * 3

    def test_a_tenant_is_deleted(self, store: DuckStore, tmp_path: Path) -> None:
        for tenant in ("a", "b"):
            store.write_signals(tenant, [make(1)])
        (tmp_path / "b" / "rules").touch()
        store.remove("a")
        store.remove("b")
        store.remove("b")
        store.remove("c")
        assert [p.name for p in tmp_path.rglob("*") if not p.name.startswith(".")] == ["b", "rules"]
        with pytest.raises(StoreError, match="was deleted") as caught:
            store.write_signals("a", [make(2)])
        assert not caught.value.transient
        store.remove("a")
        assert not (tmp_path / "a").exists()
        assert store.signals("a") == ([], None)
        store.reopen("a")
        assert store.write_signals("a", [make(2)]) == 1
        assert ids(store.signals("a")) == [2]

    def test_a_write_left_behind_does_not_bring_a_deleted_tenant_back(
        self, store: DuckStore, tmp_path: Path
    ) -> None:
        store.write_signals("a", [make(1)])
        told: list[object] = []
        begun = threading.Event()

        def late() -> None:
            begun.set()
            try:
                told.append(store.write_signals("a", [make(2)]))
            except StoreError as error:
                told.append(str(error))

        with store._files._reserved("a") as file:  # as the deletion does
            thread = threading.Thread(target=late)
            thread.start()
            assert begun.wait(60)
            time.sleep(0.2)  # until it waits for the file
            file.deleted = True
            file.path.unlink()
        store.reopen("a")
        thread.join()
        assert told == ["tenant a was deleted: create it again first"]
        assert store.write_signals("a", [make(3)]) == 1
        assert ids(store.signals("a")) == [3]

    def test_a_disk_that_takes_no_new_file_is_an_error(
        self, store: DuckStore, tmp_path: Path
    ) -> None:
        (tmp_path / "a").touch()
        with pytest.raises(StoreError, match="check the disk") as caught:
            store.write_signals("a", [make(1)])
        assert caught.value.transient
        (tmp_path / "a").unlink()
        assert store.write_signals("a", [make(1)]) == 1

    def test_a_file_in_use_is_not_deleted(self, store: DuckStore) -> None:
        store.write_signals("a", [make(1)])
        with store._files.use("a"), pytest.raises(PoolTimeout, match="still in use"):
            store.remove("a")
        assert ids(store.signals("a")) == [1]


class TestDamage:
    def damage(self, path: Path, kind: str) -> None:
        data = bytearray(path.read_bytes())
        if kind == "garbage":
            data = bytearray(b"?" * 5000)
        elif kind == "empty":
            data = bytearray()
        elif kind == "cut":
            del data[9000:]
        else:
            for offset in range(12_288, len(data), 4099):
                data[offset] ^= 0x55
        path.write_bytes(data)

    @pytest.mark.parametrize("kind", ["garbage", "empty", "cut", "flipped"])
    def test_a_damaged_file_is_reported_and_rebuilt(self, tmp_path: Path, kind: str) -> None:
        with DuckStore(tmp_path) as store:
            store.write("shop", signals=[make(1)], traces=columns(1))
            store.write_signals("other", [make(9)])
        path = tmp_path / "shop/betrace.duckdb"
        self.damage(path, kind)
        with DuckStore(tmp_path) as store:
            for _ in range(2):
                with pytest.raises(StoreCorrupt, match="the service rebuilds it") as caught:
                    store.counts("shop")
                assert caught.value.tenant == "shop"
            assert ids(store.signals("other")) == [9]
            store.recreate("shop")
            assert store.counts("shop") == RowCounts(0, 0, 0)
            assert store.write_signals("shop", [make(1)]) == 1
            assert path.with_name("betrace.duckdb.damaged").exists()

    def test_a_deleted_file_is_created_again(self, tmp_path: Path) -> None:
        with DuckStore(tmp_path) as store:
            store.write_signals("shop", [make(1)])
            (tmp_path / "shop/betrace.duckdb").unlink()
            assert store.counts("shop") == RowCounts(0, 0, 0)
            assert store.write_signals("shop", [make(1), make(2)]) == 2
        with DuckStore(tmp_path) as store:
            assert store.counts("shop").signals == 2

    def test_a_log_without_its_file_is_dropped(self, tmp_path: Path) -> None:
        (tmp_path / "shop").mkdir()
        (tmp_path / "shop/betrace.duckdb.wal").write_bytes(b"stale" * 100)
        with DuckStore(tmp_path) as store:
            assert store.write_signals("shop", [make(1)]) == 1

    def test_what_was_committed_survives_a_crash(self, tmp_path: Path) -> None:
        script = (
            "import os, sys; from pathlib import Path\n"
            "from betrace.service.storage.duck.store import DuckStore\n"
            "from tests.service.storage.duck.test_store import make\n"
            "DuckStore(Path(sys.argv[1])).write_signals('shop', [make(1)]); os._exit(0)"
        )
        root = Path(__file__).parents[4]
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=True)
        assert (tmp_path / "shop/betrace.duckdb.wal").exists()
        with DuckStore(tmp_path) as store:
            assert ids(store.signals("shop")) == [1]

    def test_foreign_and_newer_files(self, tmp_path: Path) -> None:
        for tenant, statement in (
            ("foreign", "CREATE TABLE t (a INT)"),
            ("newer", "CREATE TABLE meta AS SELECT 99 AS version"),
            ("copied", "CREATE TABLE meta AS SELECT 2 AS version"),
        ):
            (tmp_path / tenant).mkdir()
            with duckdb.connect(str(tmp_path / tenant / "betrace.duckdb")) as db:
                db.execute(statement)
        with DuckStore(tmp_path) as store:
            with pytest.raises(StoreCorrupt, match="not a file of this program"):
                store.counts("foreign")
            with pytest.raises(StoreError, match=r"schema 99.*upgrade") as caught:
                store.counts("newer")
            assert not caught.value.transient
            # made by another program, with blocks of another size
            with store._files.use("copied") as db:
                assert db.execute("SELECT version FROM meta").fetchall() == [(2,)]

    def test_a_fatal_error_begins_a_new_instance(self, tmp_path: Path) -> None:
        with DuckStore(tmp_path) as store:
            store.write_signals("a", [make(1)])
            store.write_signals("b", [make(2)])
            with pytest.raises(StoreError, match="invalidated") as caught, store._files.use("a"):
                raise duckdb.FatalException("database has been invalidated")
            assert caught.value.transient
            assert ids(store.signals("a")) == [1]
            assert ids(store.signals("b")) == [2]
            assert store.write_signals("b", [make(3)]) == 1

    @pytest.mark.parametrize(
        ("kind", "transient"),
        [
            (duckdb.IOException, True),
            (duckdb.OutOfMemoryException, True),
            (duckdb.TransactionException, True),
            (duckdb.ConversionException, False),
        ],
    )
    def test_errors_are_transient_or_not(
        self, store: DuckStore, kind: type[duckdb.Error], transient: bool
    ) -> None:
        def fail() -> None:
            with store._files.use("a", write=True) as db:
                db.execute("INSERT INTO meta VALUES (7, 7)")
                raise kind("it did not work")

        with pytest.raises(StoreError, match="it did not work") as caught:
            fail()
        assert caught.value.transient is transient
        with store._files.use("a") as db:
            assert db.execute("SELECT count(*) FROM meta").fetchall() == [(1,)]
