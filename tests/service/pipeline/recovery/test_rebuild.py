"""Lost and damaged DuckDB files are rebuilt; a long log is read with few open traces."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio

from betrace.service.api.components import components
from betrace.service.cli.doctor.finding import OK, WARNING
from betrace.service.cli.doctor.stores import duckdb_files
from betrace.service.pipeline.recovery.rebuild import MARK, Rebuild
from betrace.service.pipeline.request import Done
from betrace.service.rules.compile import compile_rules
from betrace.service.storage.duck.queries import SignalFilter
from betrace.service.storage.duck.schema import StoreCorrupt
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from tests.support.inprocess import active_signals, closed, running, send, settings, write_rules
from tests.support.spans import S, body

RULES = {"no-b": "when { a } always { b }"}
TENANT = "default"


def trace(number: int) -> bytes:
    return number.to_bytes(16, "big")


def trace_id(number: int) -> str:
    return trace(number).hex()


def frame(*spans: S, at: int = 0) -> Frame:
    return Frame("protobuf", "", at or time.time_ns(), body(*spans), len(spans))


async def shown(service: Any) -> set[str]:
    found, _ = await trio.to_thread.run_sync(
        lambda: service.store.signals(TENANT, SignalFilter(status="active"), limit=1000)
    )
    return {each.signal.trace_id for each in found}


async def rows(service: Any, *numbers: int) -> dict[str, tuple[int, int]]:
    ids = [trace_id(number) for number in numbers]
    found = await trio.to_thread.run_sync(service.store.find_traces, TENANT, ids)
    return {trace: (row.spans, len(row.positions)) for trace, row in found.items()}


async def filled(tmp_path: Path) -> Any:
    """Traces 1 to 3, the second in breach, the third fixed by a late span; the service has
    ended."""
    write_rules(tmp_path, RULES)
    config = settings(tmp_path)
    async with running(config) as service:
        assert await send(service, [S(1, "a", trace=trace(1)), S(2, "b", trace=trace(1))]) == Done(
            2
        )
        assert await send(service, [S(3, "a", trace=trace(2)), S(4, "a", trace=trace(3))]) == Done(
            2
        )
        await closed(service)
        assert await send(service, [S(5, "b", trace=trace(3))]) == Done(1)
        await closed(service)
        assert active_signals(service) == {(trace_id(2), "no-b")}
    return config


EXPECTED_ROWS = {trace_id(1): (2, 1), trace_id(2): (1, 1), trace_id(3): (2, 2)}


@pytest.mark.parametrize("damaged", [False, True])
async def test_a_lost_file_is_rebuilt_before_spans_are_accepted(tmp_path, damaged):
    config = await filled(tmp_path)
    path = tmp_path / "data" / TENANT / "betrace.duckdb"
    path.unlink()
    if damaged:
        path.write_bytes(b"this is no database" * 500)
    async with running(config) as service:
        assert await shown(service) == {trace_id(2)}
        assert await rows(service, 1, 2, 3) == EXPECTED_ROWS
        # A late span finds its trace as if nothing had happened.
        assert await send(service, [S(6, "b", trace=trace(2))]) == Done(1)
        await closed(service)
        assert await shown(service) == set()
        assert (await rows(service, 2))[trace_id(2)] == (2, 2)
    assert not (path.parent / MARK).exists()
    assert path.with_name("betrace.duckdb.damaged").exists() == damaged


def damage_a_block(data: Path) -> None:
    """Damage a block of the file that a start does not read."""
    path = data / TENANT / "betrace.duckdb"
    whole = path.read_bytes()
    for offset in range(12_288, len(whole), 16_384):
        path.write_bytes(whole[: offset + 8] + b"damaged!" * 4 + whole[offset + 40 :])
        with DuckStore(data) as store:
            try:
                store.counts(TENANT)
            except StoreCorrupt:
                continue
            try:
                store.verify(TENANT)
            except StoreCorrupt:
                return
    raise AssertionError("every block is read at the start")


async def test_a_file_is_rebuilt_when_a_damaged_block_is_read(tmp_path, caplog):
    config = await filled(tmp_path)
    damage_a_block(config.storage.path)
    assert any(each.status == WARNING for each in duckdb_files(config))
    async with running(config) as service:
        assert components(service.sources)["duckdb"]["status"] == "ok"
        with pytest.raises(StoreCorrupt):
            await trio.to_thread.run_sync(service.store.verify, TENANT)
        assert service.rebuild.due
        with trio.fail_after(60):
            while service.rebuild.due or service.store.incomplete:
                await trio.sleep(0.02)
        assert "the DuckDB file of default is set aside and rebuilt" in caplog.text
        assert await shown(service) == {trace_id(2)}
        assert await rows(service, 1, 2, 3) == EXPECTED_ROWS
        assert await send(service, [S(6, "b", trace=trace(2))]) == Done(1)
        await closed(service)
        assert await shown(service) == set()
        assert (await rows(service, 2))[trace_id(2)] == (2, 2)
        assert service.pipeline.letters.book.total == 0
    path = tmp_path / "data" / TENANT / "betrace.duckdb"
    assert path.with_name("betrace.duckdb.damaged").exists()
    assert all(each.status == OK for each in duckdb_files(config))


async def test_a_sound_file_is_not_rebuilt(tmp_path):
    config = await filled(tmp_path)
    async with running(config) as service:
        service.rebuild.suspect(StoreCorrupt(TENANT, "it was, before it was rebuilt"))
        with trio.fail_after(60):
            while service.rebuild.due:
                await trio.sleep(0.02)
    assert not (tmp_path / "data" / TENANT / "betrace.duckdb.damaged").exists()


async def test_writes_to_a_damaged_file_are_kept_until_it_is_rebuilt(tmp_path, monkeypatch):
    config = await filled(tmp_path)
    async with running(config) as service:
        write, verify, failing = service.store.write, service.store.verify, [True]

        def damaged(*args: Any, **more: Any) -> int:
            if failing:
                raise StoreCorrupt(TENANT, "damaged")
            return write(*args, **more)

        def check(tenant: str) -> None:
            if failing:
                raise StoreCorrupt(tenant, "damaged")
            verify(tenant)

        monkeypatch.setattr(service.store, "write", damaged)
        monkeypatch.setattr(service.store, "verify", check)
        assert await send(service, [S(6, "a", trace=trace(4))]) == Done(1)
        with trio.fail_after(60):
            while not service.pipeline.project.fallback.pending:
                await trio.sleep(0.02)
        shown_now = components(service.sources)
        assert shown_now["fallback-duckdb"]["status"] == "degraded"
        recreate = service.store.recreate

        def sound(tenant: str) -> None:
            recreate(tenant)
            failing.clear()

        monkeypatch.setattr(service.store, "recreate", sound)
        service.rebuild.suspect(StoreCorrupt(TENANT, "damaged"))
        with trio.fail_after(60):
            while await shown(service) != {trace_id(2), trace_id(4)}:
                await trio.sleep(0.05)
        assert service.pipeline.letters.book.total == 0


async def test_missing_signals_are_added_while_the_service_runs(tmp_path):
    config = await filled(tmp_path)
    path = tmp_path / "data" / TENANT / "betrace.duckdb"
    path.unlink()
    with DuckStore(tmp_path / "data") as store:  # as if from an old copy
        store.write_signals(TENANT, [])
        assert store.counts(TENANT).signals == 0
    async with running(config) as service:
        with trio.fail_after(60):
            while await shown(service) != {trace_id(2)}:
                await trio.sleep(0.02)


class Away:
    """A ledger that does not answer."""

    def __getattr__(self, name):
        def refuse(*_, **__):
            raise LedgerError("away", transient=True)

        return refuse


def test_an_interrupted_rebuild_starts_again(tmp_path):
    with SpanLog(tmp_path) as log, DuckStore(tmp_path) as store:
        log.append(TENANT, [frame(S(1, "a", trace=trace(1)))])
        rules = compile_rules([], "v7")

        def made(ledger: Any) -> Rebuild:
            return Rebuild(tmp_path, log, ledger, store, lambda _: rules, 1 << 20)

        first = made(Away())
        assert first.find()
        assert first.pending == [TENANT]
        first.run()
        assert first.pending == [TENANT], "the ledger is away"
        mark = tmp_path / TENANT / MARK
        assert orjson.loads(mark.read_bytes()) == {"stop": log.end(TENANT)}

        class Empty(Away):
            tenants = staticmethod(list)
            entries = staticmethod(lambda *_: [])

        store.write_signals(TENANT, [])  # the file is there now
        again = made(Empty())
        assert again.find()
        again.compare()
        again.run()
        assert again.pending == []
        assert not mark.exists()
        (row,) = store.traces(TENANT)[0]
        assert (row.trace_id, row.spans, row.rules_version) == (trace_id(1), 1, "v7")
        assert not made(Empty()).pending
        done = made(Empty())
        assert done.find()
        assert done.pending == []


def test_a_large_log_is_not_rebuilt_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("betrace.service.pipeline.recovery.rebuild.AT_ONCE_BYTES", 100)
    with SpanLog(tmp_path) as log, DuckStore(tmp_path) as store:
        log.append(TENANT, [frame(*(S(n, "a", trace=trace(n)) for n in range(1, 50)))])
        rules = compile_rules([], "v")
        rebuild = Rebuild(tmp_path, log, Away(), store, lambda _: rules, 1 << 20)
        assert not rebuild.find()
        rebuild.stop()
        rebuild.run()
        assert rebuild.pending == [TENANT]


async def test_a_long_log_is_read_with_few_traces_open(tmp_path):
    write_rules(tmp_path, RULES)
    minute = 60 * 10**9
    begin = time.time_ns() - 200 * minute
    with SpanLog(tmp_path / "data") as log:
        frames = [frame(S(n, "a", trace=trace(n)), at=begin + n * minute) for n in range(1, 101)]
        late = [frame(S(n + 200, "b", trace=trace(n)), at=begin + 101 * minute) for n in (1, 100)]
        log.append(TENANT, frames + late)
    config = settings(
        tmp_path,
        traces={"max_open": 10},
        caches={"trace_metadata": 10},
        pipeline={"correlate_batch_spans": 5},
    )
    async with running(config) as service:
        assert (
            sum(traces.open_count for traces in service.pipeline.open_traces.tenants.values()) <= 12
        )
        assert service.pipeline.open_traces.counts.closed_for_room >= 88
        await closed(service)
        broken = {(trace_id(n), "no-b") for n in range(2, 100)}
        assert active_signals(service) == broken
