"""The span log: what is appended is read back, whatever happens to the files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.service.storage.disk import Buffer, Disk
from betrace.service.storage.lockfile import LockedError
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing, LogWriteError
from betrace.service.storage.spanlog.frames import (
    FILE_HEADER_BYTES,
    FRAME_HEADER_BYTES,
    Frame,
    file_header,
    frame_header,
    pack_position,
    unpack_position,
)
from betrace.service.storage.spanlog.log import LogSyncError, SpanLog
from betrace.service.times import write_time
from tests.support.examples import examples

DAY = 86_400 * 10**9
MIDNIGHT = 20_000 * DAY  # 2024-10-04
NOON = MIDNIGHT + DAY // 2


def frame(payload: bytes = b"body", at: int = NOON, **changes: object) -> Frame:
    values = {"content_type": "protobuf", "encoding": "", "spans": 3} | changes
    return Frame(received_ns=at, payload=payload, **values)  # type: ignore[arg-type]


def bodies(log: SpanLog, tenant: str = "shop", **limits: int) -> list[bytes]:
    return [bytes(f.payload) for _, f in log.frames(tenant, **limits)]


def only_segment(log: SpanLog, tenant: str = "shop") -> Path:
    (segment,) = log.segments(tenant)
    return segment.path


class TestAppendAndRead:
    def test_frames_come_back_as_they_were(self, tmp_path: Path) -> None:
        written = [
            frame(b"one", content_type="json", encoding="gzip", spans=0),
            frame(b"", encoding="deflate"),
            frame(bytes(200_000), encoding="zstd", spans=2**32 - 1),
        ]
        with SpanLog(tmp_path) as log:
            positions = log.append("shop", written)
            assert [log.read("shop", position) for position in positions] == written
            assert log.read_many("shop", positions[::-1]) == written[::-1]
            assert list(log.frames("shop")) == list(zip(positions, written, strict=True))

    def test_positions_grow_and_the_end_is_where_the_next_goes(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            assert log.end("shop") == 0
            first, second = log.append("shop", [frame(), frame()])
            assert first < second < log.end("shop")
            assert log.append("shop", [frame()]) == [log.written("shop") - frame().stored_bytes]

    def test_nothing_to_append_makes_no_files(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            assert log.append("shop", []) == []
            assert log.tenants() == []

    def test_any_bytes_like_payload(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(bytearray(b"a")), frame(memoryview(b"xbx")[1:2])])  # type: ignore[arg-type]
            assert bodies(log) == [b"a", b"b"]

    def test_more_buffers_than_the_system_takes_at_once(self, tmp_path: Path) -> None:
        count = os.sysconf("SC_IOV_MAX")
        written = [frame(str(i).encode()) for i in range(count)]
        with SpanLog(tmp_path) as log:
            log.append("shop", written)
            assert bodies(log) == [f.payload for f in written]

    def test_tenants_are_apart(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("a", [frame(b"of a")])
            (position,) = log.append("b", [frame(b"of b")])
            assert log.tenants() == ["a", "b"]
            assert bodies(log, "a") == [b"of a"]
            assert log.read("b", position).payload == b"of b"
            assert bodies(log, "c") == []
            assert log.segments("c") == []

    @pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "a" * 64, ".x"])
    def test_a_bad_tenant_name_is_refused(self, tmp_path: Path, name: str) -> None:
        with SpanLog(tmp_path / "data") as log:
            with pytest.raises(ValueError, match="bad tenant name"):
                log.append(name, [frame()])
            with pytest.raises(ValueError, match="bad tenant name"):
                log.delete_tenant(name)

    def test_reading_from_a_position_to_before_another(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path, segment_bytes=4096) as log:
            positions = [log.append("shop", [frame(bytes([i]) * 1000)])[0] for i in range(12)]
            assert len(log.segments("shop")) > 2
            found = [p for p, _ in log.frames("shop", positions[2], positions[9])]
            assert found == positions[2:9]
            assert list(log.frames("shop", log.end("shop"))) == []

    def test_reading_by_time(self, tmp_path: Path) -> None:
        times = [NOON + i * DAY // 4 for i in range(12)]
        with SpanLog(tmp_path) as log:
            for i, at in enumerate(times):
                log.append("shop", [frame(bytes([i]), at)])
            found = bodies(log, since_ns=times[3], until_ns=times[8])
            assert found == [bytes([i]) for i in range(3, 8)]

    def test_a_reader_sees_what_was_there_when_it_began(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"1"), frame(b"2")])
            reader = log.frames("shop")
            assert next(reader)[1].payload == b"1"
            log.append("shop", [frame(b"3")])
            assert [f.payload for _, f in reader] == [b"2"]

    def test_appends_from_many_threads(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path, segment_bytes=8192, open_files=2) as log:

            def work(number: int) -> None:
                for i in range(50):
                    log.append(f"t{number % 3}", [frame(f"{number}.{i}".encode() * 20)])
                    log.sync()

            threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found = [body for tenant in log.tenants() for body in bodies(log, tenant)]
            assert sorted(found) == sorted(
                f"{n}.{i}".encode() * 20 for n in range(6) for i in range(50)
            )
            assert log.statistics().open_files <= 2
            assert not log.skipped

    def test_bad_settings(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="segment_bytes"):
            SpanLog(tmp_path, segment_bytes=100)
        with pytest.raises(ValueError, match="open files"):
            SpanLog(tmp_path, open_files=0)


class TestSegments:
    def test_layout(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame()])
            assert only_segment(log) == tmp_path / "shop/log/2024-10-04/00000001.seg"

    def test_a_full_segment_is_followed_by_another(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path, segment_bytes=4096) as log:
            positions = log.append("shop", [frame(bytes(1000)) for _ in range(8)])
            segments = log.segments("shop")
            assert [s.number for s in segments] == [1, 2, 3]
            assert all(s.bytes == s.path.stat().st_size <= 4096 for s in segments)
            assert positions == sorted(positions)
            assert len(bodies(log)) == 8

    def test_a_frame_larger_than_a_segment_has_one_to_itself(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path, segment_bytes=4096) as log:
            log.append("shop", [frame(b"small"), frame(bytes(9000)), frame(b"small")])
            assert [s.bytes > 9000 for s in log.segments("shop")] == [False, True, False]
            assert bodies(log) == [b"small", bytes(9000), b"small"]

    def test_a_new_day_begins_a_segment_of_its_own(self, tmp_path: Path) -> None:
        end = MIDNIGHT + DAY
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"1", end - 1), frame(b"2", end)])
            # a straggler does not switch back and forth, a clock set back does
            log.append("shop", [frame(b"3", end - 1)])
            log.append("shop", [frame(b"4", MIDNIGHT - DAY)])
            assert [s.day for s in log.segments("shop")] == [
                date(2024, 10, 4),
                date(2024, 10, 5),
                date(2024, 10, 3),
            ]
            assert bodies(log) == [b"1", b"2", b"3", b"4"]
            assert bodies(log, since_ns=end - 1, until_ns=end) == [b"1", b"3"]

    def test_release_keeps_the_newest(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path, segment_bytes=4096) as log:
            positions = log.append("shop", [frame(bytes(3000)) for _ in range(3)])
            sizes = sum(s.bytes for s in log.segments("shop")[:2])
            assert log.release("shop", [1, 2, 3, 99]) == sizes
            assert [s.number for s in log.segments("shop")] == [3]
            with pytest.raises(FrameMissing):
                log.read("shop", positions[0])
            assert [p for p, _ in log.frames("shop", positions[0])] == positions[2:]
            assert log.release("nobody", [1]) == 0

    def test_a_deleted_tenant_begins_after_its_old_numbers(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            (old,) = log.append("shop", [frame()])
            log.append("other", [frame(b"stays")])
            (tmp_path / "shop" / "rules").touch()
            log.delete_tenant("shop")
            log.delete_tenant("shop")
            assert log.tenants() == ["other"]
            assert [p.name for p in (tmp_path / "shop").iterdir()] == ["rules"]
            with pytest.raises(FrameMissing):
                log.read("shop", old)
        with SpanLog(tmp_path) as log:
            (new,) = log.append("shop", [frame()])
            assert unpack_position(new)[0] > unpack_position(old)[0]
            assert bodies(log, "other") == [b"stays"]

    def test_a_deletion_that_was_cut_off_is_finished(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame()])
        (tmp_path / "shop/log").rename(tmp_path / "shop/log.deleted")
        with SpanLog(tmp_path):
            assert not list((tmp_path / "shop").iterdir())


class TestSync:
    def test_counts_what_became_durable(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("a", [frame(bytes(1000))])
            log.append("b", [frame(bytes(1000))])
            assert log.synced("a") == 0
            unsynced = log.statistics().unsynced_bytes
            assert unsynced == 2 * (FILE_HEADER_BYTES + FRAME_HEADER_BYTES + 1000)
            assert log.sync(["a", "nobody"]) == unsynced / 2
            assert log.synced("a") == log.written("a")
            assert log.synced("b") < log.written("b")
            assert log.sync() == unsynced / 2
            assert log.sync() == 0
            assert log.statistics().unsynced_bytes == 0
            assert log.statistics().last_sync_seconds > 0

    def test_files_closed_in_the_meantime_are_synced_too(self, tmp_path: Path) -> None:
        synced: list[str] = []

        def sync(descriptor: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

        with SpanLog(tmp_path, segment_bytes=4096, open_files=1, disk=Disk(sync=sync)) as log:
            log.append("a", [frame(bytes(3000)), frame(bytes(3000))])
            log.append("b", [frame()])
            log.sync()
            expected = [str(s.path) for tenant in "ab" for s in log.segments(tenant)]
        assert sorted(synced) == expected

    def test_what_an_earlier_process_wrote_is_synced(self, tmp_path: Path) -> None:
        log = SpanLog(tmp_path, disk=Disk(sync=lambda _: None))
        log.append("shop", [frame()])
        log.close()
        with SpanLog(tmp_path) as log:
            assert log.synced("shop") < log.end("shop")
            log.sync()
            assert log.synced("shop") == log.end("shop")

    def test_an_old_segment_counts_as_synced(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame()])
            os.utime(only_segment(log), (0, 0))
        with SpanLog(tmp_path) as log:
            assert log.synced("shop") == log.end("shop") > 0

    def test_a_failed_sync_raises_and_its_segment_is_not_used_again(self, tmp_path: Path) -> None:
        broken: set[str] = {"a/"}

        def sync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if any(part in path for part in broken):
                raise OSError(errno.EIO, "disk on fire")

        with SpanLog(tmp_path, disk=Disk(sync=sync)) as log:
            log.append("a", [frame(b"1")])
            log.append("b", [frame(b"1")])
            with pytest.raises(LogSyncError, match=r"disk on fire.*check the disk") as caught:
                log.sync()
            assert caught.value.tenants == {"a"}
            assert log.synced("a") == 0
            assert log.synced("b") == log.written("b")
            assert log.statistics().sync_failures == 1
            broken.clear()
            log.append("a", [frame(b"2")])
            assert len(log.segments("a")) == 2
            log.sync()
            assert log.synced("a") == log.written("a")
            assert bodies(log, "a") == [b"1", b"2"]


class Flaky:
    """A disk that has room for a number of bytes, and then fails."""

    def __init__(self, room: int, truncates: bool = True) -> None:
        self.room = room
        self.truncates = truncates
        self.disk = Disk(write=self.write, truncate=self.truncate)

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        data = b"".join(buffers)
        fits = min(len(data), self.room, 1000)  # short writes
        if not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= fits
        return os.pwrite(descriptor, data[:fits], offset)

    def truncate(self, descriptor: int, size: int) -> None:
        if not self.truncates:
            raise OSError(errno.EIO, "Input/output error")
        os.ftruncate(descriptor, size)


class TestWriteFailures:
    def test_short_writes_are_completed(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path, disk=Flaky(10**6).disk) as log:
            log.append("shop", [frame(bytes([i]) * 2500) for i in range(5)])
            assert bodies(log) == [bytes([i]) * 2500 for i in range(5)]

    @pytest.mark.parametrize("room", [0, 50, 500, 3000, 6000])
    def test_a_full_disk_leaves_nothing_of_the_append(self, tmp_path: Path, room: int) -> None:
        flaky = Flaky(10**6)
        with SpanLog(tmp_path, segment_bytes=4096, disk=flaky.disk) as log:
            log.append("shop", [frame(b"before")])
            end, size = log.end("shop"), only_segment(log).stat().st_size
            flaky.room = room
            with pytest.raises(LogWriteError, match=r"No space left.*check the disk"):
                log.append("shop", [frame(bytes(2500)) for _ in range(4)])
            assert log.end("shop") == end
            assert only_segment(log).stat().st_size == size
            assert log.statistics().write_failures == 1
            flaky.room = 10**6
            log.append("shop", [frame(b"after")])
            assert bodies(log) == [b"before", b"after"]
            assert not log.skipped

    def test_a_full_disk_from_the_start(self, tmp_path: Path) -> None:
        flaky = Flaky(0)
        with SpanLog(tmp_path, disk=flaky.disk) as log:
            with pytest.raises(LogWriteError):
                log.append("shop", [frame()])
            assert log.segments("shop") == []
            flaky.room = 10**6
            log.append("shop", [frame()])
            assert len(bodies(log)) == 1

    def test_a_segment_that_cannot_be_cut_off_is_left_behind(self, tmp_path: Path) -> None:
        flaky = Flaky(10**6)
        with SpanLog(tmp_path, disk=flaky.disk) as log:
            log.append("shop", [frame(b"before")])
            flaky.room, flaky.truncates = 3000, False
            with pytest.raises(LogWriteError):
                log.append("shop", [frame(b"x" * 1000), frame(b"y" * 4000)])
            assert bodies(log) == [b"before"]
            flaky.room = 10**6
            log.append("shop", [frame(b"after")])
            assert bodies(log) == [b"before", b"after"]
            assert [s.number for s in log.segments("shop")] == [1, 2]

    def test_a_write_that_does_nothing_is_an_error(self, tmp_path: Path) -> None:
        with (
            SpanLog(tmp_path, disk=Disk(write=lambda *_: 0)) as log,
            pytest.raises(LogWriteError, match="wrote nothing"),
        ):
            log.append("shop", [frame()])

    def test_a_frame_too_large_is_refused_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("betrace.service.storage.spanlog.frames.MAX_PAYLOAD_BYTES", 100)
        with SpanLog(tmp_path) as log:
            with pytest.raises(ValueError, match="at most 100 bytes"):
                log.append("shop", [frame(bytes(101))])
            assert log.segments("shop") == []

    def test_segment_numbers_run_out_with_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("betrace.service.storage.spanlog.placement.MAX_SEGMENT", 1)
        with (
            SpanLog(tmp_path, segment_bytes=4096) as log,
            pytest.raises(LogWriteError, match="no segment numbers left"),
        ):
            log.append("shop", [frame(bytes(4000)), frame(bytes(4000))])


class TestDamage:
    def test_a_torn_frame_is_cut_off(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"whole"), frame(b"torn" * 100)])
            path = only_segment(log)
        size = path.stat().st_size
        for cut in (1, 200, 400 + FRAME_HEADER_BYTES - 1):
            os.truncate(path, size - cut)
            with SpanLog(tmp_path) as log:
                assert bodies(log) == [b"whole"]
                (skipped,) = log.skipped
                assert (skipped.segment, skipped.reason) == (1, "torn frame, cut off")
                log.append("shop", [frame(b"torn" * 100)])
                assert bodies(log) == [b"whole", b"torn" * 100]
                assert only_segment(log) == path

    def test_damage_at_the_end_is_never_written_over(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"first"), frame(b"last")])
            path = only_segment(log)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        before = path.read_bytes()
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"next")])
            assert bodies(log) == [b"first", b"next"]
            assert [s.reason for s in log.skipped] == ["damaged payload"]
            assert (log.damage.places, log.damage.spans) == (1, 3)
            assert log.skipped[0].lost == (
                f"3 spans received between {write_time(NOON)} and {write_time(NOON)}"
            )
        assert path.read_bytes() == before

    def test_zeros_at_the_end(self, tmp_path: Path) -> None:
        """What a machine's crash leaves of writes whose length was recorded before their data."""
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"first")])
            path = only_segment(log)
        os.truncate(path, path.stat().st_size + 3_000_000)
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"next")])
            assert bodies(log) == [b"first", b"next"]
            assert [(s.bytes, s.reason) for s in log.skipped] == [
                (3_000_000, "damaged frame header")
            ]

    def test_an_empty_or_damaged_new_file(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"first")])
            path = only_segment(log)
        (path.parent / "00000002.seg").touch()
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"next")])
            assert [s.number for s in log.segments("shop")] == [1, 2, 3]
            assert bodies(log) == [b"first", b"next"]
            assert not log.skipped

    def test_a_damaged_file_header_hides_no_frame(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"1"), frame(b"2")])
            path = only_segment(log)
        with path.open("r+b") as file:
            file.write(bytes(FILE_HEADER_BYTES))
        with SpanLog(tmp_path) as log:
            assert bodies(log) == [b"1", b"2"]
            assert [s.reason for s in log.skipped] == ["damaged file header"]

    def test_a_file_of_another_tenant_is_not_read(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("a", [frame(b"secret")])
            log.append("b", [frame(b"own")])
            of_a, of_b = only_segment(log, "a"), only_segment(log, "b")
        of_b.write_bytes(of_a.read_bytes())
        with SpanLog(tmp_path) as log:
            assert bodies(log, "b") == []
            (skipped,) = log.skipped
            assert "tenant a, segment 1" in skipped.reason
            log.append("b", [frame(b"new")])
            assert bodies(log, "b") == [b"new"]

    def test_a_newer_format_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("betrace.service.storage.spanlog.frames.VERSION", 2)
            with SpanLog(tmp_path) as log:
                log.append("shop", [frame()])
        with SpanLog(tmp_path) as log:
            assert bodies(log) == []
            assert "format version 2" in log.skipped[0].reason

    def test_a_frame_of_an_unknown_kind(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            (position,) = log.append("shop", [frame()])
            path = only_segment(log)
        salt = path.read_bytes()[24:32]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "betrace.service.storage.spanlog.frames._CONTENT_TYPES", ("a", "b", "protobuf")
            )
            header = frame_header(frame(), salt, position)
        path.write_bytes(path.read_bytes()[:FILE_HEADER_BYTES] + header + b"body")
        with SpanLog(tmp_path) as log, pytest.raises(FrameCorrupt, match="does not know"):
            log.read("shop", position)

    def test_a_frame_inside_a_payload_is_not_a_frame(self, tmp_path: Path) -> None:
        """A client that sends a copy of a log file cannot plant frames, even where its own frame is
        then damaged."""
        with SpanLog(tmp_path) as log:
            log.append("other", [frame(b"planted")])
            stolen = only_segment(log, "other").read_bytes()
            log.append("shop", [frame(b"1"), frame(stolen * 20), frame(b"2")])
            path = only_segment(log)
        data = bytearray(path.read_bytes())
        planted = data.find(b"\xf7BTF", FILE_HEADER_BYTES + 2 * FRAME_HEADER_BYTES + 1)
        data[planted - 150] ^= 1
        path.write_bytes(data)
        with SpanLog(tmp_path) as log:
            assert bodies(log) == [b"1", b"2"]
            assert log.skipped[0].bytes == FRAME_HEADER_BYTES + 20 * len(stolen)

    def test_reading_a_damaged_frame_or_none(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            first, second = log.append("shop", [frame(bytes(100_000)), frame(b"2")])
            path = only_segment(log)
            with path.open("r+b") as file:
                file.seek(90_000)
                file.write(b"?")
            with pytest.raises(FrameCorrupt, match=r"damaged payload.*offset 128 of tenant shop"):
                log.read("shop", first)
            with pytest.raises(FrameCorrupt, match="damaged frame header"):
                log.read("shop", first + 1)
            with pytest.raises(FrameCorrupt, match="torn"):
                log.read("shop", log.end("shop"))
            with pytest.raises(FrameMissing, match="no such segment"):
                log.read("shop", pack_position(7, 128))
            bad, good = log.read_many("shop", [first, second])
            assert isinstance(bad, FrameCorrupt)
            assert good == frame(b"2")
            path.unlink()
            log._files.close()
            with pytest.raises(FrameMissing, match="gone"):
                log.read("shop", second)
            assert bodies(log) == []

    @settings(max_examples=examples(150), deadline=None)
    @given(
        sizes=st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=5), max_size=6),
        cut=st.none() | st.integers(0, 12_000),
        flips=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5000), st.integers(1, 255))),
    )
    def test_exactly_the_undamaged_frames_are_read(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        sizes: list[list[int]],
        cut: int | None,
        flips: list[tuple[int, int, int]],
    ) -> None:
        directory = tmp_path_factory.mktemp("log")
        written: list[tuple[int, Frame]] = []
        with SpanLog(directory, segment_bytes=4096) as log:
            for batch in sizes:
                new = [
                    frame(os.urandom(size), NOON + len(written) + i) for i, size in enumerate(batch)
                ]
                written += zip(log.append("shop", new), new, strict=True)
            segments = log.segments("shop")
            assert list(log.frames("shop")) == written

        damaged = {s.number: bytearray(s.path.read_bytes()) for s in segments}
        original = {number: bytes(data) for number, data in damaged.items()}
        if cut is not None and segments:
            last = segments[-1].number
            del damaged[last][len(damaged[last]) - cut % (len(damaged[last]) + 1) :]
        for index, offset, mask in flips:
            if index < len(segments) and offset < len(damaged[segments[index].number]):
                damaged[segments[index].number][offset] ^= mask
        for segment in segments:
            segment.path.write_bytes(damaged[segment.number])

        def intact(position: int, f: Frame) -> bool:
            number, at = unpack_position(position)
            stop = at + f.stored_bytes
            return damaged[number][at:stop] == original[number][at:stop]

        expected = [(position, f) for position, f in written if intact(position, f)]
        with SpanLog(directory, segment_bytes=4096) as log:
            assert list(log.frames("shop")) == expected
            damage = log.damage
            lost = [
                (position, f)
                for position, f in written
                if not intact(position, f)
                and position & 0xFFFFFFFF < len(damaged[unpack_position(position)[0]])
            ]
            for position, f in lost:
                number, offset = unpack_position(position)
                (found,) = (
                    each
                    for each in log.skipped
                    if each.segment == number and each.offset <= offset < each.offset + each.bytes
                )
                assert found.torn or found.since_ns <= f.received_ns <= found.until_ns
            spans = sum(f.spans for _, f in lost)
            assert damage.spans <= spans
            if all(each.whole for each in log.skipped):
                assert damage.spans == spans
            assert damage.places == sum(not each.torn for each in log.skipped)
            assert list(log.frames("shop")) == expected
            assert (damage.places, damage.spans) == (log.damage.places, log.damage.spans)
            (position,) = log.append("shop", [frame(b"new")])
            assert position > max((p for p, _ in expected), default=0)
            assert list(log.frames("shop")) == [*expected, (position, frame(b"new"))]

    def test_a_long_search_crosses_blocks(self, tmp_path: Path) -> None:
        """The next frame begins where a block of the search ends."""
        for extra in range(-14, 3):
            with SpanLog(tmp_path / str(extra)) as log:
                log.append("shop", [frame(bytes((1 << 20) + extra)), frame(b"found")])
                path = only_segment(log)
            with path.open("r+b") as file:
                file.seek(FILE_HEADER_BYTES + 5)
                file.write(b"????")
            with SpanLog(tmp_path / str(extra)) as log:
                assert bodies(log) == [b"found"]


class TestOwnership:
    def test_a_second_owner_learns_the_pid_of_the_first(self, tmp_path: Path) -> None:
        script = (
            "import sys; from pathlib import Path\n"
            "from betrace.service.storage.spanlog.log import SpanLog\n"
            "log = SpanLog(Path(sys.argv[1])); print('owned', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[4],
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"owned\n"
            with pytest.raises(LockedError, match=f"process {other.pid}: stop that process"):
                SpanLog(tmp_path)
            other.kill()
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame()])

    def test_a_closed_client_is_refused(self, tmp_path: Path) -> None:
        log = SpanLog(tmp_path)
        log.close()
        log.close()
        with pytest.raises(RuntimeError, match="closed"):
            log.append("shop", [frame()])

    def test_a_read_only_log_follows_its_owner(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path, segment_bytes=4096) as owner:
            owner.append("shop", [frame(b"1")])
            with SpanLog(tmp_path, read_only=True) as reader:
                assert bodies(reader) == [b"1"]
                (position,) = owner.append("shop", [frame(b"2" * 4000)])
                assert bodies(reader) == [b"1", b"2" * 4000]
                assert reader.read("shop", position) == frame(b"2" * 4000)
                assert reader.end("shop") == owner.end("shop")
                assert reader.end("nobody") == 0
                with pytest.raises(RuntimeError, match="read-only"):
                    reader.append("shop", [frame()])

    def test_asking_for_unknown_tenants_keeps_nothing(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            for i in range(10):
                assert log.end(f"t{i}") == 0
            assert log._tenants == {}
            assert not any(tmp_path.glob("t*"))

    def test_statistics(self, tmp_path: Path) -> None:
        with SpanLog(tmp_path) as log:
            log.append("shop", [frame(b"12345", spans=4), frame(b"", spans=1)])
            statistics = log.statistics()
            assert (statistics.frames, statistics.spans) == (2, 5)
            assert statistics.bytes == 2 * FRAME_HEADER_BYTES + 5
            assert statistics.open_files == 1


def test_file_header_is_refused_when_cut(tmp_path: Path) -> None:
    with SpanLog(tmp_path) as log:
        log.append("shop", [frame(b"1")])
        path = only_segment(log)
    os.truncate(path, FILE_HEADER_BYTES - 1)
    with SpanLog(tmp_path) as log:
        assert bodies(log) == []
        assert [s.reason for s in log.skipped] == ["damaged file header"]
        assert len(file_header("shop", 1, 1, bytes(8))) == FILE_HEADER_BYTES


class TestStrayFiles:
    @pytest.mark.parametrize(
        "name",
        [
            "2026-13-45/00000009.seg",
            "20261101xx/00000009.seg",
            "copy/00000009.seg",
            "2026-11-01/9.seg",
            "2026-11-01/00000099.seg",
            "2026-11-01/00000000.seg",
            "2026-11-01/99999999999.seg",
            "2026-11-01/9999999999.seg",
            "2026-11-01/٠٠٠٠٠٠٠٩.seg",
            "2026-11-01/00000009 (copy).seg",
            "2999-11-01/00000001.seg",
        ],
    )
    def test_a_file_that_is_not_a_segment_is_reported_and_ignored(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
    ) -> None:
        with SpanLog(tmp_path, segment_bytes=4096) as log:
            positions = log.append("shop", [frame(), frame(bytes(4096)), frame(b"last")])
            number = len(log.segments("shop"))
        stray = tmp_path / "shop/log" / name
        stray.parent.mkdir(exist_ok=True)
        if stray.stem == "00000099":
            stray.mkdir()
        else:
            stray.write_bytes(b"stray")
        with SpanLog(tmp_path, segment_bytes=4096) as log:
            assert [log.read("shop", p).payload for p in positions][-1] == b"last"
            (after,) = log.append("shop", [frame(b"after")])
            assert len(bodies(log)) == 4
            assert unpack_position(after)[0] in (number, number + 1)
        assert caplog.text.count(str(stray)) == 1
        assert "move it away" in caplog.text

    @pytest.mark.parametrize("kind", ["directory", "link"])
    def test_a_stray_with_the_name_of_the_next_segment_stops_nothing(
        self, tmp_path: Path, kind: str
    ) -> None:
        with SpanLog(tmp_path, segment_bytes=4096) as log:
            log.append("shop", [frame(b"first")])
            stray = only_segment(log).with_name("00000002.seg")
            if kind == "directory":
                stray.mkdir()
            else:
                stray.symlink_to(tmp_path / "nowhere")
            log.append("shop", [frame(bytes(4096)), frame(b"last")])
            assert bodies(log) == [b"first", bytes(4096), b"last"]
            assert [s.number for s in log.segments("shop")] == [1, 3, 4]
