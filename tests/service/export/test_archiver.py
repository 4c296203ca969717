"""Archiving and releasing segments of a real log."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.export import parquet
from betrace.service.export.archiver import Archiver, covered
from betrace.service.export.parquet import ArchiveError, archive_segment, find_archived
from betrace.service.storage.spanlog.frames import Frame, pack_position
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.checkpoint import Snapshot, write_checkpoint

DAY = date(2025, 1, 31)


def body(spans: int, name: str = "x") -> bytes:
    request = ExportTraceServiceRequest()
    added = request.resource_spans.add()
    added.resource.attributes.add(key="service.name").value.string_value = "bank"
    for _ in range(spans):
        span = added.scope_spans.add().spans.add(
            trace_id=os.urandom(16), span_id=os.urandom(8), name=name
        )
        span.attributes.add(key="amount").value.int_value = 1500
    return request.SerializeToString()


def at(day: date, hour: int = 12) -> int:
    return int(datetime(day.year, day.month, day.day, hour, tzinfo=UTC).timestamp()) * 10**9


def frame(day: date, spans: int = 3, counted: int | None = None) -> Frame:
    return Frame("protobuf", "", at(day), body(spans), spans if counted is None else counted)


def archiver(tmp_path: Path, log: SpanLog) -> Archiver:
    return Archiver(log, tmp_path / "archive", tmp_path / "checkpoints", 1 << 20)


def save(tmp_path: Path, progress: dict[str, tuple[int, list[int]]], taken: int = 1) -> None:
    write_checkpoint(tmp_path / "checkpoints", Snapshot(taken, progress, []))


def test_closed_days_can_be_queried_with_plain_duckdb(tmp_path: Path) -> None:
    with SpanLog(tmp_path / "data") as log:
        for tenant, days in (("acme", (0, 0, 1)), ("other", (0, 1))):
            for offset in days:
                log.append(tenant, [frame(DAY + timedelta(days=offset))])
        written = list(archiver(tmp_path, log).archive(DAY + timedelta(days=1)))
    assert [(file.spans, file.damaged_bytes) for file in written] == [(6, 0), (3, 0)]
    found = duckdb.execute(
        "SELECT tenant, date::VARCHAR, count(*), any_value(attributes['amount']), "
        "any_value(service) FROM read_parquet(?, hive_partitioning = true) "
        "GROUP BY ALL ORDER BY ALL",
        [str(tmp_path / "archive/*/*/*.parquet")],
    ).fetchall()
    assert found == [
        ("acme", "2025-01-31", 6, "1500", "bank"),
        ("other", "2025-01-31", 3, "1500", "bank"),
    ]


def test_only_segments_that_grew_are_archived_again(tmp_path: Path) -> None:
    with SpanLog(tmp_path / "data") as log:
        log.append("acme", [frame(DAY)])
        first = archiver(tmp_path, log)
        assert len(list(first.archive(DAY + timedelta(days=1)))) == 1
        assert list(archiver(tmp_path, log).archive(DAY + timedelta(days=1))) == []
        log.append("acme", [frame(DAY)])  # the clock was set back
        again = archiver(tmp_path, log)
        assert [file.spans for file in again.archive(DAY + timedelta(days=1))] == [6]
        assert again.done.files == 1
    files = list((tmp_path / "archive").rglob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [6]


def test_only_archived_segments_that_no_restart_reads_are_released(tmp_path: Path) -> None:
    with SpanLog(tmp_path / "data") as log:
        positions = [
            log.append("acme", [frame(DAY + timedelta(days=offset))])[0] for offset in range(4)
        ]
        last = positions[-1]
        until = DAY + timedelta(days=10)

        run = archiver(tmp_path, log)
        run.release(until, archived=True)
        assert run.done.released_segments == 0  # no checkpoint exists

        save(tmp_path, {"acme": (last, [positions[1]])})
        run.release(until, archived=True)
        assert run.done.released_segments == 0  # nothing is archived
        list(run.archive(until))
        run.release(until, archived=True)
        assert run.done.released_segments == 1  # the second has a frame that is not folded

        save(tmp_path, {"acme": (last, [])}, taken=2)
        run.release(until, archived=True)
        assert run.done.released_segments == 1  # a restart may start at the older checkpoint

        save(tmp_path, {"acme": (last, [])}, taken=3)
        run.release(DAY + timedelta(days=2), archived=True)
        assert run.done.released_segments == 2  # the third is of a day that stays
        run.release(until, archived=True)
        assert run.done.released_segments == 3
        assert [segment.day for segment in log.segments("acme")] == [DAY + timedelta(days=3)]
        assert run.done.released_bytes > 0


def test_the_log_is_released_without_an_archive_too(tmp_path: Path) -> None:
    with SpanLog(tmp_path / "data") as log:
        log.append("acme", [frame(DAY)])
        last = log.append("acme", [frame(DAY + timedelta(days=1))])[0]
        save(tmp_path, {"acme": (last, [])})
        run = archiver(tmp_path, log)
        run.release(DAY + timedelta(days=5), archived=False)
    assert run.done.released_segments == 1


def test_a_damaged_segment_is_archived_as_far_as_readable_and_kept(tmp_path: Path) -> None:
    with SpanLog(tmp_path / "data") as log:
        log.append("acme", [frame(DAY), frame(DAY)])
        last = log.append("acme", [frame(DAY + timedelta(days=1))])[0]
        save(tmp_path, {"acme": (last, [])})
        segment = log.segments("acme")[0]
        with segment.path.open("r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(b"0123456789")
        run = archiver(tmp_path, log)
        (written,) = run.archive(DAY + timedelta(days=1))
        assert written.spans == 3
        assert written.damaged_bytes > 0
        run.release(DAY + timedelta(days=1), archived=True)
        assert run.done.damaged == ["acme/00000001"]
        assert run.done.released_segments == 0
        assert len(log.segments("acme")) == 2


def test_a_segment_with_a_wrong_span_count_is_not_archived(tmp_path: Path) -> None:
    with SpanLog(tmp_path / "data") as log:
        log.append("acme", [frame(DAY, spans=3, counted=2)])
        log.append("other", [frame(DAY)])
        run = archiver(tmp_path, log)
        assert [file.spans for file in run.archive(DAY + timedelta(days=1))] == [3]
    assert len(run.done.failures) == 1
    assert "3 spans instead of the 2" in run.done.failures[0]
    assert len(list((tmp_path / "archive").rglob("*"))) == 5  # no temporary file is left


def test_a_disk_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with SpanLog(tmp_path / "data") as log:
        log.append("acme", [frame(DAY)])
        (segment,) = log.segments("acme")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ArchiveError, match="free space"):
            archive_segment(tmp_path / "archive", log, "acme", segment, 1 << 20)
        monkeypatch.undo()
    assert not [path for path in (tmp_path / "archive").rglob("*") if path.is_file()]


def test_an_invalid_parquet_file_is_rewritten(tmp_path: Path) -> None:
    with SpanLog(tmp_path / "data") as log:
        log.append("acme", [frame(DAY)])
        (segment,) = log.segments("acme")
        path = parquet.parquet_path(tmp_path / "archive", "acme", segment)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not parquet")
        assert find_archived(tmp_path / "archive", "acme", segment) is None
        assert len(list(archiver(tmp_path, log).archive(DAY + timedelta(days=1)))) == 1
        assert find_archived(tmp_path / "archive", "acme", segment) is not None


def test_temporary_files_of_a_killed_process_are_deleted(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    day = tmp_path / "archive" / "tenant=acme" / f"date={DAY.isoformat()}"
    day.mkdir(parents=True)
    stale = day / f".00000001.parquet.{int(killed.stdout)}.new"
    alive = day / f".00000001.parquet.{os.getppid()}.new"
    for path in (stale, alive):
        path.write_bytes(b"half a file")
    with SpanLog(tmp_path / "data") as log:
        log.append("acme", [frame(DAY)])
        assert len(list(archiver(tmp_path, log).archive(DAY + timedelta(days=1)))) == 1
    assert [path.name for path in sorted(day.iterdir())] == [alive.name, "00000001.parquet"]


def test_a_stopped_run_ends_between_segments(tmp_path: Path) -> None:
    with SpanLog(tmp_path / "data") as log:
        for offset in range(3):
            log.append("acme", [frame(DAY + timedelta(days=offset))])
        run = archiver(tmp_path, log)
        for _ in run.archive(DAY + timedelta(days=9)):
            run.stop()
    assert run.done.files == 1


def test_positions_covered_by_checkpoints(tmp_path: Path) -> None:
    assert covered(tmp_path / "checkpoints") == {}
    save(tmp_path, {"a": (pack_position(3, 8), []), "b": (pack_position(2, 5), [4, 9])})
    assert covered(tmp_path / "checkpoints") == {"a": pack_position(3, 8) + 1, "b": 4}
    save(tmp_path, {"a": (pack_position(5, 0), []), "c": (7, [])}, taken=2)
    assert covered(tmp_path / "checkpoints") == {"a": pack_position(3, 8) + 1}
    newest = max((tmp_path / "checkpoints").glob("*.checkpoint"))
    newest.write_bytes(b"damaged")
    assert covered(tmp_path / "checkpoints")["b"] == 4
