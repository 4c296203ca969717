"""Each id is in the query store once, whatever is written again, by whom and after what."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.service.signals import Kind
from betrace.service.storage.duck.arrow import trace_id_array
from betrace.service.storage.duck.queries import StoredSignal, TraceRow
from betrace.service.storage.duck.schema import SCHEMA_VERSION, StoreError
from betrace.service.storage.duck.store import DuckStore, RowCounts
from tests.service.storage.duck.test_store import columns, limits, make, trace_id
from tests.support.examples import examples

# As the first version of the program made it.
SCHEMA_1 = """
CREATE TABLE meta (version INTEGER NOT NULL, created_ns BIGINT NOT NULL);
CREATE TABLE signals (
    id BLOB PRIMARY KEY, seq BIGINT NOT NULL, rule_id VARCHAR NOT NULL,
    rule_version VARCHAR NOT NULL, severity VARCHAR NOT NULL, kind VARCHAR NOT NULL,
    status VARCHAR NOT NULL, clause VARCHAR NOT NULL, trace_id BLOB NOT NULL,
    detected_at BIGINT NOT NULL, early BOOLEAN NOT NULL, counts JSON NOT NULL,
    evidence JSON NOT NULL, labels JSON NOT NULL, message VARCHAR NOT NULL, reason VARCHAR,
    context JSON
);
CREATE TABLE traces (
    trace_id BLOB PRIMARY KEY, start_ns BIGINT NOT NULL, end_ns BIGINT NOT NULL,
    first_seen_ns BIGINT NOT NULL, last_seen_ns BIGINT NOT NULL, spans BIGINT NOT NULL,
    errors BIGINT NOT NULL, root_name VARCHAR, root_service VARCHAR,
    services VARCHAR[] NOT NULL, positions BIGINT[] NOT NULL, partial BOOLEAN NOT NULL,
    rules_version VARCHAR NOT NULL
);
CREATE TABLE trace_frames (
    trace_id BLOB, first BIGINT, positions BIGINT[] NOT NULL, PRIMARY KEY (trace_id, first)
);
INSERT INTO meta VALUES (1, 77);
"""


def as_version_1(path: Path) -> None:
    """Rewrite a file of this version as the first one had it."""
    old = path.with_suffix(".old")
    with duckdb.connect(str(old)) as db:
        db.execute(SCHEMA_1)
        db.execute(f"ATTACH '{path}' AS new")
        db.execute("INSERT INTO signals BY NAME SELECT * EXCLUDE (key, trace_key) FROM new.signals")
        db.execute("INSERT INTO traces BY NAME SELECT * EXCLUDE (key) FROM new.traces")
        db.execute("INSERT INTO trace_frames BY NAME SELECT * EXCLUDE (key) FROM new.trace_frames")
    old.replace(path)


def frames(*numbers: int) -> dict[str, object]:
    ids = trace_id_array(np.zeros(len(numbers), np.int64), np.array(numbers))
    return {"trace_id": ids, "positions": [[n, n + 1] for n in numbers]}


def everything(store: DuckStore) -> tuple[list[StoredSignal], list[TraceRow | None], RowCounts]:
    rows, _, _ = store.traces("shop")
    found = store.find_traces("shop", [row.trace_id for row in rows])
    return store.signals("shop")[0], [found[row.trace_id] for row in rows], store.counts("shop")


def fill(store: DuckStore) -> None:
    store.write(
        "shop",
        signals=[make(n) for n in range(5)] + [make(3, kind=Kind.RETRACTED)],
        traces=columns(1, 2, 3, trace_hi=np.array([-1, 2**63 - 1, 0])),
        frames=frames(1, 3),
    )


class TestMigration:
    def test_a_file_of_the_first_version_is_migrated(self, tmp_path: Path) -> None:
        with DuckStore(tmp_path) as store:
            fill(store)
            before = everything(store)
        path = tmp_path / "shop/betrace.duckdb"
        as_version_1(path)
        with DuckStore(tmp_path) as store:
            assert everything(store) == before
            assert store.trace("shop", before[1][0].trace_id) == before[1][0]  # type: ignore[union-attr]
            fill(store)  # all of it again
            assert everything(store) == before
            assert store.write_signals("shop", [make(9)]) == 1
            assert store.signals_after("shop", 6)[0].signal == make(9)
        with duckdb.connect(str(path), read_only=True) as db:
            assert db.execute("SELECT * FROM meta").fetchall() == [(SCHEMA_VERSION, 77)]
            assert not db.execute("SELECT * FROM duckdb_indexes()").fetchall()
            assert {name for (name,) in db.execute("SHOW TABLES").fetchall()} == {
                "meta",
                "signals",
                "traces",
                "trace_frames",
            }

    def test_a_migrated_file_is_not_migrated_again(self, tmp_path: Path) -> None:
        with DuckStore(tmp_path) as store:
            fill(store)
        as_version_1(tmp_path / "shop/betrace.duckdb")
        for _ in range(2):
            with DuckStore(tmp_path) as store:
                assert store.counts("shop") == RowCounts(6, 3, 2)

    def test_a_step_that_fails_leaves_the_file_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with DuckStore(tmp_path) as store:
            fill(store)
        path = tmp_path / "shop/betrace.duckdb"
        as_version_1(path)
        with monkeypatch.context() as patch:
            from betrace.service.storage.duck import schema as duckschema

            statements = duckschema._MIGRATIONS[1].replace("DROP TABLE old_frames", "DROP TABLE no")
            patch.setitem(duckschema._MIGRATIONS, 1, statements)
            with DuckStore(tmp_path) as store, pytest.raises(StoreError):
                store.counts("shop")
        with DuckStore(tmp_path) as store:
            assert store.counts("shop") == RowCounts(6, 3, 2)


@pytest.fixture(params=[128 << 20, 0], ids=["keys in memory", "no room for keys"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DuckStore]:
    with DuckStore(tmp_path, key_bytes=request.param) as store:
        yield store


class TestOnce:
    def test_all_of_it_again_changes_nothing(self, store: DuckStore) -> None:
        fill(store)
        before = everything(store)
        fill(store)
        assert everything(store) == before

    def test_a_retraction_that_came_first(self, store: DuckStore) -> None:
        store.write_signals("shop", [make(1, kind=Kind.RETRACTED)])
        store.write_signals("shop", [make(1, "r2")])  # another rule of the same trace
        store.write_signals("shop", [make(1), make(2)])
        found = {
            (s.signal.trace_id, s.signal.rule_id, s.signal.kind): s.status
            for s in store.signals("shop")[0]
        }
        assert found == {
            (trace_id(1), "r1", Kind.RETRACTED): "retracted",
            (trace_id(1), "r1", Kind.RAISED): "retracted",
            (trace_id(1), "r2", Kind.RAISED): "active",
            (trace_id(2), "r1", Kind.RAISED): "active",
        }

    def test_ids_that_share_a_key(self, store: DuckStore) -> None:
        """The halves of an id exchanged give the same key."""
        turned = columns(1, trace_hi=np.array([1]), trace_lo=np.array([0]), spans=[33])
        store.write("shop", traces=columns(1), frames=frames(1))
        store.write("shop", traces=turned)
        store.write("shop", traces=columns(1, spans=[44]))
        found = store.find_traces("shop", [trace_id(1), trace_id(1 << 64)])
        assert {key: (row.spans, row.positions) for key, row in found.items()} == {
            trace_id(1): (44, [1, 2]),
            trace_id(1 << 64): (33, [1, 2]),
        }

    def test_after_files_were_closed_and_opened(self, tmp_path: Path) -> None:
        with DuckStore(tmp_path, limits(idle_close_seconds=0)) as store:
            for _ in range(3):
                fill(store)
                assert store.counts("shop") == RowCounts(6, 3, 2)
                assert store.sweep() == 1
                assert store._files._keys.used == 0

    def test_after_expiry_the_keys_are_read_again(self, store: DuckStore) -> None:
        fill(store)
        store.expire("shop", 3 * 10**9)
        fill(store)
        assert store.counts("shop") == RowCounts(6, 3, 2)

    @settings(max_examples=examples(25), deadline=None)
    @given(st.data())
    def test_any_order_of_writes_and_restarts(self, data: st.DataObject) -> None:
        """Against a model: the newest row of a trace with the positions of all, first signals."""
        model: dict[int, tuple[int, int, set[int]]] = {}
        raised: set[int] = set()
        back: set[int] = set()
        directory = self.directory
        shutil.rmtree(directory, ignore_errors=True)
        numbers = st.integers(0, 6)
        key_bytes = data.draw(st.sampled_from([0, 64, 1 << 20]))
        store = DuckStore(directory, key_bytes=key_bytes)
        try:
            for _ in range(data.draw(st.integers(1, 6))):
                some = data.draw(st.lists(numbers, max_size=4))
                seen = data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=4))[: len(some)]
                up = data.draw(st.lists(numbers, max_size=4))
                down = data.draw(st.lists(numbers, max_size=3))
                store.write(
                    "shop",
                    signals=[make(n) for n in up] + [make(n, kind=Kind.RETRACTED) for n in down],
                    traces=columns(
                        *some,
                        last_seen_ns=np.array(seen, np.int64),
                        spans=np.array(seen, np.int64),
                        positions=[[10 * n + s] for n, s in zip(some, seen, strict=True)],
                    ),
                )
                for n, s in zip(some, seen, strict=True):
                    last, _, positions = model.get(n, (-1, 0, set()))
                    newest = max(last, s)
                    model[n] = (newest, newest, positions | {10 * n + s})
                raised |= set(up)
                back |= set(down)
                if data.draw(st.booleans()):
                    store.close()
                    store = DuckStore(directory, key_bytes=key_bytes)
            found = store.find_traces("shop", [trace_id(n) for n in range(7)])
            assert {
                int(key, 16): (row.last_seen_ns, row.spans, set(row.positions))
                for key, row in found.items()
            } == model
            assert store.counts("shop") == RowCounts(len(raised) + len(back), len(model), 0)
            status = {
                (int(s.signal.trace_id, 16), s.signal.kind): s.status
                for s in store.signals("shop")[0]
            }
            wanted = {(n, Kind.RAISED): "retracted" if n in back else "active" for n in raised}
            assert status == wanted | {(n, Kind.RETRACTED): "retracted" for n in back}
        finally:
            store.close()

    directory: Path

    @pytest.fixture(autouse=True, scope="class")
    def _own(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        request.cls.directory = tmp_path_factory.mktemp("model") / "data"


@settings(max_examples=examples(25), deadline=None)
@given(st.data())
def test_pages_are_stable_while_rows_come(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """What was there when the first page was read comes once, in order, whatever is stored
    meanwhile; of the new rows none comes twice."""
    times = st.integers(0, 5)
    before = data.draw(st.lists(times, min_size=1, max_size=20))
    limit = data.draw(st.integers(1, 5))
    with DuckStore(tmp_path_factory.mktemp("pages")) as store:

        def add(first: int, at: list[int]) -> None:
            numbers = list(range(first, first + len(at)))
            store.write(
                "shop",
                signals=[make(n, detected_at=t) for n, t in zip(numbers, at, strict=True)],
                traces=columns(*numbers, start_ns=np.array(at, np.int64)),
            )

        add(0, before)
        old_signals = [s.signal.id for s in store.signals("shop")[0]]
        old_traces = [row.trace_id for row in store.traces("shop")[0]]
        signals: list[str] = []
        traces: list[str] = []
        one: str | None = None
        two: str | None = None
        count = len(before)
        for page in range(50):
            if page == 0 or one is not None:
                found, one = store.signals("shop", limit=limit, cursor=one)
                signals += [s.signal.id for s in found]
            if page == 0 or two is not None:
                rows, two, _ = store.traces("shop", limit=limit, cursor=two)
                traces += [row.trace_id for row in rows]
            if one is None and two is None:
                break
            if page < 6:
                new = data.draw(st.lists(times, max_size=3))
                add(count, new)
                count += len(new)
    for found_ids, old in ((signals, old_signals), (traces, old_traces)):
        assert len(found_ids) == len(set(found_ids))
        assert [each for each in found_ids if each in set(old)] == old


def test_a_file_is_copied_out_and_read_with_plain_duckdb(tmp_path: Path) -> None:
    with DuckStore(tmp_path / "data") as store:
        fill(store)
    copy = tmp_path / "copy.duckdb"
    shutil.copy(tmp_path / "data/shop/betrace.duckdb", copy)
    with duckdb.connect(str(copy), read_only=True) as db:
        rows = db.execute(
            "SELECT lower(hex(trace_id)), spans, services FROM traces ORDER BY start_ns"
        ).fetchall()
        assert rows[2] == (trace_id(3), 10, ["web", "s0"])
        counts = db.execute(
            "SELECT rule_id, count(*) FILTER (status = 'active') FROM signals GROUP BY ALL"
        ).fetchall()
        assert counts == [("r1", 4)]
