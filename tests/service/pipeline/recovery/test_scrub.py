"""Damage in what nobody reads is found by reading everything slowly."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import duckdb
import pytest
import trio

from betrace.service.api.components import components
from betrace.service.pipeline.recovery import scrub
from betrace.service.pipeline.recovery.scrub import Scrub
from betrace.service.pipeline.request import Done
from betrace.service.storage.duck.schema import FILE, StoreCorrupt
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from tests.support.api_client import ApiClient
from tests.support.inprocess import closed, running, send, settings, write_rules
from tests.support.spans import S, body

TENANTS = ("a", "b", "c")


class Bench:
    """A log with two segments for each of three tenants, and a DuckDB file of the second."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.log = SpanLog(data, segment_bytes=4096)
        payload = body(S(1, "a" * 3000))
        for tenant in TENANTS:
            for _ in range(2):
                self.log.append(tenant, [Frame("protobuf", "", 1, payload, 1)])
        self.file = data / "b" / FILE
        with duckdb.connect(str(self.file)) as db:
            db.execute("CREATE TABLE t AS SELECT hash(i) FROM range(200000) r(i)")
        self.suspected: list[StoreCorrupt] = []
        self.now = 1e9

    def make(self, **options: Any) -> Scrub:
        return Scrub(
            self.data, self.log, 1 << 30, self.suspected.append, clock=lambda: self.now, **options
        )

    async def read(self, made: Scrub, passes: int = 1) -> None:
        """Run it until it has completed so many passes."""
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(made.run)
                while made.passes < passes:
                    await trio.sleep(0.005)
                nursery.cancel_scope.cancel()
        made.close()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(scrub, "_AGAIN_SECONDS", 0)
    monkeypatch.setattr(scrub, "_WAIT_SECONDS", 0.001)
    bench = Bench(tmp_path)
    yield bench
    bench.log.close()


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


async def test_everything_is_read(bench):
    made = bench.make()
    await bench.read(made)
    logs = sum(each.bytes - 128 for t in TENANTS for each in bench.log.segments(t))
    file = bench.file.stat().st_size - 3 * 4096
    assert logs + file <= made.bytes <= logs + file + 20
    assert made.completed_at == bench.now
    assert (bench.log.damage.places, bench.suspected) == (0, [])


@pytest.mark.parametrize("number", [0, 1])
async def test_a_damaged_frame_is_found_in_any_segment(bench, number):
    damage(bench.log.segments("c")[number].path, 500)
    await bench.read(bench.make())
    (found,) = bench.log.damage.skipped
    assert (found.tenant, found.reason, found.spans) == ("c", "damaged payload", 1)


async def test_a_damaged_block_of_duckdb_is_found(bench):
    damage(bench.file, 3 * 4096 + 5000)
    await bench.read(bench.make())
    (found,) = bench.suspected
    assert found.tenant == "b"
    assert f"{bench.file} is damaged" in str(found)


async def test_a_restart_continues_after_what_was_read(bench, monkeypatch):
    read: list[tuple[str, int]] = []
    frames = bench.log.frames

    def note(tenant, start, stop):
        read.append((tenant, start >> 32))
        if len(read) == 4:
            raise OSError("the disk is gone")
        return frames(tenant, start, stop)

    class Killed(Exception):
        pass

    def killed(path):
        if path == bench.file:
            raise Killed
        return iter(())

    monkeypatch.setattr(bench.log, "frames", note)
    with monkeypatch.context() as patch:
        patch.setattr(scrub, "checked_blocks", killed)  # the file of b, after its segments
        with pytest.raises(Exception):  # noqa: B017, PT011 - in a group
            await bench.read(bench.make())
    assert read == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]  # a disk error ends only one segment
    del read[:]
    bench.now += 10
    await bench.read(bench.make())
    assert read == [("c", 1), ("c", 2)]


async def test_the_next_pass_begins_a_day_later(bench):
    first = bench.make()
    await bench.read(first)
    again = bench.make()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.run)
        while not again.completed_at:
            await trio.sleep(0.005)
        await trio.sleep(0.05)
        assert (again.passes, again.bytes) == (0, 0)
        bench.now += scrub.PASS_SECONDS
        with trio.fail_after(60):
            while not again.passes:
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert again.bytes >= first.bytes
    again.close()


async def test_deleted_tenants_and_a_damaged_note_are_passed_over(bench):
    (bench.data / scrub.STATE).write_bytes(b"not JSON")
    made = bench.make(closed={"b"})
    damage(bench.file, 3 * 4096 + 5000)
    await bench.read(made)
    assert bench.suspected == []


async def test_it_can_be_switched_off(bench):
    made = Scrub(bench.data, bench.log, 0, bench.suspected.append)
    await made.run()
    assert made.bytes == 0


@pytest.mark.kernel
async def test_a_service_shows_what_it_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(scrub, "_WAIT_SECONDS", 0.001)
    write_rules(tmp_path, {"no-b": "when { a } always { b }"})
    config = settings(tmp_path, log={"scrub_bytes_per_second": 1 << 30})
    async with running(config) as service:
        for number in (1, 2):
            assert await send(service, [S(number, "a", trace=bytes([number]) * 16)]) == Done(1)
        await closed(service)
        (segment,) = service.log.segments("default")
    damage(segment.path, segment.bytes - 5)
    with contextlib.suppress(FileNotFoundError):
        (config.storage.path / scrub.STATE).unlink()
    async with running(config) as service:
        with trio.fail_after(60):
            while not service.scrub.passes:
                await trio.sleep(0.01)
        assert components(service.sources)["span-log"]["status"] == "degraded"
        metrics = (await ApiClient(service).get("/metrics")).decode()
        assert "betrace_span_log_damaged_places_total 1" in metrics
        assert f"betrace_scrub_bytes_total {service.scrub.bytes}" in metrics
        assert "betrace_scrub_timestamp_seconds 1" in metrics
